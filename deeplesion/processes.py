"""The same work on many items, by several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any

import cv2

from deeplesion.errors import UserError


def in_processes(work: Callable, tasks: Sequence, workers: int) -> Iterator[Any]:
    """Yield work(task) in the order of the tasks; when closed early, drop those not yet begun.

    With one worker, or one task, in this process. Else processes are spawned: call it from under
    `if __name__ == "__main__"`. Raises UserError if a process was killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(work, tasks)
        return
    # Spawned, not forked: OpenCV's threads do not survive a fork.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield from executor.map(work, tasks, chunksize=4)
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
    # A parent that was killed cannot say so: without this its workers would wait for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
