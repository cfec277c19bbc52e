"""When checkpoints are saved and which are kept; training stops at a loss that is not a number."""

from __future__ import annotations

import math
from pathlib import Path

from mmengine.dist import get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from deeplesion.errors import UserError
from deeplesion.files import write_whole
from mmdet_ext.checkpoint import LAST_CHECKPOINT
from mmdet_ext.config.check import ConfigError


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
