"""Training stops at the first loss that is not a number, before it is logged or saved."""

from __future__ import annotations

import math

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops at a NaN or infinite loss, with the iteration, learning rate and files of the batch.

    Looked at in every iteration: mmengine waits for the value anyway, to keep it for the log. Of
    several processes the one that has such a loss ends, and its launcher ends the others.
    """

    priority = "ABOVE_NORMAL"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Raises FloatingPointError."""
        if math.isfinite(outputs["loss"].item()):
            return
        values = {name: value.item() for name, value in outputs.items() if "loss" in name}
        bad = ", ".join(f"{name} = {v}" for name, v in values.items() if not math.isfinite(v))
        rates = sorted({rate for rates in runner.optim_wrapper.get_lr().values() for rate in rates})
        files = ", ".join(sample.img_path for sample in data_batch["data_samples"])
        raise FloatingPointError(
            f"training stopped, the loss is not finite: {bad}\n"
            f"  iteration {runner.iter + 1} (epoch {runner.epoch + 1}, batch {batch_idx + 1}), "
            f"process {get_rank()}\n"
            f"  learning rate {', '.join(f'{rate:g}' for rate in rates)}\n"
            f"  images {files}\n"
            "The last checkpoint was saved before. Look at these images first; else lower the "
            "learning rate, lengthen the warm-up, or train without --amp."
        )
