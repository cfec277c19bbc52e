"""Files are there as a whole or not at all, a write that fails says why and what to do, and what
is read from JSON can be written again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from deeplesion.errors import UserError, WriteError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

_FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
# What file systems of networks and virtual machines (CIFS, FUSE, VirtualBox) answer where they
# cannot sync: the data is written all the same, only not known to have reached the disk.
_CANNOT_SYNC = (
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR,
    *_READ_ONLY,
)  # fmt: skip


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """Writes to a temporary name beside `path`, then renames; makes the folder if need be.

    Several processes may write one path at once: the last to finish wins, with its whole file.

    `content`: what to write, or a function that writes it to an open binary file.

    Raises WriteError if the system refuses (a full disk, a read-only folder, ...).
    """
    if isinstance(content, str):
        content = content.encode()
    with explained(path, None if callable(content) else len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = _open_temporary(path)
        try:
            with file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                _sync(file.fileno())
                if fcntl:  # while it is locked
                    os.replace(temporary, path)
            if not fcntl:  # Windows renames no open files
                os.replace(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            # What libraries make of a failed write is their own (torch: "unexpected pos").
            if file.failure is not None and isinstance(error, Exception):
                raise file.failure from error
            raise
        # The new name is on disk only when the folder is. Windows cannot open one.
        if os.name != "nt":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                _sync(folder)
            finally:
                os.close(folder)


def check_out_file(out: Path) -> None:
    """For before the work: raises UserError if --out, a file to write, is a folder."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file, which need not exist yet")


def check_out_folder(out: Path) -> None:
    """For before the work: raises UserError if --out, a folder to write to, is a file."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder, which need not exist yet")


@contextlib.contextmanager
def explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns an OSError while `path` is written into a WriteError that says what to do.

    needed: bytes, if they are known.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            size = ""
            with contextlib.suppress(OSError):
                free = size_text(shutil.disk_usage(path.parent).free)
                size = (
                    f" It needs more than the {free} that are free there."
                    if needed is None
                    else f" It needs {size_text(needed)}, {free} are free there."
                )
            text = f"{reason}.{size} Make room (or ask for a larger quota), or write elsewhere"
        elif error.errno in _READ_ONLY:
            text = f"{reason}. Make {path.parent} writable, or write elsewhere"
        elif error.errno == errno.EFBIG:
            text = f"{reason}: the file system there takes no file of this size. Write elsewhere"
        else:
            text = f"{reason}. Check the disk and the path, or write elsewhere"
        raise WriteError(f"cannot write {path}: {text}", error.errno) from error


class _File(io.BufferedWriter):
    """A file that remembers the error with which a write failed."""

    failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def _open_temporary(path: Path) -> tuple[_File, Path]:
    """An empty file beside `path` that no other process writes to."""
    temporary = path.with_name(path.name + ".part")
    # The same name each time, so that what a crash left is written over; the lock, which ends with
    # its process, tells whether someone is writing there now.
    if fcntl:
        file = _File(io.FileIO(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "w"))
        with contextlib.suppress(OSError):  # locked, or no locks on this file system
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not if it was renamed between opening and locking.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
                file.truncate(0)
                return file, temporary
        file.close()
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    return _File(io.FileIO(temporary, "x")), temporary


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def file_sha256(path: str | Path) -> str:
    """Of what is in a file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_text(count: int) -> str:
    """'1.3 GB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,} bytes"


def parse_json(content: bytes) -> object:
    """What JSON of any of Unicode's encodings says. Raises ValueError or RecursionError.

    `json.loads` lets halves of surrogate pairs through, which no file and no file name can hold.
    """
    text = content.decode(json.detect_encoding(content))
    found = json.loads(text)
    if re.search(r"\\u[dD]", text):  # without such an escape all is whole
        json.dumps(found, ensure_ascii=False).encode()
    return found
