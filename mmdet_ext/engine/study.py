"""All runs of a study: one after another, several at once, one a GPU, or as jobs of Slurm; what is
done is skipped, what fails is named and the rest goes on."""

from __future__ import annotations

import ast
import contextlib
import os
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeplesion.errors import UserError, install
from deeplesion.processes import available_cores
from mmdet_ext.engine.study_progress import Progress
from mmdet_ext.engine.study_run import (
    Children,
    Job,
    Method,
    Outcome,
    Stopped,
    changed_since,
    find_run,
    new_folder,
    notes_of,
    perform,
    read_note,
    tested,
)

POLL = 1.0  # seconds between two looks at what runs


@dataclass(frozen=True)
class Todo:
    """Runs of a study.

    Attributes:
        jobs: what is left to do, all methods' first seed first.
        done: how many are done.
        changed: method, seed -> what is another than in the run that is there ('config and code').
    """

    jobs: list[Job]
    done: int
    changed: dict[tuple[str, int], str]


def todo_of(out: Path, methods: Sequence[Method], seeds: int, accept_code: bool = False) -> Todo:
    """What is left to do: seeds 0 to `seeds` - 1 of every method, but for runs that are done."""
    shared: dict[Path, list[Method]] = {}
    seed_of, done, changed = {}, 0, {}
    for seed in range(seeds):
        for method in methods:
            folder = find_run(out, method, seed, accept_code)
            test = tested(folder, method, accept_code) if folder else None
            if test and test[1].get("evaluated"):
                done += 1
                continue
            if folder is None and (parts := changed_since(out, method, seed)):
                changed[method.name, seed] = parts
            if folder is None:
                # Methods that differ in the test alone share the training.
                alike = (f for f, (first, *_) in shared.items()
                         if seed_of[f] == seed and first.training == method.training)  # fmt: skip
                folder = next(alike, None) or new_folder(out, method, seed)
            shared.setdefault(folder, []).append(method)
            seed_of[folder] = seed
    jobs = [Job(f.resolve(), seed_of[f], tuple(m), accept_code) for f, m in shared.items()]
    return Todo(jobs, done, changed)


def finished_runs(out: Path, method: Method, accept_code: bool = False) -> list[dict]:
    """The runs of a method that are done, of any seed: `seed`, `folder` of the result relative to
    `out`, and what is noted of `training` and `test`."""
    seeds = {note["seed"] for _, note in notes_of(out)}
    found = []
    for seed in sorted(seeds):
        folder = find_run(out, method, seed, accept_code)
        test = tested(folder, method, accept_code) if folder else None
        if test:
            place = (folder / test[0]).relative_to(out)
            note = read_note(folder)
            found.append(
                dict(seed=seed, folder=place.as_posix(), training=note["training"], test=test[1])
            )
    return found


def of_other_code(out: Path, methods: Sequence[Method], accept_code: bool) -> str:
    """What to say of finished runs that code other than the present has done; '' if there is none.
    They count if that is accepted, and where a method's own code has not done the seed as well."""
    found = []
    for method in methods:
        own = {run["seed"] for run in finished_runs(out, method)}
        every = {run["seed"] for run in finished_runs(out, method, accept_code=True)}
        if others := sorted(every - own):
            found.append(f"{method.name}, seed {' and '.join(map(str, others))}")
    if not found:
        return ""
    what = "count" if accept_code else "are left out (--accept-code-changes takes them)"
    return f"Runs that other code has done {what}: {'; '.join(found)}."


def run_all(
    jobs: Sequence[Job],
    tools: Path,
    at_once: int,
    gpus: Sequence[str] = (),
    done: int = 0,
    known: Mapping[str, float] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Does jobs on this machine, `at_once` at a time; returns how each ended, in their order.

    Interrupted, it ends its processes, waits for them, and passes the interruption on.

    Args:
        tools: folder of train.py, test.py and evaluate.py.
        gpus: what CUDA_VISIBLE_DEVICES is to be in turn; none: as it is.
        done: runs that are done already, for the count.
        known: method -> seconds that a run of it took before, for the time left.
        environment: variables for the commands beside this process's own.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for i in range(at_once):
        free.put(gpus[i % len(gpus)] if gpus else "")
    variables = dict(environment or {})
    if not gpus and at_once > 1:  # else each takes all cores
        variables.setdefault(
            "OMP_NUM_THREADS",
            os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // at_once)),
        )
    children = Children()
    progress = Progress(jobs, at_once, done, known or {})

    def do(job: Job) -> Outcome:
        gpu = free.get()
        try:
            progress.begin(job)
            on_gpu = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
            return perform(job, tools, {**variables, **on_gpu}, children)
        finally:
            free.put(gpu)

    with progress, ThreadPoolExecutor(at_once) as threads:
        futures = []
        try:
            for job in jobs:
                futures.append(threads.submit(do, job))
            return _follow(futures, progress)
        finally:
            for future in futures:
                future.cancel()
            children.stop()


def run_on_slurm(
    jobs: Sequence[Job],
    tools: Path,
    folder: Path,
    parameters: Mapping[str, Any],
    at_once: int | None = None,
    done: int = 0,
    known: Mapping[str, float] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Does jobs as one array of Slurm, by submitit, and waits for it; otherwise as `run_all`.

    A job that meets its time limit or is pre-empted is queued again and goes on from its last
    checkpoint. Interrupted, it cancels the jobs.

    Args:
        folder: for submitit's own files; on a disk that all machines share, as the jobs' folders.
        parameters: of submitit's `update_parameters`, and `cluster` of its AutoExecutor, which
            is Slurm by default.
        at_once: how many at a time.

    Raises UserError if submitit is not there, finds no Slurm, or refuses the parameters; and for
    `at_once` with another cluster than Slurm, which would not keep to it.
    """
    own = dict(parameters)
    if at_once and own.get("cluster", "slurm") != "slurm":
        raise UserError(
            f"--jobs {at_once}: with --slurm cluster={own['cluster']} submitit starts all runs at "
            "once. Leave out --jobs or, to run so many at a time on this machine, --slurm"
        )
    try:
        from submitit import AutoExecutor
    except ModuleNotFoundError:
        raise UserError(f"--slurm needs submitit: {install('slurm')}") from None
    try:
        executor = AutoExecutor(folder=folder.resolve(), cluster=own.pop("cluster", "slurm"))
        limit = {"slurm_array_parallelism": at_once} if at_once else {}
        executor.update_parameters(**{"name": "study", **limit, **own})
        work = SlurmWork(tools.resolve(), dict(environment or {}))
        submitted = executor.map_array(work, jobs)
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--slurm: submitit refuses {dict(parameters)}: {error}") from None
    with Progress(jobs, at_once or len(jobs), done, known or {}) as progress:
        try:
            print(f"submitted as {submitted[0].job_id.partition('_')[0]}, {len(submitted)} jobs; "
                  f"submitit's logs: {folder}", flush=True)  # fmt: skip
            for job in jobs:
                progress.begin(job)
            return _follow([SlurmFuture(*pair) for pair in zip(jobs, submitted)], progress)
        finally:
            for job in submitted:
                if not job.done():
                    job.cancel()


@dataclass(frozen=True)
class SlurmWork:
    """What a job of Slurm does; pickled by submitit."""

    tools: Path
    environment: dict[str, str]

    def __call__(self, job: Job) -> Outcome:
        return perform(job, self.tools, self.environment, Children())

    def checkpoint(self, job: Job) -> Any:
        """What submitit queues when the time is up."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


@dataclass(frozen=True)
class SlurmFuture:
    """A job of submitit as `_follow` looks at one."""

    job: Job
    submitted: Any

    def done(self) -> bool:
        return self.submitted.done()

    def result(self) -> Outcome:
        error = self.submitted.exception()
        if error is None:
            return self.submitted.result()
        log = Path(self.submitted.paths.stderr)
        return Outcome(self.job, "Slurm", log, f"{self.submitted.state}: {type(error).__name__}")


def _follow(futures: Sequence, progress: Progress) -> list[Outcome]:
    """Waits for all, and says of each how it ended when it does."""
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(futures):
        for i, future in enumerate(futures):
            if i not in outcomes and future.done():
                with contextlib.suppress(Stopped):
                    outcomes[i] = future.result()
                    progress.end(outcomes[i])
        progress.show()
        if len(outcomes) < len(futures):
            time.sleep(POLL)
    return [outcomes[i] for i in range(len(futures))]


def visible_gpus(number: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each of so many GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else map(str, range(number))
    return [name for name in names if name][:number]


def pairs(settings: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(name, value) of 'name=value', numbers and True, False, None as such. Raises UserError for
    anything else."""
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise UserError(f"--slurm takes name=value, got {setting!r}")
        yield name, _value(value)


def _value(text: str) -> Any:
    """A number, True, False or None; else the text, such as 1:00:00, or 0042 of an account."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if value is None or isinstance(value, (bool, int, float)) else text
