"""Scheduling, resuming, skipping, failing of a study's runs, with commands that train nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from deeplesion.errors import UserError
from deeplesion.lock import only_writer
from mmdet_ext.engine import study, study_run
from mmdet_ext.engine.study import (
    finished_runs,
    of_other_code,
    pairs,
    todo_of,
    visible_gpus,
)
from mmdet_ext.engine.study_progress import Progress, known_seconds
from mmdet_ext.engine.study_run import Job, Method, device_of, epochs_of, find_run, read_note

TRAIN = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--work-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
options = dict(o.split("=", 1) for o in sys.argv[sys.argv.index("--cfg-options") + 1 :])
assert "--resume" in sys.argv
with open(folder / "starts.jsonl", "a") as file:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(json.dumps([os.getpid(), time.time(), gpu, options]), file=file)
print("epoch 1/2  loss 1", flush=True)
if not (folder / "first").exists():
    (folder / "first").touch()
    time.sleep(float(options.get("wait", 0)))
print("epoch 2/2  loss 1")
if options.get("fail") == options["randomness.seed"]:
    sys.exit("the loss is not finite")
with open(folder / "ends", "w") as file:
    print(time.time(), file=file)
"""
TEST = """
import json, sys
from pathlib import Path
assert (Path(sys.argv[2]) / "ends").exists()
folder = Path(sys.argv[sys.argv.index("--work-dir") + 1])
folder.mkdir()
(folder / "results.json.gz").write_text("x")
(folder / "results.froc.json").write_text(json.dumps(dict(froc=[dict(average=71.25)])))
"""
EVALUATE = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir()
(folder / "report.html").write_text(sys.argv[sys.argv.index("--names") + 1])
"""

CHILD = study_run.CHILD


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(study, "POLL", 0.01)
    # The real one imports OpenCV; what it does has tests of its own.
    light = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    monkeypatch.setattr(study_run, "CHILD", light)


@pytest.fixture
def tools(tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("train", TRAIN), ("test", TEST), ("evaluate", EVALUATE)):
        (folder / f"{name}.py").write_text(text)
    return folder


def method(name, *options, code="1", data="d", test="t"):
    own = dict(config=" ".join(options), code=code, data=data)
    return Method(name, f"{name}.py", options, own, dict(config=test, code=code, data="s"))


def run(out, methods, seeds, tools, at_once=1, **options):
    todo = todo_of(out, methods, seeds)
    return study.run_all(todo.jobs, tools, at_once, done=todo.done, **options)


def starts(out, pattern):
    """What the trainings were started with: [pid, time, GPU, options]."""
    files = sorted((out / "runs").glob(f"{pattern}/training/starts.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_every_method_with_every_seed_and_then_nothing_is_left(tools, tmp_path, capsys):
    out, methods = tmp_path / "out", [method("a b", "x=1"), method("c")]
    outcomes = run(out, methods, 2, tools)
    assert not any(outcome.failed for outcome in outcomes)
    names = [outcome.job.name for outcome in outcomes]
    assert names == ["a b, seed 0", "c, seed 0", "a b, seed 1", "c, seed 1"]
    found = starts(out, "a_b-seed*")
    assert [each[3] for each in found] == [{"x": "1", "randomness.seed": str(s)} for s in (0, 1)]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[0].startswith("[1/4] a b, seed 0: average 71.25, took ")
    assert "; left " in printed[2] and "left" not in printed[3]

    for each in methods:
        runs = finished_runs(out, each)
        assert [r["seed"] for r in runs] == [0, 1]
        for one in runs:
            assert (out / one["folder"] / "results.json.gz").is_file()
            assert one["training"]["starts"] == 1 and one["training"]["seconds"] > 0
            assert one["training"]["memory_mb"] > 1 and one["test"]["seconds"] > 0
            logs = {file.name for file in (out / one["folder"]).parent.glob("*.txt")}
            assert logs == {"train.txt", "test.txt", "evaluate.txt"}
    todo = todo_of(out, methods, 2)
    assert (todo.jobs, todo.done, todo.changed) == ([], 4, {})
    assert set(known_seconds(out)) == {"a b", "c"}
    # A seed more, and seeds of before stay part of the method.
    assert [job.seed for job in todo_of(out, methods[:1], 3).jobs] == [2]


def test_a_failing_run_is_named_the_rest_goes_on_and_it_is_tried_again(tools, tmp_path, capsys):
    out, methods = tmp_path / "out", [method("bad", "fail=0"), method("good")]
    outcomes = run(out, methods, 1, tools)
    assert [(o.failed, o.reason) for o in outcomes] == [("train", "exit status 1"), ("", "")]
    printed = capsys.readouterr().out
    assert "bad, seed 0: FAILED (train: exit status 1)" in printed
    assert "    the loss is not finite\n" in printed
    assert finished_runs(out, methods[0]) == [] and len(finished_runs(out, methods[1])) == 1
    (tools / "train.py").write_text(TRAIN.replace("sys.exit(", "print("))
    (outcome,) = run(out, methods, 1, tools)
    assert not outcome.failed
    assert finished_runs(out, methods[0])[0]["training"]["starts"] == 2


def test_a_report_that_fails_is_made_up_for_without_a_new_training(tools, tmp_path):
    (tools / "evaluate.py").write_text("raise SystemExit(3)")
    (outcome,) = run(tmp_path, [method("a")], 1, tools)
    assert (outcome.failed, outcome.reason) == ("evaluate", "exit status 3")
    assert len(finished_runs(tmp_path, method("a"))) == 1  # its result counts
    (tools / "evaluate.py").write_text(EVALUATE)
    (outcome,) = run(tmp_path, [method("a")], 1, tools)
    assert not outcome.failed and todo_of(tmp_path, [method("a")], 1).done == 1
    (note,) = (read_note(file.parent) for file in tmp_path.glob("runs/*/run.json"))
    assert note["training"]["starts"] == next(iter(note["tests"].values()))["starts"] == 1


def test_a_process_that_is_killed_says_so(tools, tmp_path):
    (tools / "train.py").write_text("import os; os.kill(os.getpid(), 9)")
    (outcome,) = run(tmp_path, [method("a")], 1, tools)
    assert outcome.reason == "ended by SIGKILL (for want of memory, perhaps)"


def test_several_at_once_each_on_a_gpu_of_its_own(tools, tmp_path):
    out, methods = tmp_path / "out", [method(n, f"{n}=1", "wait=0.3") for n in "abcd"]
    outcomes = run(out, methods, 1, tools, at_once=2, gpus=["5", "7"])
    assert not any(outcome.failed for outcome in outcomes)
    spans = []
    for file in (out / "runs").glob("*/training/ends"):
        (_, begin, gpu, _), = map(json.loads, (file.parent / "starts.jsonl").open())  # fmt: skip
        spans.append((begin, float(file.read_text()), gpu))
    assert {gpu for *_, gpu in spans} == {"5", "7"}
    for begin, end, gpu in spans:
        together = [other for other in spans if other[0] < end and begin < other[1]]
        assert len([g for *_, g in together if g == gpu]) == 1
    assert any(len([o for o in spans if o[0] < e and b < o[1]]) == 2 for b, e, _ in spans)


def test_what_counts_is_config_code_and_data_not_names(tools, tmp_path):
    out = tmp_path / "out"
    run(out, [method("a", "x=1")], 1, tools)
    assert todo_of(out, [method("renamed", "x=1")], 1).done == 1
    for changed, what in (
        (method("a", "x=2"), "config"),
        (method("a", "x=1", code="2"), "code"),
        (method("a", "x=2", data="e"), "config and data"),
    ):
        todo = todo_of(out, [changed], 1)
        assert (todo.done, todo.changed) == (0, {("a", 0): what})
        (job,) = todo.jobs
        assert job.folder != find_run(out, method("a", "x=1"), 0, False)
    other_code = method("a", "x=1", code="2")
    assert todo_of(out, [other_code], 1, accept_code=True).done == 1
    assert finished_runs(out, other_code) == []
    assert len(finished_runs(out, other_code, accept_code=True)) == 1
    # Of a start by one code another goes on, if that is accepted; it is then of both, and counts as
    # neither's own.
    waiting = method("w")
    (job,) = todo_of(out, [waiting], 1).jobs
    (tools / "evaluate.py").write_text("raise SystemExit(1)")
    (job.folder / "training").mkdir(parents=True)
    note = dict(seed=0, methods=["w"], training=dict(fingerprint=dict(waiting.training)), tests={})
    (job.folder / "run.json").write_text(json.dumps(note))
    later = method("w", code="2")
    study.run_all(todo_of(out, [later], 1, accept_code=True).jobs, tools, 1)
    assert find_run(out, later, 0, True) == find_run(out, waiting, 0, True) == job.folder
    assert find_run(out, later, 0, False) is find_run(out, waiting, 0, False) is None
    assert read_note(job.folder)["training"]["fingerprint"]["code"] == "1+2"
    study.run_all(todo_of(out, [later], 1, accept_code=True).jobs, tools, 1)
    assert read_note(job.folder)["training"]["fingerprint"]["code"] == "1+2"
    assert todo_of(out, [waiting], 1).jobs[0].folder.name == f"{job.folder.name}-2"
    (tools / "evaluate.py").write_text(EVALUATE)
    # Run anew, both are there, and each code finds its own.
    run(out, [other_code], 1, tools)
    folders = {finished_runs(out, m, True)[0]["folder"] for m in (other_code, method("a", "x=1"))}
    assert len(folders) == 2


def test_what_other_code_has_done_is_told(tools, tmp_path):
    old, new = method("a"), method("a", code="2")
    run(tmp_path, [old, method("b")], 3, tools)
    run(tmp_path, [new], 1, tools)
    told = of_other_code(tmp_path, [new, method("b")], accept_code=False)
    assert told.startswith("Runs that other code has done are left out (--accept-code-changes")
    assert told.endswith(": a, seed 1 and 2.")
    assert "done count: a, seed 1 and 2." in of_other_code(tmp_path, [new], accept_code=True)
    assert of_other_code(tmp_path, [old], accept_code=True) == ""


def test_a_damaged_note_is_named_once_and_ends_nothing(tools, tmp_path, capsys):
    run(tmp_path, [method("a")], 2, tools)
    damaged = next(tmp_path.glob("runs/a-seed0-*/run.json"))
    damaged.write_text("{")
    capsys.readouterr()
    assert known_seconds(tmp_path).keys() == {"a"}
    assert len(finished_runs(tmp_path, method("a"))) == 1
    todo = todo_of(tmp_path, [method("a")], 2)
    assert todo.done == 1 and len(todo.jobs) == 1 and todo.jobs[0].folder != damaged.parent
    assert capsys.readouterr().err.count(f"{damaged} is no note of a study's run") == 1


def test_methods_that_differ_in_the_test_alone_share_the_training(tools, tmp_path):
    out, methods = tmp_path / "out", [method("near", test="1"), method("far", test="2")]
    (outcome,) = run(out, methods, 1, tools)
    assert outcome.job.name == "near, far, seed 0" and not outcome.failed
    assert len(starts(out, "*")) == 1
    results = {finished_runs(out, each)[0]["folder"] for each in methods}
    assert len(results) == 2
    # A third one later tests the same weights.
    third = method("third", test="3")
    (outcome,) = run(out, [*methods, third], 1, tools)
    assert len(starts(out, "*")) == 1 and len(finished_runs(out, third)) == 1


def test_a_test_that_fails_stops_no_other_test_of_the_training(tools, tmp_path, capsys):
    (tools / "test.py").write_text(f"import sys\nif 'bad=1' in sys.argv: sys.exit('no')\n{TEST}")
    bad, good = replace(method("bad", test="1"), options=("bad=1",)), method("good", test="2")
    for _ in range(2):
        (outcome,) = run(tmp_path, [bad, good], 1, tools)
        assert (outcome.failed, outcome.log.name) == ("test", "test.txt")
        (one,) = finished_runs(tmp_path, good)
        assert one["test"]["starts"] == 1 and not finished_runs(tmp_path, bad)
    printed = capsys.readouterr().out
    assert "bad, good, seed 0: FAILED (test: bad: exit status 1)" in printed
    assert "bad, seed 0: FAILED (test: exit status 1)" in printed


def test_while_a_command_runs_the_note_claims_nothing_that_it_may_overwrite(tools, tmp_path):
    """For it may be killed, with the study, before it ends."""
    look = "import shutil\nfrom pathlib import Path\nimport sys\n" + (
        "folder = Path(sys.argv[sys.argv.index('--work-dir') + 1]).parent\n"
        "shutil.copy(folder / 'run.json', folder / (Path(sys.argv[0]).stem + '-saw.json'))\n"
    )
    for name, text in (("train", TRAIN), ("test", TEST.replace("mkdir()", "mkdir(exist_ok=True)"))):
        (tools / f"{name}.py").write_text(look + text)
    first = method("a")
    run(tmp_path, [first], 1, tools)
    (folder,) = tmp_path.glob("runs/*")
    # Its test was done by other code: it is done again into the same folder.
    run(tmp_path, [replace(first, test={**first.test, "code": "2"})], 1, tools)
    seen = json.loads((folder / "test-saw.json").read_text())
    assert [test["fingerprint"] for test in seen["tests"].values()] == [{}]
    # A training that other code began, and that was accepted, is of both from this start.
    note = read_note(folder)
    del note["training"]["ended"]
    (folder / "run.json").write_text(json.dumps(note))
    later = method("a", code="2")
    study.run_all(todo_of(tmp_path, [later], 1, accept_code=True).jobs, tools, 1)
    seen = json.loads((folder / "train-saw.json").read_text())
    assert seen["training"]["fingerprint"] == {**later.training, "code": "1+2"}


def test_an_error_of_ours_in_one_run_is_named_and_ends_no_other(tools, tmp_path, monkeypatch):
    def broken(folder):
        return {} if folder.parent.name.startswith("b-") else {}["no such"]

    monkeypatch.setattr(study_run, "device_of", broken)
    bad, good = run(tmp_path, [method("a", "x=1"), method("b")], 1, tools)
    assert not good.failed
    assert bad.reason == "KeyError: 'no such'" and "in broken" in bad.log.read_text()


def test_a_finished_run_of_accepted_code_goes_before_one_that_was_only_begun(tools, tmp_path):
    run(tmp_path, [method("a")], 1, tools)
    (tools / "train.py").write_text("raise SystemExit(1)")
    later = method("a", code="2")
    assert run(tmp_path, [later], 1, tools)[0].failed
    assert len(list(tmp_path.glob("runs/*/run.json"))) == 2
    assert len(finished_runs(tmp_path, later, accept_code=True)) == 1
    assert todo_of(tmp_path, [later], 1, accept_code=True).done == 1
    assert todo_of(tmp_path, [later], 1).done == 0


def test_a_command_whose_study_has_ended_does_not_begin(tools, tmp_path, repository):
    script, written = tools / "writes.py", tmp_path / "written"
    script.write_text(f"open({str(written)!r}, 'w')")
    for parent, begins in ((os.getpid(), True), (1, False)):
        code = CHILD.replace("PARENT", str(parent))
        command = [sys.executable, "-c", code, str(script)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(repository)}, check=begins)
        assert written.exists() == begins
        written.unlink(missing_ok=True)


def test_a_test_whose_result_is_gone_is_done_again(tools, tmp_path):
    run(tmp_path, [method("a")], 1, tools)
    (result,) = tmp_path.glob("runs/*/*/results.json.gz")
    for file in [
        *result.parent.glob("evaluation/*"),
        result,
        result.with_name("results.froc.json"),
    ]:
        file.unlink()
    (result.parent / "evaluation").rmdir()
    result.parent.rmdir()
    assert finished_runs(tmp_path, method("a")) == []
    (outcome,) = run(tmp_path, [method("a")], 1, tools)
    assert not outcome.failed and len(starts(tmp_path, "*")) == 1


DRIVER = """
import sys
from pathlib import Path
from deeplesion.processes import termination_interrupts
from mmdet_ext.engine import study
from mmdet_ext.engine.study_run import Method
out, tools = map(Path, sys.argv[1:])
prints = dict(config="c", code="c", data="d")
methods = [Method(n, "x.py", ("wait=60",), {**prints, "data": n}, prints) for n in "abc"]
with termination_interrupts():
    study.run_all(study.todo_of(out, methods, 1).jobs, tools, 2)
"""


def wait_for(condition, seconds=60):
    for _ in range(int(seconds / 0.05)):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def runs_still(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


WITH_WORKER = """
import signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def end(*_):
    time.sleep(0.3)  # what is sent to the worker as well has come by now
    print("worker ended by", worker.poll(), flush=True)
    worker.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
worker.wait()
"""


def test_a_process_that_is_ended_ends_its_workers_itself(tmp_path):
    children, log = study_run.Children(), tmp_path / "log"
    with open(log, "w") as file:
        child = children.start([sys.executable, "-c", WITH_WORKER], stdout=file)
    wait_for(lambda: "ready" in log.read_text())
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(children.wait, child)
        children.stop()
        with pytest.raises(study_run.Stopped):
            waiting.result()
    assert "worker ended by None" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_of_the_study_ends_its_processes_and_it_goes_on_later(
    number, tools, tmp_path, repository
):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(out), str(tools)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        begun = wait_for(lambda: len(starts(out, "*")) == 2 and starts(out, "*"))
        driver.send_signal(number)
        driver.communicate(timeout=60)
        wait_for(lambda: not any(runs_still(pid) for pid, *_ in begun))
    finally:
        driver.kill()
    # As Python ends of an interruption that nobody catches.
    assert driver.returncode == (-9 if number == signal.SIGKILL else -signal.SIGINT)
    assert len(starts(out, "*")) == 2, "the third was begun all the same"
    assert not list(out.rglob("*.part"))
    prints = dict(config="c", code="c", data="d")
    methods = [Method(n, "x.py", ("wait=60",), {**prints, "data": n}, prints) for n in "ab"]
    for each in methods:
        note = read_note(find_run(out, each, 0, False))
        assert "ended" not in note["training"]
        if number == signal.SIGTERM:  # of a start that was interrupted, too
            assert note["training"]["seconds"] > 0
    assert not any(outcome.failed for outcome in run(out, methods, 1, tools))
    assert len(starts(out, "a-*")) == 2


def test_an_interruption_while_jobs_are_handed_out_ends_all(tools, tmp_path, monkeypatch):
    class Interrupted(ThreadPoolExecutor):
        def submit(self, *arguments):
            if starts(tmp_path, "*"):
                raise KeyboardInterrupt
            future = super().submit(*arguments)
            wait_for(lambda: starts(tmp_path, "*"))
            return future

    monkeypatch.setattr(study, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [method(n, f"{n}=1", "wait=9") for n in "ab"], 1, tools)
    assert not list(tmp_path.glob("runs/*/training/ends"))


HOLDER = """
import sys, time
from pathlib import Path
from deeplesion.lock import only_writer
with only_writer(Path(sys.argv[1]), "--out"):
    print(flush=True)
    time.sleep(60)
"""


def test_a_run_that_another_study_is_doing_is_left_alone(tools, tmp_path, repository):
    (job,) = todo_of(tmp_path, [method("a")], 1).jobs
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(job.folder / "run.lock")], stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    try:
        holder.stdout.readline()
        (outcome,) = run(tmp_path, [method("a")], 1, tools)
        assert outcome.failed and "is being written to by another run" in outcome.reason
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with only_writer(job.folder / "run.lock", "--out"):
        pass


def fake_submitit(monkeypatch, fail=""):
    """submitit as far as it is used: jobs are done when they are submitted."""
    seen = {}

    class Submitted:
        def __init__(self, i, work, job):
            self.job_id, self.state = f"77_{i}", "COMPLETED"
            self.paths = types.SimpleNamespace(stderr="/no/such.log")
            self.cancelled, self.error = False, None
            if fail and fail in job.name:
                self.error, self.state = RuntimeError("lost"), "NODE_FAIL"
            else:
                self.value = work(job)

        done = lambda self: True  # noqa: E731
        exception = lambda self: self.error  # noqa: E731
        result = lambda self: self.value  # noqa: E731

    class AutoExecutor:
        def __init__(self, folder, cluster):
            seen.update(folder=folder, cluster=cluster)

        def update_parameters(self, **parameters):
            if "partitoin" in parameters:
                raise NameError("unknown argument partitoin")
            seen.update(parameters=parameters)

        def map_array(self, work, jobs):
            seen.update(work=work)
            return [Submitted(i, work, job) for i, job in enumerate(jobs)]

    module = types.SimpleNamespace(AutoExecutor=AutoExecutor)
    monkeypatch.setitem(sys.modules, "submitit", module)
    return seen


def test_slurm_does_the_same_runs_as_an_array(tools, tmp_path, monkeypatch, capsys):
    seen = fake_submitit(monkeypatch, fail="b, seed")
    out, methods = tmp_path / "out", [method("a"), method("b", "x=1")]
    jobs = todo_of(out, methods, 1).jobs
    parameters = dict(pairs(["slurm_partition=gpu", "timeout_min=60"]))
    values = dict(pairs(["a=1.5", "b=False", "c=0042", "d=None", "e=1:00", "f="]))
    assert values == {"a": 1.5, "b": False, "c": "0042", "d": None, "e": "1:00", "f": ""}
    outcomes = study.run_on_slurm(jobs, tools, out / "slurm", parameters, at_once=8)
    assert seen["cluster"] == "slurm" and seen["folder"] == out / "slurm"
    assert seen["parameters"] == dict(
        name="study", slurm_partition="gpu", timeout_min=60, slurm_array_parallelism=8
    )
    assert [o.reason for o in outcomes] == ["", "NODE_FAIL: RuntimeError"]
    assert "submitted as 77, 2 jobs" in capsys.readouterr().out
    assert len(finished_runs(out, methods[0])) == 1 and not finished_runs(out, methods[1])


def test_slurm_without_submitit_or_with_a_wrong_parameter(tools, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    jobs = todo_of(tmp_path, [method("a")], 1).jobs
    with pytest.raises(UserError, match="submitit: pip install submitit"):
        study.run_on_slurm(jobs, tools, tmp_path, {})
    fake_submitit(monkeypatch)
    with pytest.raises(UserError, match="unknown argument partitoin"):
        study.run_on_slurm(jobs, tools, tmp_path, {"partitoin": "gpu"})
    with pytest.raises(UserError, match="--jobs"):  # submitit would start all of them
        study.run_on_slurm(jobs, tools, tmp_path, {"cluster": "local"}, at_once=2)
    with pytest.raises(UserError, match="name=value, got 'gpu'"):
        dict(pairs(["gpu"]))


def test_gpus_are_those_that_this_process_sees(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2) == ["0", "1"] and visible_gpus(0) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f")
    assert visible_gpus(2) == ["3", "GPU-8f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(0) == []


def test_epochs_are_read_from_the_log_of_the_last_start(tmp_path):
    log = tmp_path / "train.txt"
    assert epochs_of(log) == (0.0, None)
    lines = "# 2026-01-02 03:04:05 train.py\nepoch 1/10  loss 1\nepoch 2/10  loss 1\n"
    log.write_text(lines)
    began = time.mktime(time.strptime("2026-01-02 03:04:05", "%Y-%m-%d %H:%M:%S"))
    os.utime(log, (began + 60, began + 60))
    assert epochs_of(log) == (0.2, 300)
    log.write_text(f"{lines}# 2026-01-02 04:04:05 train.py\n")
    assert epochs_of(log) == (0.2, None)
    log.write_text(f"{lines}# 2026-01-02 04:04:05 train.py\nepoch  3/10  loss 1\n")
    os.utime(log, (began + 3640, began + 3640))
    assert epochs_of(log) == (0.3, 400)


def test_time_left_is_that_of_the_same_method_spread_over_what_runs_at_once(tmp_path):
    jobs = [Job(tmp_path / n, 0, (method(n[0]),)) for n in ("a0", "a1", "b0", "c0")]
    progress = Progress(jobs, 2, 0, {"a": 100.0, "b": 50.0})
    assert progress.time_left() == "02:42"  # (100 + 100 + 50 + 75) / 2
    assert Progress(jobs, 8, 0, {"a": 100.0, "b": 50.0}).time_left() == "01:40"
    progress.begin(jobs[0])
    (tmp_path / "a0").mkdir()
    log = "# 2026-01-02 03:04:05 train.py\n" + "epoch 4/10  loss 1\n"
    (tmp_path / "a0/train.txt").write_text(log)
    assert progress.time_left() == "02:22"  # 40 seconds of the first are over
    # So they are of one that was interrupted and waits for its turn.
    assert Progress(jobs, 2, 0, {"a": 100.0, "b": 50.0}).time_left() == "02:22"
    assert Progress(jobs, 2, 0, {}).time_left() == "not known yet"


def test_the_line_at_a_terminal_is_no_longer_than_that(tmp_path, monkeypatch, capsys):
    """It would be wrapped, and each second's leave a line behind."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    jobs = [Job(tmp_path / n, 0, (method(n * 30),)) for n in "abc"]
    with Progress(jobs, 3, 0, {}) as progress:
        for job in jobs:
            progress.begin(job)
        progress.show()
    lines = [line.rstrip() for line in capsys.readouterr().err.replace("\n", "\r").split("\r")]
    assert max(map(len, lines)) == 59
    assert any(line.startswith("0 of 3 runs, left not known yet: aaa") for line in lines)


def test_a_run_whose_folder_was_removed_when_it_was_done_ends_no_study(tmp_path, capsys):
    job = Job(tmp_path / "gone", 0, (method("a"),))
    with Progress([job], 1, 0, {}) as progress:
        progress.begin(job)
        progress.end(study_run.Outcome(job))
    assert "[1/1] a, seed 0" in capsys.readouterr().out


def test_device_and_memory_of_a_training(tmp_path):
    assert device_of(tmp_path) == {}
    record = tmp_path / "run_1.json"
    record.write_text(json.dumps(dict(environment={"CUDA available": False})))
    assert device_of(tmp_path) == {"device": "CPU"}
    record.write_text(json.dumps(dict(environment={"GPU 0": "NVIDIA H200"})))
    (tmp_path / "t").mkdir()
    (tmp_path / "t/t.log").write_text(
        textwrap.dedent("""
        Epoch(train) [1][20/80]  lr: 1e-3  eta: 0:01  time: 0.1  memory: 812  loss: 2
        Epoch(train) [1][40/80]  lr: 1e-3  eta: 0:01  time: 0.1  memory: 1034  loss: 2
        """)
    )
    assert device_of(tmp_path) == {"device": "NVIDIA H200", "gpu_memory_mb": 1034}
    (tmp_path / "run_2.json").write_text("{")  # no reason to lose the training
    assert device_of(tmp_path)["device"] == "NVIDIA H200"


def test_reports_are_told_all_folders_of_slices(tools, tmp_path):
    run(tmp_path, [replace(method("a"), images=("/x/a b", "/y"))], 1, tools)
    (log,) = tmp_path.glob("runs/*/evaluate.txt")
    assert log.read_text().rstrip().endswith(" --images '/x/a b' --images /y")


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: [],
        lambda note: note.pop("seed"),
        lambda note: note.update(seed="0"),
        lambda note: note.update(tests=[]),
        lambda note: note.update(training=None),
        lambda note: note.update(methods="a"),
        lambda note: note["training"].update(fingerprint=None),
        lambda note: note["training"]["fingerprint"].pop("code"),
        lambda note: note["training"]["fingerprint"].update(code=1),
        lambda note: note["training"].update(seconds="1"),
        lambda note: note["training"].update(ended=None),
        lambda note: note["tests"].update(t=None),
        lambda note: next(iter(note["tests"].values())).pop("fingerprint"),
        lambda note: next(iter(note["tests"].values())).update(seconds=None),
    ],
)
def test_a_note_of_something_else_is_named_and_left_out(tools, tmp_path, capsys, damage):
    run(tmp_path, [method("a")], 2, tools)
    file = next(tmp_path.glob("runs/a-seed0-*/run.json"))
    note = read_note(file.parent)
    changed = damage(note)
    file.write_text(json.dumps(changed if changed == [] else note))
    with pytest.raises(UserError, match="no note of a study's run: remove its folder"):
        read_note(file.parent)
    assert todo_of(tmp_path, [method("a")], 2).done == 1
    assert [each["seed"] for each in finished_runs(tmp_path, method("a"))] == [1]
    assert known_seconds(tmp_path).keys() == {"a"}
