"""Whole files or none: two writers, crashes, file systems that cannot sync, full disks."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deeplesion import files
from deeplesion.errors import WriteError
from deeplesion.files import parse_json, write_whole
from mmdet_ext.checkpoint import load_checkpoint_file, save_checkpoint_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_that_cannot_sync(code, tmp_path, monkeypatch):
    """CIFS, FUSE and VirtualBox answer so; the file is whole."""

    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_whole(tmp_path / "new" / "a.txt", "text")
    assert (tmp_path / "new" / "a.txt").read_text() == "text"
    assert names(tmp_path / "new") == ["a.txt"]


def test_a_disk_that_fails_to_sync_is_told(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(WriteError, match=r"a\.txt: Input/output error"):
        write_whole(tmp_path / "a.txt", "text")


def test_without_locks_and_folders_that_open_as_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files.os, "name", "nt")
    path = os.path.join(tmp_path, "a.txt")

    def replace(source, target):  # Windows renames no open file
        held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                if os.path.islink(f"/proc/self/fd/{fd}")]  # fmt: skip
        assert str(source) not in held
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    write_whole(type(tmp_path)(path), b"12")
    assert names(tmp_path) == ["a.txt"]


def full(code=errno.ENOSPC):
    """A file that takes 1000 bytes."""
    taken = 0

    class Full(files.io.FileIO):
        def write(self, data):
            nonlocal taken
            taken += len(data)
            if taken > 1000:
                raise OSError(code, os.strerror(code))
            return super().write(data)

    return Full


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence_with_path_and_sizes(code, tmp_path, monkeypatch):
    write_whole(tmp_path / "a.bin", b"former")
    monkeypatch.setattr(files.io, "FileIO", full(code))
    with pytest.raises(WriteError) as error:
        write_whole(tmp_path / "a.bin", bytes(2_500_000))
    text = str(error.value)
    assert text.startswith(f"cannot write {tmp_path / 'a.bin'}: {os.strerror(code)}")
    assert "It needs 2.5 MB" in text and "free there" in text and "Make room" in text
    assert "\n" not in text and error.value.errno == code
    assert names(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"former"


def test_a_checkpoint_on_a_full_disk_too(tmp_path, monkeypatch):
    """torch's own words are 'unexpected pos 1276864 vs 1276768'."""
    monkeypatch.setattr(files.io, "FileIO", full())
    with pytest.raises(WriteError, match="No space left on device"):
        save_checkpoint_file({"state_dict": {"a": torch.zeros(100_000)}}, tmp_path / "a.pth")
    assert names(tmp_path) == []


def test_errors_of_what_is_written_stay_what_they_are(tmp_path):
    def content(file):
        file.write(b"1")
        raise KeyError("ours")

    with pytest.raises(KeyError):
        write_whole(tmp_path / "a", content)
    assert names(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*a/b.txt: "):
        write_whole(tmp_path / "a" / "b.txt", "1")


def test_what_a_crash_left_is_written_over(tmp_path):
    (tmp_path / "a.txt.part").write_bytes(b"half of a longer text")
    write_whole(tmp_path / "a.txt", "text")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "text"


WRITER = """
import sys
from pathlib import Path
from mmdet_ext.checkpoint import save_checkpoint_file
import torch
for i in range(40):
    weights = torch.full((200_000,), float(sys.argv[2]))
    save_checkpoint_file({"state_dict": {"a": weights}}, Path(sys.argv[1]))
"""


def test_two_processes_write_one_path_and_every_file_seen_is_whole(tmp_path):
    """With one temporary name for both, 30 of 80 writes failed and 24 files were damaged."""
    path = tmp_path / "a.pth"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), number], env=environment)
        for number in "12"
    ]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            weights = load_checkpoint_file(path)["state_dict"]["a"]
            assert weights.unique().tolist() in ([1.0], [2.0])
            seen += 1
    assert [writer.wait() for writer in writers] == [0, 0] and seen
    assert names(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_of_any_encoding(encoding):
    said = {"name": "Müller \U0001f9e0", "numbers": [1, 2.5, None]}
    for ascii in (True, False):
        assert parse_json(json.dumps(said, ensure_ascii=ascii).encode(encoding)) == said


@pytest.mark.parametrize(
    "content", [b'"\\ud800"', b'{"\\uDFFFx": 1}', b'"\xed\xa0\x80"', b"{", b""]
)
def test_json_that_could_not_be_written_again_is_refused(content):
    with pytest.raises(ValueError):
        parse_json(content)
