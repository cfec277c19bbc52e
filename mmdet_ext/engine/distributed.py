"""Several processes: joining them, on GPUs or the CPU; what becomes of BatchNorm; each one's share
of the total batch, and the learning rate when that is another one."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed, nn
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from deeplesion.processes import end_with_parent
from mmdet_ext.config.check import ConfigError

PLAIN_BATCH_NORM = (
    "BatchNorm is not synchronised: torch's SyncBatchNorm has no CPU path. Each process normalises "
    "by its own images; running statistics are averaged after every epoch."
)

# Seconds that a process which lost another leaves the launcher to end it.
PATIENCE = 10


@MODEL_WRAPPERS.register_module()
class DataParallelDetector(MMDistributedDataParallel):
    """The model of several processes, on GPUs or on the CPU, from one config.

    Gradients are averaged over the processes. On GPUs every BatchNorm layer becomes torch's
    SyncBatchNorm, which normalises by the images of all; on the CPU it stays as it is, with one
    warning. Names and shapes in a checkpoint are the same either way.

    Args:
        module: on the device it is to run on.
        device_ids: as mmengine gives them; of no use on the CPU.
        sync_bn: False leaves BatchNorm as it is on GPUs too.
        options: of torch's DistributedDataParallel.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: list[int] | None = None,
        sync_bn: bool = True,
        **options,
    ) -> None:
        on_gpu = next(module.parameters()).is_cuda
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
        if sync_bn and norms and on_gpu:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        elif sync_bn and norms:
            print_log(PLAIN_BATCH_NORM, "current", logging.WARNING)  # shown by process 0
        # Running statistics are never sent about in training: SyncBatchNorm keeps them equal,
        # SyncBuffersHook averages those of plain layers before they are used or saved.
        options.setdefault("broadcast_buffers", False)
        super().__init__(module, device_ids=device_ids if on_gpu else None, **options)


def join_processes(config: Config) -> None:
    """Joins the processes that torchrun or srun started as `config.launcher` says.

    GPUs talk through `env_cfg.dist_cfg.backend`, the CPU through gloo (mmengine's own start-up
    gives every process a GPU, whether there is one or not). Does nothing for launcher 'none', and
    nothing the second time.

    Raises:
        SystemExit: the launcher's variables are missing, or there are more processes than GPUs.
    """
    launcher = config.get("launcher", "none")
    if launcher == "none" or distributed.is_initialized():
        return
    end_with_parent()  # torchrun, if it is killed, cannot end its processes
    if launcher == "slurm":
        os.environ.update(slurm_variables(os.environ))
    missing = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise SystemExit(
            f"--launcher {launcher} lacks the variables {', '.join(sorted(missing))}, which "
            "torchrun sets: start with scripts/dist_train.sh or scripts/dist_test.sh. One process "
            "needs no launcher"
        )
    options = dict(config.get("env_cfg", {}).get("dist_cfg", {}))
    backend = options.pop("backend", "nccl")
    if "timeout" in options:
        options["timeout"] = timedelta(seconds=options["timeout"])
    if torch.cuda.is_available():
        gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if gpu >= gpus:
            raise SystemExit(f"process {gpu} of this machine has no GPU: it has {gpus}")
        torch.cuda.set_device(gpu)
    else:
        backend = "gloo"
    distributed.init_process_group(backend, **options)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """`--launcher` of a command that several processes may run."""
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        default="none",
        help="set by scripts/dist_train.sh, dist_test.sh and slurm_train.sh, which start several "
        "processes",
    )


def launched(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a command: of several processes the one that failed has the last word.

    torchrun ends with the error of the process that failed first, if it is told. The others, which
    merely lost that one, wait to be ended instead of covering its message with their own.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except (Exception, SystemExit) as error:
            if isinstance(error, distributed.DistError) or "/gloo/" in str(error):
                time.sleep(PATIENCE)
            elif not isinstance(error, SystemExit) or error.code:
                ErrorHandler().record_exception(error)
            raise

    return run


def slurm_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun from those that srun gives a process.

    Process 0 is on the first node of the list; the port, unless MASTER_PORT says otherwise, is made
    of the job's number, so that jobs sharing a node do not meet.

    Raises:
        SystemExit: srun did not start this process.
    """
    if "SLURM_PROCID" not in slurm:
        raise SystemExit("--launcher slurm: not started by srun; use scripts/slurm_train.sh")
    address = slurm.get("MASTER_ADDR")
    if not address:
        nodes = ["scontrol", "show", "hostnames", slurm["SLURM_NODELIST"]]
        address = subprocess.check_output(nodes, text=True).split()[0]
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": tasks_of_node(slurm),
        "MASTER_ADDR": address,
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(15000 + int(slurm["SLURM_JOB_ID"]) % 10000),
    }


def tasks_of_node(slurm: Mapping[str, str]) -> str:
    """How many processes srun started on this node: the number of the node in a list such as
    '8(x2),4', which is 8, 8 and 4; of a job without that list what was asked for, or 1."""
    counts: list[str] = []
    for part in filter(None, slurm.get("SLURM_TASKS_PER_NODE", "").split(",")):
        count, _, nodes = part.rstrip(")").partition("(x")
        counts += [count] * int(nodes or 1)
    node = int(slurm.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else slurm.get("SLURM_NTASKS_PER_NODE", "1")


def images_per_process(config: Config) -> int:
    """Images that a process takes an iteration: the total batch over processes and accumulation.

    The total batch, `train_dataloader.batch_size`, is the images of one update of the weights, in
    `optim_wrapper.accumulative_counts` iterations of all processes.

    Raises:
        ConfigError: it does not divide, with the numbers that would; a number that is no whole one
            from 1 on.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    total = _whole("train_dataloader.batch_size", config.train_dataloader.get("batch_size"))
    accumulated = _whole("optim_wrapper.accumulative_counts", accumulative_counts(config))
    parts = processes * accumulated
    if total % parts == 0:
        return total // parts
    nearest = [n * parts for n in (total // parts, total // parts + 1) if n]
    share = f"{processes} process(es)"
    share += f" x optim_wrapper.accumulative_counts={accumulated}" if accumulated > 1 else ""
    fitting = [n for n in range(1, total + 1) if total % (n * accumulated) == 0]
    message = f"train_dataloader.batch_size={total} is the total batch, and {share} cannot share it"
    if fitting:
        message += f". It fits {_listed(fitting)} process(es)"
        message += f" x {accumulated}" if accumulated > 1 else ""
    raise ConfigError(
        f"{message}; {share} can share {_listed(nearest)} (with --auto-scale-lr, or "
        "auto_scale_lr.base_batch_size= the same number if the learning rate is meant for it)"
    )


def accumulative_counts(config: Config) -> int:
    return config.optim_wrapper.get("accumulative_counts", 1)


def schedules_of(setting: Any) -> Any:
    """The schedules of `param_scheduler`, of which one may stand there without a list."""
    return [setting] if isinstance(setting, dict) and "type" in setting else setting or []


def _whole(option: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{option} must be a whole number from 1 on, got {value!r}")
    return value


def _listed(numbers: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))


def settle_learning_rate(config: Config, scale: bool = False) -> str:
    """Compares the total batch with the one the learning rate is meant for, and may scale it.

    The learning rate is meant for a total batch of `auto_scale_lr.base_batch_size` images. With
    `scale` (or `auto_scale_lr.enable`) it is multiplied by their ratio (Goyal et al., "Accurate,
    Large Minibatch SGD", 2017, section 2.1), and `config` then says so.

    Returns:
        a sentence for the log.

    Raises:
        ConfigError: the total batch is another one and nothing says that this is meant, or the
            processes cannot share it; an option that is no number, or not from 1 on.
    """
    images, total = images_per_process(config), config.train_dataloader.batch_size
    accumulated = accumulative_counts(config)
    batch = (
        f"total batch {total} = {total // (images * accumulated)} process(es) x {images} image(s)"
    )
    batch += f" x {accumulated} accumulated" if accumulated > 1 else ""

    rule, optimizer = config.get("auto_scale_lr") or {}, config.optim_wrapper.optimizer
    base = _whole("auto_scale_lr.base_batch_size", rule.get("base_batch_size", total))
    if not isinstance(meant := optimizer.get("lr"), (int, float)):
        raise ConfigError(f"optim_wrapper.optimizer.lr must be a number, got {meant!r}")
    scaled = meant * total / base
    if total == base:
        return f"{batch}, learning rate {meant:g}"
    if not (scale or rule.get("enable")):
        raise ConfigError(
            f"train_dataloader.batch_size={total} is the total batch, whatever the number of "
            f"processes, but learning rate {meant:g} is meant for {base}. Leave it at {base} "
            "(optim_wrapper.accumulative_counts=N lets N times fewer images into memory at once), "
            f"or say what is meant: --auto-scale-lr makes the learning rate {scaled:g}, "
            f"--cfg-options auto_scale_lr.base_batch_size={total} keeps it"
        )
    optimizer.lr = scaled
    # Done: neither mmengine nor a run from the saved config is to scale again.
    config.auto_scale_lr = dict(enable=False, base_batch_size=total)
    return f"{batch}: learning rate {meant:g} scaled to {scaled:g}"
