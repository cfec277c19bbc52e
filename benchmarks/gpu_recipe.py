"""The recipe of an experiment on a GPU, for as long as it takes to see that it runs as on a CPU:
losses of the same iterations beside the CPU's, images a second, memory.

Without a GPU it runs on the CPU, which tries the script and measures nothing of use.
"""

from __future__ import annotations

import gc
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, distributed, nn
from torch.nn.modules._functions import SyncBatchNorm as SyncBatchNormFunction

from deeplesion.data.prepare import prepare
from deeplesion.errors import MissingDataError, UserError
from deeplesion.phantom.make import make_phantom
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.runner import ResumableRunner

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "alignshift_7slice"
SEED = 0
# Without pretrained weights the maps that reach the heads are of no scale: the neck normalises.
RANDOM_WEIGHTS = {"model.backbone.init_cfg": None, "model.neck.norm_cfg": dict(type="BN")}


def results(
    iterations: int = 200,
    reference: int = 5,
    size: int = 512,
    batch: int = 8,
    weights: str | None = None,
    experiment: str = EXPERIMENT,
    root: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[dict]:
    """Trains with the experiment's schedule, samples and checkpointing: first on the CPU, then on
    the GPU (if there is one) in float32 and in mixed precision, through the path of several
    processes, with BatchNorm synchronised.

    All start from the same weights, see the same batches and draw the same numbers in sampling
    anchors and RoIs.

    Args:
        iterations: on the GPU. reference: of these on the CPU, before.
        size, batch: pixels of an image's side, and the total batch.
        weights: file of torchvision's DenseNet-121 (densenet121-a639ec97.pth); None: random ones,
            with BatchNorm in the neck.
        experiment: name of a config in configs/.
        root: a prepared data set; default: a phantom of that size.
        overrides: as --cfg-options, above all others.

    Returns:
        one of each run: `name`; `device`; `losses`, `seconds` of each iteration; `differences` of
        its losses from the CPU's, relative; `images_per_second` and `waiting`, the part of the time
        that it waits for data (medians without the first iterations); `peak_bytes` on a GPU. A run
        that failed has `error` instead of what it did not come to.

    Raises UserError, before any work, for arguments that cannot be.
    """
    if not 1 <= reference <= iterations:
        raise UserError(f"--reference must be 1 to --iterations ({iterations}), got {reference}")
    if batch < 1:
        raise UserError(f"--batch must be at least 1, got {batch}")
    if weights and not Path(weights).is_file():
        raise MissingDataError(f"--weights {weights}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            root = Path(folder) / "DeepLesion"
            make_phantom(root, patients=24, size=size)
            prepare(root)
        pretrained = {"model.backbone.init_cfg.checkpoint": weights}
        options = {
            **(pretrained if weights else RANDOM_WEIGHTS),
            "resize.size": size,
            "train_dataloader.batch_size": batch,
            **(overrides or {}),
        }
        start = Path(folder) / "start.pth"

        def run(name: str, number: int, device: str, **how) -> dict:
            config = configuration(experiment, root, Path(folder) / name, number, options)
            return train(config, name, device, start, **how)

        found = [run("CPU", reference, "cpu")]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found.append(run("float32", iterations, device, joined=True))
        if device == "cuda":  # mmengine has mixed precision on GPUs alone
            found.append(run("AMP", iterations, device, joined=True, amp=True))
    for result in found[1:]:
        pairs = zip(result["losses"], found[0]["losses"])
        result["differences"] = [abs(ours - theirs) / theirs for ours, theirs in pairs]
    return found


def configuration(
    experiment: str, root: Path, work_dir: Path, iterations: int, overrides: Mapping[str, Any]
) -> Config:
    """An experiment that ends after so many iterations and neither validates nor saves."""
    path = ROOT / "configs" / f"{experiment}.py"
    config = load_config(str(path), dict(overrides), str(work_dir))
    config.train_dataloader.dataset.data_root = str(root)
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations)
    config.val_dataloader = config.val_cfg = config.val_evaluator = None
    config.test_dataloader = config.test_cfg = config.test_evaluator = None
    config.default_hooks.checkpoint = None
    config.visualizer.vis_backends = []
    config.randomness = dict(seed=SEED)
    config.experiment_name = work_dir.name + str(time.time_ns())  # mmengine's logs go by it
    return config


def train(
    config: Config, name: str, device: str, start: Path, joined: bool = False, amp: bool = False
) -> dict:
    """One run from the weights in `start`, which the first one leaves there."""
    if amp:
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    recorder = Recorder(start)
    error = None
    with process_group_of_one(config) if joined else nullcontext(), on_device(device):
        runner = ResumableRunner.from_cfg(config)
        runner.register_hook(recorder, priority="VERY_LOW")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            runner.train()
        except (torch.cuda.OutOfMemoryError, FloatingPointError) as failure:
            error = str(failure)
    result = dict(
        name=name,
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        batch=config.train_dataloader.batch_size,
        losses=recorder.losses,
        seconds=recorder.seconds,
        norms=sorted({type(m).__name__ for m in runner.model.modules() if is_norm(m)}),
    )
    measured = slice(min(20, len(recorder.seconds) // 2), None)
    if seconds := recorder.seconds[measured]:
        result["images_per_second"] = result["batch"] / statistics.median(seconds)
        waited = zip(recorder.waited[measured], seconds)
        result["waiting"] = statistics.median(wait / whole for wait, whole in waited)
    if device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        del runner
        gc.collect()  # runner and hooks hold each other
        torch.cuda.empty_cache()
    return result if error is None else {**result, "error": error}


class Recorder(Hook):
    """Notes the loss and the time of each iteration; all runs start alike.

    Args:
        start: weights to start from; where there are none yet, this run's are written there.
    """

    def __init__(self, start: Path) -> None:
        self.start = start
        self.losses: list[float] = []
        self.seconds: list[float] = []  # from the end of an iteration to that of the next
        self.waited: list[float] = []  # of them, for data

    def before_train(self, runner: Runner) -> None:
        model = getattr(runner.model, "module", runner.model)
        if self.start.exists():
            model.load_state_dict(torch.load(self.start, map_location="cpu", weights_only=True))
        else:
            torch.save(model.state_dict(), self.start)
        # On a GPU the weights were drawn there: the CPU's generator, which samples anchors and
        # RoIs on either, would be elsewhere.
        torch.manual_seed(SEED)
        self.last = time.perf_counter()

    def before_train_iter(self, *args, **kwargs) -> None:
        self.waited.append(time.perf_counter() - self.last)

    def after_train_iter(self, *args, outputs: Mapping[str, Tensor], **kwargs) -> None:
        self.losses.append(float(outputs["loss"].detach()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


@contextmanager
def process_group_of_one(config: Config) -> Iterator[None]:
    """What a launcher would start with one process; there torch's SyncBatchNorm would not
    synchronise, which it is made to do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = dict(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    config.launcher = "pytorch"
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(nn.SyncBatchNorm, "forward", synchronised),
    ):
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield
        finally:
            distributed.destroy_process_group()


def synchronised(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """SyncBatchNorm's forward pass in training as several processes have it."""
    norm.num_batches_tracked.add_(1)
    return SyncBatchNormFunction.apply(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.momentum,
        distributed.group.WORLD,
        distributed.get_world_size(),
    )


def on_device(device: str) -> Any:
    """Has mmengine's runner train there, not on the first GPU that it finds."""
    return mock.patch("mmengine.runner.runner.get_device", return_value=device)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def format_results(found: Sequence[dict]) -> str:
    """A table of `results`."""
    lines = [f"{'run':<10}{'device':<26}{'images/s':>9}{'waits':>7}{'GiB':>7}  loss, first to last"]
    lines.append("-" * 90)
    for result in found:
        memory = f"{result['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in result else "-"
        rate = f"{result['images_per_second']:.2f}" if "images_per_second" in result else "-"
        waiting = f"{result['waiting']:.0%}" if "waiting" in result else "-"
        losses = [f"{result['losses'][i]:.4f}" for i in (0, -1)] if result["losses"] else []
        lines.append(
            f"{result['name']:<10}{result['device']:<26}{rate:>9}{waiting:>7}{memory:>7}  "
            + " .. ".join(losses)
            + f" ({len(result['losses'])} iterations, {', '.join(result['norms'])})"
        )
        if result.get("differences"):
            differences = " ".join(f"{100 * d:.3g}" for d in result["differences"])
            lines.append(f"  loss off the CPU's by, %: {differences}")
        if "error" in result:
            lines.append(f"  FAILED: {result['error']}")
    return "\n".join(lines)
