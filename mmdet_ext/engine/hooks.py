"""When checkpoints are saved and which are kept; what a schedule counts; training is compared with
sound runs, and stops at a loss that is not a number."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from mmengine.dist import all_reduce, get_rank, is_main_process
from mmengine.hooks import Hook, ParamSchedulerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from deeplesion.errors import UserError
from deeplesion.files import write_whole
from mmdet_ext.checkpoint import LAST_CHECKPOINT
from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.averaging import AveragedWeightsHook  # noqa: F401 it is registered
from mmdet_ext.engine.distributed import accumulative_counts
from mmdet_ext.engine.run_card import plan_of
from mmdet_ext.engine.run_check import (
    CURVES,
    VALIDATION,
    WINDOW,
    Reference,
    causes,
    check,
    medians,
)


@HOOKS.register_module()
class ResumableCheckpointHook(Hook):
    """Saves checkpoints. An old one goes only when the new one is whole on disk.

    Args:
        interval: epochs, or iterations if not `by_epoch`, between checkpoints; the last one is
            always saved. epoch_{n}.pth or iter_{n}.pth in the work directory.
        max_keep_ckpts: how many of these are kept; -1: all.
        save_best: a metric; the weights that were best by it are kept as
            best_{metric}_epoch_{n}.pth (or iter).
        rule: 'greater' or 'less' is better.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int = 1,
        by_epoch: bool = True,
        max_keep_ckpts: int = 2,
        save_best: str | None = None,
        rule: str = "greater",
    ) -> None:
        if rule not in ("greater", "less"):
            raise ValueError(f"rule must be 'greater' or 'less', got {rule!r}")
        self.interval, self.by_epoch, self.max_keep = interval, by_epoch, max_keep_ckpts
        self.save_best, self.rule = save_best, rule

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        if not self.by_epoch and (
            self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner)
        ):
            self._save(runner, f"iter_{runner.iter + 1}.pth")

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch and (
            self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)
        ):
            self._save(runner, f"epoch_{runner.epoch + 1}.pth")

    def _save(self, runner: Runner, name: str) -> None:
        hub, folder = runner.message_hub, Path(runner.work_dir)
        names = [n for n in hub.get_info("checkpoints", []) if n != name] + [name]
        kept = names[-self.max_keep :] if self.max_keep > 0 else names
        hub.update_info("checkpoints", kept)
        runner.logger.info(f"saving {folder / name}")
        runner.save_checkpoint(folder / name)
        if is_main_process():
            write_whole(folder / LAST_CHECKPOINT, str(folder / name))
            for old in names[: -len(kept)]:
                remove(folder, old)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        if self.save_best is None:
            return
        if self.save_best not in metrics:
            raise ConfigError(
                f"default_hooks.checkpoint: save_best={self.save_best!r} is none of "
                f"{sorted(metrics)}, which val_evaluator gives"
            )
        hub, folder = runner.message_hub, Path(runner.work_dir)
        score = float(metrics[self.save_best])
        best = hub.get_info("best_score", -math.inf if self.rule == "greater" else math.inf)
        if not (score > best if self.rule == "greater" else score < best):  # NaN is neither
            return
        step = f"epoch_{runner.epoch}.pth" if self.by_epoch else f"iter_{runner.iter}.pth"
        name, previous = f"best_{self.save_best}_{step}".replace("/", "_"), hub.get_info("best")
        runner.save_checkpoint(folder / name, resumable=False)
        hub.update_info("best_score", score)
        hub.update_info("best", name)
        runner.logger.info(f"best {self.save_best} so far, {score:.4f}: {folder / name}")
        if step in hub.get_info("checkpoints", []):
            self._save(runner, step)  # it is to know of the best, and that validation is done
        if is_main_process() and previous not in (None, name):
            remove(folder, previous)


def remove(folder: Path, name: str) -> None:
    # The name comes from a checkpoint, maybe a stranger's: it is to reach no other folder.
    (folder / Path(name).name).unlink(missing_ok=True)


class LossError(UserError, FloatingPointError):
    """A loss that is not finite: of the data or the options, not of the program."""


@HOOKS.register_module()
class UpdateSchedulerHook(ParamSchedulerHook):
    """mmengine's hook, but what a schedule has in iterations it counts in updates of the weights.

    With accumulated gradients an update takes several iterations; the warm-up is then of as many
    updates, and images, as without.
    """

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        if runner.optim_wrapper.should_update():  # the iteration that is over ended in one
            super().after_train_iter(runner, *args, **kwargs)


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops at a NaN or infinite loss, with the iteration, learning rate and files of the batch.

    Looked at in every iteration: mmengine waits for the value anyway, to keep it for the log. Of
    several processes the one that has such a loss ends, and its launcher ends the others.
    """

    priority = "ABOVE_NORMAL"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Raises LossError."""
        if math.isfinite(outputs["loss"].item()):
            return
        values = {name: value.item() for name, value in outputs.items() if "loss" in name}
        bad = ", ".join(f"{name} = {v}" for name, v in values.items() if not math.isfinite(v))
        rates = sorted({rate for rates in runner.optim_wrapper.get_lr().values() for rate in rates})
        files = ", ".join(sample.img_path for sample in data_batch["data_samples"])
        raise LossError(
            f"training stopped, the loss is not finite: {bad}\n"
            f"  iteration {runner.iter + 1} (epoch {runner.epoch + 1}, batch {batch_idx + 1}), "
            f"process {get_rank()}\n"
            f"  learning rate {', '.join(f'{rate:g}' for rate in rates)}\n"
            f"  images {files}\n"
            "The last checkpoint was saved before. Look at these images first; else lower the "
            "learning rate, lengthen the warm-up, or train without --amp."
        )


@HOOKS.register_module()
class RunCheckHook(Hook):
    """Compares losses, gradient norm and validation with those of sound runs.

    Medians of the last 100 updates go to vis_data/scalars.json as `median/...`, from which
    tools/check_run.py tells at any time how a run goes. After 100 and 500 updates and after each
    epoch and validation a warning is logged if they are out of range. A loss is the mean over the
    processes and the accumulated parts of an update; what it is made of is in the message hub,
    and so in checkpoints.

    Args:
        reference: of a file in mmdet_ext/engine/references, without '.json'; None: nothing is
            compared.
        interval: updates between two lines of medians.
    """

    priority = "LOW"  # when the loss is in the message hub

    def __init__(self, reference: str | None = None, interval: int = 10) -> None:
        self.name, self.interval = reference, interval
        self.reference = None if reference is None else Reference.read(reference)

    def before_train(self, runner: Runner) -> None:
        self._plan = plan_of(runner)
        self._told: set[str] = set()
        self._accumulated = accumulative_counts(runner.cfg)
        if self.reference and (reason := self.reference.misfit(self._plan)):
            runner.logger.info(f"not compared with the sound runs of {self.name!r}: {reason}")
            self.reference = None

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.distributed:
            names = sorted(CURVES & outputs.keys())
            values = torch.stack([outputs[name].detach().float().mean() for name in names])
            all_reduce(values, op="mean")
            for name, value in zip(names, values.tolist()):
                runner.message_hub.update_scalar(f"processes/{name}", value)
        if not runner.optim_wrapper.should_update():
            return
        update = math.ceil((runner.iter + 1) / self._accumulated)
        if is_main_process() and (update % self.interval == 0 or update in (WINDOW, 500)):
            values = self._medians(runner)
            runner.visualizer.add_scalars({f"median/{k}": v for k, v in values.items()}, update)
            if update in (WINDOW, 500):
                self._check(runner, update, values)

    def after_train_epoch(self, runner: Runner) -> None:
        if is_main_process():
            update = max(1, runner.iter // self._accumulated)
            self._check(runner, update, self._medians(runner))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        if is_main_process() and VALIDATION in metrics and hasattr(self, "_plan"):
            update = runner.epoch * self._plan.updates_per_epoch
            self._check(runner, update, {VALIDATION: metrics[VALIDATION]})

    def _medians(self, runner: Runner) -> dict[str, float]:
        scalars, history = runner.message_hub.log_scalars, {}
        for name in CURVES:
            # Gradients are those of all processes anyway.
            part = "processes" if runner.distributed and name != "grad_norm" else "train"
            if f"{part}/{name}" in scalars:
                history[name] = scalars[f"{part}/{name}"].data[0]
        norms = history.pop("grad_norm", None)  # one an update
        found = medians(history, self._accumulated)
        return found | (medians({"grad_norm": norms}) if norms is not None else {})

    def _check(self, runner: Runner, update: int, values: dict[str, float]) -> None:
        findings = check(self.reference, self._plan, update, values) if self.reference else []
        if findings:
            lines = [f"this run is not as sound runs of {self.name!r} were:", *map(str, findings)]
            new = [line for line in causes(findings) if line not in self._told]
            self._told.update(new)
            lines += ["usual causes:", *new] if new else []
            runner.logger.warning("\n  ".join(lines))
