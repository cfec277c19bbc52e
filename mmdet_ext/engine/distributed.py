"""Several processes: joining them, on GPUs or the CPU; what becomes of BatchNorm, and of the
learning rate when the total batch is another one."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed, nn
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from deeplesion.processes import end_with_parent

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
        "MASTER_ADDR": address,
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(15000 + int(slurm["SLURM_JOB_ID"]) % 10000),
    }


def settle_learning_rate(config: Config, scale: bool = False) -> tuple[str, int]:
    """Compares the total batch with the one the learning rate is meant for, and may scale it.

    The total batch is processes x `train_dataloader.batch_size` x `optim_wrapper.
    accumulative_counts`; the learning rate is meant for `auto_scale_lr.base_batch_size`. With
    `scale` (or `auto_scale_lr.enable`) it is multiplied by their ratio (Goyal et al., "Accurate,
    Large Minibatch SGD", 2017, section 2.1), and `config` then says so.

    Returns:
        a sentence for the log, and its level: a warning where the two differ and nothing is scaled.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    images = config.train_dataloader.batch_size
    accumulated = config.optim_wrapper.get("accumulative_counts", 1)
    total = processes * images * accumulated
    batch = f"total batch {total} = {processes} process(es) x {images} image(s)"
    batch += f" x {accumulated} accumulated" if accumulated > 1 else ""

    rule = config.get("auto_scale_lr", {})
    base, optimizer = rule.get("base_batch_size", total), config.optim_wrapper.optimizer
    meant, scaled = optimizer.lr, optimizer.lr * total / base
    if total == base:
        return f"{batch}, learning rate {meant:g}", logging.INFO
    if not (scale or rule.get("enable")):
        return (
            f"{batch}, but learning rate {meant:g} is meant for {base}. --auto-scale-lr makes it "
            f"{scaled:g}; train_dataloader.batch_size and optim_wrapper.accumulative_counts change "
            "the batch"
        ), logging.WARNING
    optimizer.lr = scaled
    # Done: neither mmengine nor a run from the saved config is to scale again.
    config.auto_scale_lr = dict(enable=False, base_batch_size=total)
    return f"{batch}: learning rate {meant:g} scaled to {scaled:g}", logging.INFO
