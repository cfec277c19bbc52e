"""ShapesMetric: Dice and IoU of the ACS paper's proof of concept, in the three ways to count it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric

from mmdet_ext.evaluation.volume_metrics import class_counts, per_batch, per_volume


@METRICS.register_module()
class ShapesMetric(BaseMetric):
    """In percent, of N classes of which the last is the background:

    `dice`, `iou`: of the shapes, per volume, shapes that it does not have left out.
    `paper_dice`, `paper_iou`: of the shapes, over batches of the test set, as the paper says.
    `code_dice`, `code_iou`: of the classes 1 to N - 1, which the paper's code averages: without the
        first shape, and with the background.

    Args:
        batch: samples of a batch, whatever the loader's is.
    """

    default_prefix = "Shapes"

    def __init__(
        self, batch: int = 20, collect_device: str = "gpu", prefix: str | None = None
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.batch = batch

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            labels = (sample[name].cpu().numpy() for name in ("prediction", "labels"))
            counts = class_counts(*labels, classes)
            self.results.append(dict(index=sample["index"], counts=counts.tolist()))

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        results = sorted(results, key=lambda result: result["index"])
        counts = np.array([result["counts"] for result in results])
        shapes = range(counts.shape[1] - 1)
        pairs = {
            "": per_volume(counts, shapes),
            "paper_": per_batch(counts, shapes, self.batch),
            "code_": per_batch(counts, range(1, counts.shape[1]), self.batch),
        }
        return {
            f"{way}{name}": 100 * value
            for way, pair in pairs.items()
            for name, value in zip(("dice", "iou"), pair)
        }
