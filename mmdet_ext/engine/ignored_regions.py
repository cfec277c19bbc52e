"""Refuses to train on regions to ignore with a detector that would not ignore them."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmdet_ext.config.check import ConfigError

NOT_IGNORED = (
    "the training data has {number} regions to ignore, and this config does not ignore them "
    "({parts}): they would be learnt as background. Of a two-stage detector set "
    "model.train_cfg.rpn.assigner.type and model.train_cfg.rcnn.assigner.type to IgnoringAssigner, "
    "and their ignore_iof_thr to 0.5, as configs/demo/ignored_regions.py does; others know no such "
    "regions: take another train_dataloader.dataset.ann_file (tools/mine_lesions.py --as labels)"
)


class IgnoredRegionsHook(Hook):
    """Looks before the first iteration; raises ConfigError.

    It is registered by `mmdet_ext.engine.run.build_runner`.
    """

    priority = "VERY_HIGH"  # before anything is said of the run

    def before_train(self, runner: Runner) -> None:
        metainfo = getattr(runner.train_dataloader.dataset, "metainfo", {})
        number = metainfo.get("ignored_regions", 0)
        if number and (parts := not_ignoring(runner.model)):
            raise ConfigError(NOT_IGNORED.format(number=number, parts=", ".join(parts)))


def not_ignoring(model: nn.Module) -> list[str]:
    """The parts of a detector that would learn from regions to ignore as from background."""
    found, parts = [], 0
    for name, module in model.named_modules():
        for option in ("assigner", "bbox_assigner"):
            assigners = getattr(module, option, None)
            for assigner in assigners if isinstance(assigners, (list, tuple)) else [assigners]:
                parts += assigner is not None
                if assigner is not None and getattr(assigner, "ignore_iof_thr", -1) <= 0:
                    found.append(f"{type(assigner).__name__} of {name}")
    return found if parts else ["the detector has no assigner"]
