"""The processes that load data: none outlives its run, and none is waited for for ever."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from deeplesion.lock import FolderInUse
from mmdet_ext.engine.run import test as run_test
from mmdet_ext.engine.runner import ResumableRunner
from mmdet_ext.engine.workers import PATIENCE, advice_on_lost_batch, guarded

from ..small_training import BY_ITERATION, configuration, log, run

SOON = 20  # seconds, on a busy machine; what is alive then would be alive for ever


def until(condition, seconds=SOON):
    """Waits for a condition; whether it came true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


# A training that is killed


# Masks of a batch, a byte a pixel, are more than a pipe holds.
LARGE = {
    **BY_ITERATION,
    "resize.size": 256,
    "train_dataloader.batch_size": 2,
    "auto_scale_lr.base_batch_size": 2,
}


@pytest.fixture
def training(repository, phantom, tmp_path):
    """A training with two workers, in the middle of an epoch and with a checkpoint saved."""
    options = {**LARGE, "train_cfg.max_epochs": 1000, "train_dataloader.num_workers": 2}
    config = configuration(repository, phantom, tmp_path / "run", **options)
    config.dump(tmp_path / "config.py")
    command = [sys.executable, "tools/train.py", str(tmp_path / "config.py")]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    # Not a pipe: a process that is left would hold it open.
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            command, cwd=repository, env=environment, stdout=output, stderr=output
        )
    try:
        assert until(lambda: list(tmp_path.glob("run/iter_*.pth")), 120), "nothing was trained"
        yield process, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def test_a_work_directory_has_one_writer(training, repository, phantom, tmp_path):
    """A second training is told of the first; a test beside it runs; a killed one's place is
    taken."""
    process, _ = training
    folder = tmp_path / "run"
    written = {f.name for f in folder.iterdir()}
    with pytest.raises(FolderInUse) as refused:
        run(repository, phantom, folder, **LARGE)
    said = str(refused.value)
    assert f"{folder} is being written to" in said and f"process {process.pid} on" in said
    assert "--work-dir" in said
    assert not [f for f in folder.iterdir() if f.is_dir() and f.name not in written], "no log of it"
    run_test(configuration(repository, phantom, folder, **LARGE), str(folder))
    assert (folder / "results.json.gz").exists() and not list(folder.glob("results*.lock"))
    process.kill()
    process.wait()
    run(repository, phantom, folder, "auto", **LARGE, **{"train_cfg.max_epochs": 1})
    assert re.search(f"WARNING.*was left by process {process.pid} on", log(folder))
    assert not list(folder.glob("*.lock"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_no_process(training, tmp_path, end):
    """Failed before with SIGKILL and SIGTERM: a worker blocked in a pipe that nobody read."""
    process, main = training
    assert until(lambda: len(main.children(recursive=True)) >= 2)
    children = main.children(recursive=True)
    process.send_signal(end)
    assert process.wait(timeout=60) != 0
    _, alive = psutil.wait_procs(children, timeout=SOON)
    for child in alive:
        child.kill()
    assert not alive, alive
    output = (tmp_path / "output").read_text()
    if end != signal.SIGKILL:
        assert "KeyboardInterrupt" in output or "interrupted" in output, output


CHILD = """
import multiprocessing, os, sys, threading, time
from deeplesion.processes import end_with_parent

def child(path):
    end_with_parent()
    open(path + str(os.getpid()), "w").close()
    receiver, sender = multiprocessing.Pipe(False)
    while True:
        sender.send_bytes(bytes(1 << 20))  # nobody reads: blocks for ever

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    for _ in range(2):
        multiprocessing.Process(target=child, args=(sys.argv[1],)).start()
    time.sleep(1000)
"""


@pytest.mark.parametrize(
    "method",
    ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))],
)
def test_children_of_every_kind_end_with_their_parent(repository, tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), str(tmp_path / "pid_"), method]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(repository)})
    try:
        assert until(lambda: len(list(tmp_path.glob("pid_*"))) == 2, 60)
        children = [psutil.Process(int(f.name[4:])) for f in tmp_path.glob("pid_*")]
        assert all(child.is_running() for child in children)
        time.sleep(2.5)
        assert all(child.is_running() for child in children), "only with the parent"
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=SOON)
    assert not alive


LAUNCHED = """
import os, sys, time
from mmengine.config import Config
from mmdet_ext.engine.distributed import join_processes

join_processes(Config(dict(launcher="pytorch")))
open(sys.argv[1] + str(os.getpid()), "w").close()
time.sleep(1000)
"""
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
time.sleep(1000)
"""


def test_processes_of_a_launcher_end_with_it(repository, tmp_path):
    """torchrun, killed, leaves them to themselves."""
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost")
    environment = {**os.environ, **alone, "MASTER_PORT": "0", "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", LAUNCHER, LAUNCHED, str(tmp_path / "pid_")]
    launcher = subprocess.Popen(command, env=environment)
    try:
        assert until(lambda: list(tmp_path.glob("pid_*")), 90)
        (found,) = tmp_path.glob("pid_*")
        child = psutil.Process(int(found.name[4:]))
    finally:
        launcher.kill()
        launcher.wait()
    _, alive = psutil.wait_procs([child], timeout=SOON)
    assert not alive


# A worker that does not deliver


class Numbers(Dataset):
    """Sixteen numbers, of which the sixth worker call does what `fault` says."""

    def __init__(self, fault=None):
        self.fault = fault

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 5 and self.fault:
            self.fault()
        return torch.tensor([index])


class Sleeping:
    def __call__(self):
        time.sleep(1000)


class Dying:
    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Unsendable(Dataset):
    """What a full shared memory does: the batch is made, but handing it over fails."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return Refusing() if index == 5 else torch.tensor([index])


class Refusing:
    def __reduce__(self):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def loader(dataset, **options):
    options = dict(batch_size=2, num_workers=2, **options)
    return ResumableRunner.build_dataloader(
        dict(dataset=dataset, sampler=dict(type="DefaultSampler", shuffle=False), **options),
        seed=0,
    )


def test_workers_deliver(capfd):
    batches = list(loader(Numbers()))
    assert torch.cat([value for batch in batches for value in batch]).tolist() == list(range(16))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "dataset, options, said",
    [
        (Numbers(Sleeping()), dict(timeout=2), "timed out after 2 seconds"),
        (Numbers(Dying()), dict(timeout=20), "killed by signal|exited unexpectedly|Error"),
        (Unsendable(), {}, r"cannot hand over a batch: RuntimeError: unable to write.*\(28\)"),
    ],
    ids=["sleeps", "is killed", "cannot hand over"],
)
def test_a_worker_that_does_not_deliver_ends_the_run(dataset, options, said):
    with pytest.raises(Exception) as lost:
        list(loader(dataset, **options))
    advice = advice_on_lost_batch(lost.value)
    assert re.search(said, advice.splitlines()[0])
    assert "num_workers=0" in advice and "--shm-size" in advice


def test_time_outs_are_the_users_and_none_without_workers():
    assert guarded(dict(num_workers=2))["timeout"] == PATIENCE
    assert guarded(dict(num_workers=2, timeout=7))["timeout"] == 7
    assert guarded(dict(num_workers=2, timeout=0))["timeout"] == 0
    assert "timeout" not in guarded(dict(num_workers=0, timeout=7))
    assert advice_on_lost_batch(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
