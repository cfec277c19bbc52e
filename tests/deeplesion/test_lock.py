"""One writer a folder: two real processes, one that was killed, and file systems without locks."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys

import pytest

from deeplesion import lock
from deeplesion.lock import FolderInUse, only_writer

HOLDER = """
import os, sys, time
from pathlib import Path
from deeplesion.lock import only_writer

with only_writer(Path(sys.argv[1]), "--work-dir"):
    if os.fork() == 0:
        time.sleep(5)  # a child, such as a data loader's worker, inherits no lock
        os._exit(0)
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(file, repository):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.wait()


def no_locks(monkeypatch):
    """The file system answers as NFS without its lock service does."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_the_second_is_told_who_holds_it_since_when(repository, tmp_path, monkeypatch, locks):
    file = tmp_path / "work" / "train.lock"
    if not locks:
        no_locks(monkeypatch)
    with holder(file, repository) as process:
        for _ in range(3):
            with pytest.raises(FolderInUse) as refused, only_writer(file, "--work-dir"):
                pytest.fail("two writers")
            said = str(refused.value)
            assert f"{tmp_path / 'work'} is being written to" in said and "--work-dir" in said
            assert f"process {process.pid} on {socket.gethostname()}, since 20" in said
        # It ends as it should: nothing is left.
        process.communicate("", timeout=10)
        assert not file.exists()
    with only_writer(file, "--work-dir") as before:
        assert before is None


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_what_a_dead_holder_left_is_taken_over(repository, tmp_path, monkeypatch, locks):
    file = tmp_path / "train.lock"
    with holder(file, repository) as process:
        process.kill()
        process.wait()
        assert file.exists()
        if not locks:
            no_locks(monkeypatch)
        with only_writer(file, "--work-dir") as before:
            assert before.startswith(f"process {process.pid} on ")
            assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


def test_a_number_that_another_process_has_now_is_a_dead_holder(tmp_path, monkeypatch):
    no_locks(monkeypatch)
    file = tmp_path / "train.lock"
    parent = os.getppid()
    left = dict(host=socket.gethostname(), pid=parent, began=lock._began(parent), since="then")
    file.write_text(json.dumps(left))
    with pytest.raises(FolderInUse, match=f"process {parent} on"), only_writer(file, "--out"):
        pytest.fail("it runs")
    file.write_text(json.dumps({**left, "began": "1"}))
    with only_writer(file, "--out") as before:
        assert before.startswith(f"process {parent} on")


def test_of_another_machine_only_locks_can_tell(tmp_path, monkeypatch):
    file = tmp_path / "train.lock"
    file.write_text(json.dumps(dict(host="node7", pid=1, since="2026-01-01 00:00:00")))
    with monkeypatch.context() as patch:
        no_locks(patch)
        with pytest.raises(FolderInUse) as refused, only_writer(file, "--out"):
            pytest.fail("not known")
        said = str(refused.value)
        assert "process 1 on node7, since 2026-01-01 00:00:00" in said
        assert "knows no locks" in said and f"delete {file}" in said
    with only_writer(file, "--out") as before:  # the server of the folder gave the lock
        assert "node7" in before


@pytest.mark.parametrize("left", ["", "{", "[]", '{"pid": "x"}'])
def test_whatever_a_crash_left_in_the_file_is_taken_over(tmp_path, left):
    file = tmp_path / "train.lock"
    file.write_text(left)
    with only_writer(file, "--out"):
        assert json.loads(file.read_text())["pid"] == os.getpid()


RACER = """
import sys, time
from pathlib import Path
from deeplesion.lock import FolderInUse, only_writer

file, count = Path(sys.argv[1]), Path(sys.argv[1] + ".count")
for _ in range(200):
    try:
        with only_writer(file, "--out"):
            value = int(count.read_text() or 0)
            time.sleep(0.0005)
            count.write_text(str(value + 1))
            print("x", end="")
    except FolderInUse:
        pass
"""


def test_never_two_at_once(repository, tmp_path):
    """Taken and given back in turns, the file being removed each time."""
    file = tmp_path / "lock"
    (tmp_path / "lock.count").write_text("0")
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", RACER, str(file)]
    racers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    entered = sum(len(process.communicate(timeout=60)[0]) for process in racers)
    assert all(process.returncode == 0 for process in racers)
    assert int((tmp_path / "lock.count").read_text()) == entered >= 10
