"""Scores of lung nodules: NoduleDiceMetric of their segmentation, NoduleAUCMetric of benign against
malignant (ACS, JBHI 2021, Table V)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric
from scipy.stats import rankdata

from deeplesion.files import write_whole
from mmdet_ext.evaluation.dice_metric import without_nan
from mmdet_ext.evaluation.volume_metrics import class_counts, dice


class NoduleMetric(BaseMetric):
    """Keeps a record a nodule, scores them and writes them.

    Args:
        result_file: where to write the figures and the records, as JSON, or None.
        epoch_chosen_on_test: what the file says of the checkpoint: whether its epoch was chosen by
            its score on the nodules that are tested. tools/test.py sets it.
    """

    default_prefix = "Nodules"

    def __init__(
        self,
        result_file: str | None = None,
        epoch_chosen_on_test: bool = False,
        collect_device: str = "gpu",  # see FROCMetric
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.result_file, self.epoch_chosen_on_test = result_file, epoch_chosen_on_test

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            named = {key: sample[key] for key in ("index", "name", "patient")}
            self.results.append(named | self.record(sample))

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        results = sorted(results, key=lambda result: result["index"])
        figures = self.figures(results)
        if self.result_file is not None:
            content = dict(
                epoch_chosen_on_test=self.epoch_chosen_on_test,
                figures=figures,
                masks=self.dataset_meta.get("masks"),
                split_by=self.dataset_meta.get("split_by"),
                nodules=results,
            )
            write_whole(Path(self.result_file), json.dumps(without_nan(content), indent=1) + "\n")
        return figures

    def record(self, sample: dict) -> dict:
        raise NotImplementedError

    def figures(self, results: list[dict]) -> dict[str, float]:
        raise NotImplementedError


@METRICS.register_module()
class NoduleDiceMetric(NoduleMetric):
    """In percent, of the voxels within the crops:

    `dice_global`: 2 |P and R| / (|P| + |R|), each summed over all nodules, which the paper reports.
    `dice_per_nodule`: the mean over the nodules.
    """

    def record(self, sample: dict) -> dict:
        volumes = (sample[name].cpu().numpy() for name in ("prediction", "labels"))
        both, predicted, there = class_counts(*volumes, classes=2)[1].tolist()
        return dict(both=both, predicted=predicted, reference=there)

    def figures(self, results: list[dict]) -> dict[str, float]:
        counts = np.array([[r["both"], r["predicted"], r["reference"]] for r in results])
        each = dice(counts)
        for result, value in zip(results, each.tolist()):
            result["dice"] = 100 * value
        # NaN: a nodule of which the crop shows nothing, where nothing was predicted either.
        known = each[~np.isnan(each)]
        return dict(
            dice_global=100 * float(dice(counts.sum(0))),
            dice_per_nodule=100 * float(known.mean()) if len(known) else float("nan"),
        )


@METRICS.register_module()
class NoduleAUCMetric(NoduleMetric):
    """In percent: `auc`, the area under the ROC curve of the probability of class 1, which the
    paper reports, and `accuracy`, of the likelier class; 50 % each counts as class 0."""

    def record(self, sample: dict) -> dict:
        probability = float(sample["probabilities"][1])
        return dict(probability=probability, label=int(sample["label"]))

    def figures(self, results: list[dict]) -> dict[str, float]:
        probabilities = np.array([r["probability"] for r in results])
        labels = np.array([r["label"] for r in results])
        right = (probabilities > 0.5) == (labels == 1)
        return dict(auc=100 * auc(probabilities, labels == 1), accuracy=100 * float(right.mean()))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The part of the pairs of a positive and a negative in which the positive has the higher
    score; a pair of equal scores counts half. NaN without a pair.

    Args:
        scores, positive: (n,) numbers and bools.
    """
    above = int(positive.sum())
    below = len(positive) - above
    if not above or not below:
        return float("nan")
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - above * (above + 1) / 2) / (above * below))
