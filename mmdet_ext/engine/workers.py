"""The processes that load data: each ends with the run that it works for, and a run does not wait
for ever for a batch that none of them can hand over."""

from __future__ import annotations

import functools
import multiprocessing.queues
import os
import re
import sys
import traceback
from collections.abc import Callable

from deeplesion.processes import end_with_parent

# Seconds for a batch to come. Far beyond a slow disk: it comes while others are trained on.
PATIENCE = 900
LOST_BATCH = r"DataLoader timed out|DataLoader worker .*(killed by signal|exited unexpectedly)"
ADVICE = """{error}
No batch came from the processes that load the data. They may lack memory or shared memory, or the
disk under the data hangs; a message of theirs, if there is one, is above.
  --cfg-options train_dataloader.num_workers=0 train_dataloader.persistent_workers=False
                                                  loads in this process (val_, test_dataloader too)
  docker run --shm-size=8g, or --ipc=host         more shared memory in a container
  --cfg-options train_dataloader.timeout=3600     waits longer than {patience} s (0: for ever)"""


def guarded(loader: dict) -> dict:
    """A data loader's config whose workers are bounded in time and tied to this process."""
    if not loader.get("num_workers"):
        # torch refuses a time-out of a process that it would have to interrupt itself.
        return {key: value for key, value in loader.items() if key != "timeout"}
    return {"timeout": PATIENCE, **loader}


def tied(start: Callable[[int], None] | None) -> Callable[[int], None]:
    """A worker_init_fn that ties the worker to this process, then calls `start`."""
    return functools.partial(_start_worker, start)


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    end_with_parent()
    # What a worker cannot hand over, for want of shared memory say, is lost in a thread of its
    # queue and waited for in vain. This process' queues, not the run's.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_hand_over)
    if start is not None:
        start(worker)


def _cannot_hand_over(error: Exception, batch: object) -> None:
    text = "".join(traceback.format_exception_only(error)).strip()
    print(f"a worker of the data loader cannot hand over a batch: {text}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)  # the run hears of the end of its workers


def advice_on_lost_batch(error: RuntimeError) -> str | None:
    """What to do if the data loader lost a worker or waited too long; None for other errors."""
    if not re.search(LOST_BATCH, str(error)):
        return None
    return ADVICE.format(error=error, patience=PATIENCE)
