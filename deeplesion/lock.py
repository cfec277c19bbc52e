"""One writer a folder: a second one is told who writes there, since when, and leaves it alone."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from deeplesion.errors import DataError
from deeplesion.files import explained

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

# What file systems answer that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
HELD = """{folder} is being written to by another run: {holder}
Wait for it, end it, or write elsewhere ({elsewhere})."""
NOT_KNOWN = """
Whether it still runs cannot be told from here, since the file system there knows no locks{where}.
If it does not, delete {file}."""


class FolderInUse(DataError):
    """Another process writes into a folder."""


@contextlib.contextmanager
def only_writer(file: Path, elsewhere: str) -> Iterator[str | None]:
    """Holds a lock file; yields who held it before and was ended without giving it back, or None.

    The lock is the system's (POSIX record locks, which NFS passes on to its server): it ends with
    its process however that ends, is not inherited by its children, and holds on all machines that
    share the folder. What is in the file is for people, and for file systems without locks: there a
    holder on this machine is looked for by its number, one on another machine is taken to run.

    Args:
        file: the lock file, in the folder that is written to; made, and removed at the end.
        elsewhere: the option by which another place is chosen, for the message.

    Raises:
        FolderInUse: another process holds it.
        WriteError: the file cannot be written.
    """
    while True:
        with explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            locked = _lock(descriptor)
            before = _read(descriptor)
            if locked is False or (locked is None and _may_run(before)):
                raise FolderInUse(_message(file, before, locked, elsewhere))
            # Not if the holder removed it between opening and locking.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        with explained(file):
            _write(descriptor, _this_process())
        yield _describe(before) if before else None
    finally:
        # Removed while it is locked; Windows removes no open files.
        if os.name != "nt":
            file.unlink(missing_ok=True)
        os.close(descriptor)
        if os.name == "nt":
            file.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock could be had; None if the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _this_process() -> dict:
    return dict(
        host=socket.gethostname(),
        pid=os.getpid(),
        began=_began(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=shlex.join(sys.argv),
    )


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's count; numbers of processes are used again."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _may_run(holder: dict) -> bool:
    """Whether a holder may still run, as far as this machine can tell."""
    if not holder:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if os.name == "nt":  # there `os.kill` would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _began(pid) == holder.get("began")


def _read(descriptor: int) -> dict:
    with contextlib.suppress(OSError, ValueError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        content = json.loads(os.read(descriptor, 1 << 16))
        return content if isinstance(content, dict) else {}
    return {}


def _write(descriptor: int, holder: dict) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder, indent=1).encode() + b"\n")


def _describe(holder: dict) -> str:
    said = {key: holder.get(key, "?") for key in ("pid", "host", "since", "command")}
    return "process {pid} on {host}, since {since}: {command}".format(**said)


def _message(file: Path, holder: dict, locked: bool | None, elsewhere: str) -> str:
    described = _describe(holder) if holder else "a process that has just begun"
    text = HELD.format(folder=file.parent, holder=described, elsewhere=elsewhere)
    if locked is None:
        other = holder.get("host") != socket.gethostname()
        where = " and it is on another machine" if other else ""
        text += NOT_KNOWN.format(where=where, file=file) if other or os.name == "nt" else ""
    return text
