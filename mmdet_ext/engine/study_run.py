"""One run of a study: a method trained with one seed, tested, and its report; where its files lie,
and what of it is done."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deeplesion.errors import UserError
from deeplesion.files import parse_json, write_whole
from deeplesion.lock import only_writer

NOTE = "run.json"
# What `perform` notes, wherever in a note it stands.
KINDS = {
    **dict.fromkeys(("training", "tests", "fingerprint"), dict),
    **dict.fromkeys(("config", "code", "data", "ended", "device"), str),
    **dict.fromkeys(("seed", "starts", "memory_mb", "gpu_memory_mb"), int),
    **dict.fromkeys(("methods", "options"), list),
    "seconds": int | float,
    "evaluated": bool,
}
PATIENCE = 30  # seconds that a process has to end before it is killed
# A study that is killed cannot end its children: they look after that themselves.
CHILD = """
import os, runpy, sys
from pathlib import Path
from deeplesion.processes import end_with_parent
end_with_parent()
if os.getppid() != PARENT:  # it has ended in the meantime: the watch would wait for another
    sys.exit("the study has ended")
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Method:
    """A config with options, trained with several seeds.

    Attributes:
        name: what tables call it.
        config: file, or name of an experiment that comes along.
        options: as --cfg-options takes them, 'name=value'.
        training, test: fingerprints {'config', 'code', 'data'} of what training and test depend on,
            the seed excepted.
        images: the folders in which the slices of the test lie, for the pictures of reports; none
            for outlines.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)
    test: Mapping[str, str] = field(default_factory=dict)
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One training and what is tested with it.

    Attributes:
        folder: of the run, absolute.
        seed: of the training.
        methods: that share the training; more than one if they differ in the test alone.
        accept_code: take what was done by other code.
    """

    folder: Path
    seed: int
    methods: tuple[Method, ...]
    accept_code: bool = False

    @property
    def name(self) -> str:
        return f"{', '.join(m.name for m in self.methods)}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `failed` names the step, `log` holds what it printed."""

    job: Job
    failed: str = ""
    log: Path | None = None
    reason: str = ""


@dataclass
class Children:
    """Processes of a study's threads, which are ended together."""

    running: list[subprocess.Popen] = field(default_factory=list)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, *arguments, **options) -> subprocess.Popen:
        with self.lock:
            if self.stopped:
                raise Stopped
            # A session of its own: Ctrl-C in the terminal reaches the study alone, which passes
            # on one signal to each.
            self.running.append(subprocess.Popen(*arguments, **options, start_new_session=True))
            return self.running[-1]

    def wait(self, child: subprocess.Popen) -> float:
        """Waits for one; returns the most memory (MB) that one of its processes held."""
        _, status, usage = os.wait4(child.pid, 0)
        with self.lock:
            child.returncode = os.waitstatus_to_exitcode(status)
            self.running.remove(child)
        if self.stopped:
            raise Stopped
        return usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)

    def stop(self) -> None:
        """Ends all as Ctrl-C does, and kills what does not end. A process ends its workers itself:
        without them it would say that they were lost for want of memory."""
        with self.lock:
            self.stopped = True
        until = time.monotonic() + PATIENCE
        for send, number in ((os.kill, signal.SIGTERM), (os.killpg, signal.SIGKILL)):
            with self.lock:
                for child in self.running:
                    with contextlib.suppress(ProcessLookupError):
                        send(child.pid, number)
            while self.running and time.monotonic() < until:
                time.sleep(0.05)


class Stopped(Exception):
    """The study is being ended."""


def read_note(folder: Path) -> dict:
    """What is noted of the run in a folder: `seed`, `training`, `tests`; {} if there is none.

    Raises UserError if the file is not what `perform` writes.
    """
    file = folder / NOTE
    if not file.is_file():
        return {}
    try:
        note = parse_json(file.read_bytes())
    except (ValueError, RecursionError):
        note = None
    if not _is_note(note):
        raise UserError(f"{file} is no note of a study's run: remove its folder")
    return note


def _is_note(note: object) -> bool:
    if not isinstance(note, dict) or not {"seed", "training", "tests"} <= note.keys():
        return False
    # Of a test that is being written nothing is known.
    return (
        _of_their_kinds(note)
        and {"config", "code", "data"} <= note["training"].get("fingerprint", {}).keys()
        and all(isinstance(t, dict) and "fingerprint" in t for t in note["tests"].values())
    )


def _of_their_kinds(part: dict) -> bool:
    return all(
        isinstance(value, KINDS.get(name, object))
        and (not isinstance(value, dict) or _of_their_kinds(value))
        for name, value in part.items()
    )


def notes_of(out: Path) -> Iterator[tuple[Path, dict]]:
    """Folder and note of every run of a study. One whose note is damaged does not count, and is
    named once."""
    for file in sorted((out / "runs").glob(f"*/{NOTE}")):
        try:
            note = read_note(file.parent)
        except UserError as error:
            _tell(f"{error}; until then that run does not count")
        else:
            if note:  # the folder may be removed at this moment
                yield file.parent, note


@functools.cache
def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def same(one: Mapping, other: Mapping, accept_code: bool) -> bool:
    """Whether two fingerprints are of one thing."""
    return all(one.get(k) == other.get(k) for k in ("config", "data", "code")[: 3 - accept_code])


def find_run(out: Path, method: Method, seed: int, accept_code: bool) -> Path | None:
    """The folder of a method's training with a seed, finished or not; by fingerprint, not name.

    Of several, one whose test is done goes first, then one of the same code, then the one whose
    training ended last.
    """
    found = []
    for folder, note in notes_of(out):
        training = note["training"]
        if note["seed"] == seed and same(training["fingerprint"], method.training, accept_code):
            now = training["fingerprint"]["code"] == method.training["code"]
            done = tested(folder, method, accept_code) is not None
            found.append((done, now, training.get("ended", ""), folder))
    return max(found)[-1] if found else None


def new_folder(out: Path, method: Method, seed: int) -> Path:
    """Where a run goes that has no folder yet."""
    name = re.sub(r"[^\w.+-]+", "_", method.name)
    key = "".join(method.training[part][:4] for part in ("config", "code", "data"))
    stem = f"{name}-seed{seed}-{key}"
    # What began there may have gone on by other code, and is then of that.
    names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
    return next(f for f in (out / "runs" / name for name in names) if not (f / NOTE).exists())


def tested(folder: Path, method: Method, accept_code: bool) -> tuple[str, dict] | None:
    """The folder of a method's test within that of the run, and what is noted of it; None if it is
    not done."""
    for name, test in read_note(folder).get("tests", {}).items():
        there = (folder / name / "results.json.gz").is_file()
        if there and same(test["fingerprint"], method.test, accept_code):
            return name, test
    return None


def changed_since(out: Path, method: Method, seed: int) -> str:
    """Of runs that are there under the method's name and seed with another fingerprint: what is
    another now, 'config and code'; '' if there is none."""
    latest_first = sorted(notes_of(out), key=lambda found: -(found[0] / NOTE).stat().st_mtime)
    for _, note in latest_first:
        if note["seed"] == seed and method.name in note.get("methods", []):
            old = note["training"]["fingerprint"]
            return " and ".join(k for k, v in method.training.items() if old.get(k) != v)
    return ""


def perform(job: Job, tools: Path, environment: Mapping[str, str], children: Children) -> Outcome:
    """Does of a job what is not done yet: trains, going on where it was interrupted, tests, and
    writes the report. What its commands print goes to train.txt, test.txt and evaluate.txt.

    Args:
        tools: folder of train.py, test.py, evaluate.py.
        environment: variables beside this process's own.
        children: that the study is waiting for; raises Stopped when they are ended.
    """
    try:
        with only_writer(job.folder / "run.lock", "--out"):
            return _perform(job, tools, environment, children)
    except (UserError, OSError) as error:  # its folder is in use, a full disk
        return Outcome(job, "its files", reason=str(error))
    except Stopped:
        raise
    except Exception as error:  # a fault of ours, which is no reason to end the other runs
        log = job.folder / "error.txt"
        with contextlib.suppress(OSError):
            log.write_text(traceback.format_exc())
        return Outcome(job, "its files", log, f"{type(error).__name__}: {error}")


def _perform(job: Job, tools: Path, environment: Mapping[str, str], children: Children) -> Outcome:
    first = job.methods[0]
    new = dict(seed=job.seed, training=dict(fingerprint=dict(first.training)), tests={})
    note = read_note(job.folder) or new
    note["methods"] = sorted({*note.get("methods", []), *(m.name for m in job.methods)})
    note["training"].update(config=first.config, options=list(first.options))

    child_code = CHILD.replace("PARENT", str(os.getpid()))

    def save() -> None:
        write_whole(job.folder / NOTE, json.dumps(note, indent=1) + "\n")

    def run(command: str, arguments: Sequence, into: dict) -> Outcome | None:
        """Runs a command and adds its time and memory to what is noted; an Outcome if it fails."""
        log = job.folder / f"{command}.txt"
        line = [str(tools / f"{command}.py"), *map(str, arguments)]
        began = time.time()
        into["starts"] = into.get("starts", 0) + 1
        status, memory = None, 0.0
        with open(log, "a") as file:
            print(f"\n# {time.strftime('%F %T')} {shlex.join(line)}", file=file, flush=True)
            try:
                child = children.start(
                    [sys.executable, "-P", "-c", child_code, *line],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    # A log is no place for bars.
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", **environment},
                )  # fmt: skip
                memory = children.wait(child)
                status = child.returncode
            finally:  # of an interrupted start, too
                into["seconds"] = round(into.get("seconds", 0) + time.time() - began, 3)
                into["memory_mb"] = round(max(into.get("memory_mb", 0), memory))
                save()
        return None if status == 0 else Outcome(job, command, log, _how_it_ended(status))

    training, work_dir = note["training"], job.folder / "training"
    if not training.get("ended"):
        # Of a start by other code, which was accepted, this one goes on: it is of both, which no
        # code is by itself.
        codes = dict.fromkeys([*training["fingerprint"]["code"].split("+"), first.training["code"]])
        training["fingerprint"] = {**first.training, "code": "+".join(codes)}
    save()
    if not training.get("ended"):
        seeded = [*first.options, f"randomness.seed={job.seed}"]
        options = ["--work-dir", work_dir, "--resume", "--cfg-options", *seeded]
        if failed := run("train", [first.config, *options], training):
            return failed
        training.update(ended=time.strftime("%F %T"), **device_of(work_dir))
        save()

    def test(method: Method) -> Outcome | None:
        """Tests and writes the report, as far as that is not done; an Outcome if it fails."""
        done = tested(job.folder, method, job.accept_code)
        name = done[0] if done else "test-" + method.test["config"][:4] + method.test["data"][:4]
        into = note["tests"].get(name, {})
        if not done:
            options = ["--work-dir", job.folder / name]
            options += ["--cfg-options", *method.options] if method.options else []
            into = dict(fingerprint={})  # of what is being written nothing is known
            note["tests"][name] = into
            save()
            if failed := run("test", [method.config, work_dir, *options], into):
                return failed
            into.update(fingerprint=dict(method.test), ended=time.strftime("%F %T"))
            save()
        if not into.get("evaluated"):
            options = [
                "--names",
                f"{method.name}, seed {job.seed}",
                "--out",
                job.folder / name / "evaluation",
            ]
            options += [each for folder in method.images for each in ("--images", folder)]
            result = job.folder / name / "results.json.gz"
            if failed := run("evaluate", [result, *options], {}):
                return failed
            into["evaluated"] = True
            save()
        return None

    failures = {m.name: failed for m in job.methods if (failed := test(m))}
    if not failures:
        return Outcome(job)
    failed = next(iter(failures.values()))
    if len(job.methods) == 1:
        return failed
    return replace(failed, reason="; ".join(f"{n}: {each.reason}" for n, each in failures.items()))


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    killed = " (for want of memory, perhaps)" if status == -signal.SIGKILL else ""
    return f"ended by {signal.Signals(-status).name}{killed}"


def device_of(work_dir: Path) -> dict:
    """`device`, what the latest start trained on, and on a GPU `gpu_memory_mb`, its peak."""
    device = ""
    for record in sorted(work_dir.glob("run_*.json"), key=lambda f: f.stat().st_mtime):
        try:
            environment = json.loads(record.read_bytes())["environment"]
        except (ValueError, KeyError, TypeError):  # damaged: no reason to lose the training
            continue
        gpus = [value for key, value in environment.items() if re.fullmatch(r"GPU [\d,]+", key)]
        device = ", ".join(gpus) or "CPU"
    found = dict(device=device) if device else {}
    texts = (file.read_text(errors="replace") for file in work_dir.glob("*/*.log"))
    peaks = [int(mb) for text in texts for mb in re.findall(r" memory: (\d+)", text)]
    return {**found, "gpu_memory_mb": max(peaks)} if peaks else found


def epochs_of(log: Path) -> tuple[float, float | None]:
    """How much of its epochs a training has done by its log, 0 to 1, and how many seconds a whole
    one takes by the present start; None if that is not known yet."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return 0.0, None
    starts = list(re.finditer(r"^# (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ", text, re.M))
    epochs = re.findall(r"^epoch +(\d+)/(\d+) ", text, re.M)
    if not epochs:
        return 0.0, None
    done, of = map(int, epochs[-1])
    now = len(re.findall(r"^epoch +\d+/\d+ ", text[starts[-1].start() :], re.M)) if starts else 0
    if not now:
        return done / of, None
    began = time.mktime(time.strptime(starts[-1][1], "%Y-%m-%d %H:%M:%S"))
    return done / of, (log.stat().st_mtime - began) / now * of


def last_lines(log: Path | None, number: int = 12) -> list[str]:
    """The end of a log."""
    if log is None or not log.is_file():
        return []
    return log.read_text(errors="replace").rstrip().splitlines()[-number:]
