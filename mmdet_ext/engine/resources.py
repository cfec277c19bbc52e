"""What a run needs of its machine, looked at before the first iteration: shared memory for batches,
open files, and disk for checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from deeplesion.errors import DataError
from deeplesion.files import size_text
from mmdet_ext.engine.hooks import ResumableCheckpointHook
from mmdet_ext.random_states import kept_random_states

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

SHARED_MEMORY = Path("/dev/shm")  # where torch puts what a worker hands over, on Linux
# A process has some files of its own open: libraries, logs, connections.
OTHER_FILES = 100
TOO_LITTLE_SHARED_MEMORY = """{name} needs {needed} of shared memory, {free} are free in {folder}:
{count} batches of {batch} wait there, and a worker that finds no room cannot hand over its own.
  docker run --shm-size=8g (or --ipc=host)        more of it, in a container
  --cfg-options {name}.num_workers={workers}   fewer batches at once
  --cfg-options {name}.num_workers=0   none: this process loads the data itself"""
TOO_FEW_FILES = (
    "{name}: {process} has up to {needed:,} files open at once (each tensor that waits to be taken "
    "is one), and {limit:,} are allowed. Raise the limit (ulimit -n {needed}), or lower "
    "{name}.{lower}"
)
TOO_LITTLE_DISK = (
    "{folder} has {free} free, and {needed}. Make room, choose another disk (--work-dir), or keep "
    "fewer checkpoints (default_hooks.checkpoint.max_keep_ckpts)"
)


class TooLittle(DataError):
    """The machine has too little of something; nothing has begun yet."""


class ResourcesHook(Hook):
    """Looks before a training or a test whether the machine has what it is going to need.

    Raises TooLittle. What may run short only later, or only if batches come in another order, is a
    warning.

    It is registered by `mmdet_ext.engine.run.build_runner`.
    """

    priority = "LOW"

    def before_train(self, runner: Runner) -> None:
        warnings = [check_loader(runner.train_dataloader, "train_dataloader")]
        if runner.val_loop is not None:
            warnings.append(check_loader(runner.val_dataloader, "val_dataloader"))
        if is_main_process():
            warnings.append(check_disk(runner))
        for warning in filter(None, warnings):
            runner.logger.warning(warning)

    def before_test(self, runner: Runner) -> None:
        if warning := check_loader(runner.test_dataloader, "test_dataloader"):
            runner.logger.warning(warning)


def check_loader(loader: DataLoader, name: str) -> str | None:
    """Raises TooLittle if the workers of a data loader cannot hand over their batches; returns a
    warning if they may not be able to."""
    if not loader.num_workers or not len(loader.dataset):
        return None
    with kept_random_states():
        tensors = list(tensors_in(loader.dataset[0]))
    waiting = min(loader.num_workers * loader.prefetch_factor, len(loader))
    # Processes of one machine share its memory; open files are each one's own.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    images = loader.batch_size or 1
    batch = images * sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    if SHARED_MEMORY.is_dir():
        system = os.statvfs(SHARED_MEMORY)
        free, needed = system.f_bavail * system.f_frsize, processes * waiting * batch
        if needed > free:
            fewer = free // (processes * loader.prefetch_factor * batch)
            raise TooLittle(_little_memory(name, needed, free, processes * waiting, batch, fewer))
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = images * (len(tensors) + 1)  # and the masks
    # A worker holds what it has prefetched; this process what came before its turn.
    for count, process, lower in (
        (loader.prefetch_factor, "a worker", "batch_size"),
        (waiting, "this process", "num_workers"),
    ):
        needed = OTHER_FILES + count * files
        if limit != resource.RLIM_INFINITY and needed > limit:
            said = dict(name=name, process=process, needed=needed, limit=limit, lower=lower)
            if process == "a worker":
                raise TooLittle(TOO_FEW_FILES.format(**said))
            return TOO_FEW_FILES.format(**said)
    return None


def _little_memory(name: str, needed: int, free: int, count: int, batch: int, fewer: int) -> str:
    sizes = dict(needed=size_text(needed), free=size_text(free), batch=size_text(batch))
    text = TOO_LITTLE_SHARED_MEMORY.format(
        name=name, folder=SHARED_MEMORY, count=count, workers=fewer, **sizes
    )
    if fewer:
        return text
    return "\n".join(line for line in text.splitlines() if "fewer batches" not in line)


def tensors_in(sample: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a sample, as a data loader's worker finds them when it hands it over."""
    if isinstance(sample, torch.Tensor):
        yield sample
    elif isinstance(sample, Mapping):
        for value in sample.values():
            yield from tensors_in(value)
    elif isinstance(sample, (list, tuple)):
        for value in sample:
            yield from tensors_in(value)
    elif hasattr(sample, "all_items"):  # mmengine's data elements
        for _, value in sample.all_items():
            yield from tensors_in(value)
    elif isinstance(getattr(sample, "tensor", None), torch.Tensor):  # mmdet's boxes
        yield sample.tensor


def check_disk(runner: Runner) -> str | None:
    """Raises TooLittle if the disk has not the room for one checkpoint; returns a warning if it has
    not that for all that are kept."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, ResumableCheckpointHook)]
    if not hooks:
        return None
    weights = sum(value.nbytes for value in runner.model.state_dict().values())
    if any(isinstance(hook, EMAHook) for hook in runner.hooks):
        weights *= 2  # every checkpoint holds the average and the weights of the last update
    whole = weights + sum(p.nbytes for p in runner.model.parameters()) * moments(runner)
    best = weights if hooks[0].save_best else 0
    folder = Path(runner.work_dir)
    free = shutil.disk_usage(folder).free
    if free < whole + best:
        needed = f"the first checkpoints need {size_text(whole + best)}"
        raise TooLittle(TOO_LITTLE_DISK.format(folder=folder, free=size_text(free), needed=needed))
    kept = hooks[0].max_keep if hooks[0].max_keep > 0 else runner.max_epochs
    # An old one goes when the new one is whole. What is there already is counted as free.
    there = sum(file.stat().st_size for file in folder.glob("*.pth"))
    needed = (kept + 1) * whole + 2 * best
    if free + there < needed:
        text = f"the checkpoints that are kept need {size_text(needed)}"
        return TOO_LITTLE_DISK.format(folder=folder, free=size_text(free), needed=text)
    return None


def moments(runner: Runner) -> int:
    """Numbers that the optimizer keeps for a weight: 2 of Adam's kind, 1 with momentum, else 0."""
    groups = getattr(runner.optim_wrapper, "param_groups", [])
    return max((2 if "betas" in g else int(bool(g.get("momentum"))) for g in groups), default=0)
