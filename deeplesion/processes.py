"""The same work on many items, by several processes; and no process that outlives the one it works
for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any

import cv2

from deeplesion.errors import UserError


def in_processes(
    work: Callable, tasks: Sequence, workers: int, chunksize: int = 4
) -> Iterator[Any]:
    """Yield work(task) in the order of the tasks; when closed early, drop those not yet begun.

    With one worker, or one task, in this process. Else processes are spawned, each of which takes
    `chunksize` tasks at a time: call it from under `if __name__ == "__main__"`. Raises UserError if
    a process was killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(work, tasks)
        return
    # Spawned, not forked: OpenCV's threads do not survive a fork.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield from executor.map(work, tasks, chunksize=chunksize)
    except BrokenExecutor:
        raise UserError(
            "a worker process was killed, perhaps for want of memory. Run again with fewer"
            " --workers; what is finished is kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def available_cores() -> int:
    """The cores this process may use, which a job scheduler may have made fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    cv2.setNumThreads(1)
    # Ctrl-C reaches every process of the terminal: only the parent is to act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Ends this process within a second or two of the one that started it, however that ends.

    A parent that was killed (kill -9, a lack of memory) cannot say so, and a child that waits for
    it, or for a full pipe that nobody reads any more, would wait for ever and keep its memory and
    its files. For processes of `multiprocessing`, spawned or forked, and for those of a launcher.
    """
    # A thread of its own: the others may be blocked. The number of the parent is asked for, since a
    # pipe from the parent, multiprocessing's way to tell, is inherited by whoever is forked later
    # and then does not close. A Windows process keeps its parent's number; there nothing is forked.
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def _watch_parent(number: int) -> None:
    parent = multiprocessing.parent_process()
    while os.getppid() == number and (parent is None or parent.is_alive()):
        time.sleep(1)
    os._exit(1)


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM, by which schedulers and `kill` end a process, ends this one as Ctrl-C does.

    Raises KeyboardInterrupt in the main thread: what is open is closed and children are ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
