"""The processes that load data: each ends with the run that it works for, and a run does not wait
for ever for a batch that none of them can hand over."""

from __future__ import annotations

import functools
import multiprocessing.queues
import re
import traceback
from collections.abc import Callable

from torch._utils import ExceptionWrapper
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from deeplesion.processes import end_with_parent

# Seconds for a batch to come. Far beyond a slow disk: it comes while others are trained on.
PATIENCE = 900
NOT_HANDED_OVER = "a worker of the data loader cannot hand over a batch"
LOST_BATCH = (
    rf"DataLoader timed out|{NOT_HANDED_OVER}|"
    r"DataLoader worker .*(killed by signal|exited unexpectedly)"
)
ADVICE = """{error}
No batch came from the processes that load the data. They lack memory or shared memory, or the disk
under the data hangs.
  --cfg-options train_dataloader.num_workers=0    loads in this process (val_, test_dataloader too)
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
    # A batch that cannot be handed over is lost in a thread of the queue, and waited for in vain.
    # This process' queues, not the run's.
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_the_error
    if start is not None:
        start(worker)


def _hand_over_the_error(queue: multiprocessing.queues.Queue, error: Exception, batch: tuple):
    """Instead of a batch, which is (its number, samples)."""
    reason = "".join(traceback.format_exception_only(error)).strip()
    failure = RuntimeError(f"{NOT_HANDED_OVER}: {reason}")
    queue.put((batch[0], ExceptionWrapper((RuntimeError, failure, None), "in a worker")))


def advice_on_lost_batch(error: Exception) -> str | None:
    """What to do if the data loader lost a worker or waited too long; None for other errors."""
    waiting = _MultiProcessingDataLoaderIter._try_get_data.__code__
    lost = any(frame.f_code is waiting for frame, _ in traceback.walk_tb(error.__traceback__))
    if not lost and not re.search(LOST_BATCH, str(error)):
        return None
    last = str(error).strip().rpartition("\n")[2]
    reason = re.sub("^(Original )?RuntimeError: ", "", last) or type(error).__name__
    return ADVICE.format(error=reason, patience=PATIENCE)
