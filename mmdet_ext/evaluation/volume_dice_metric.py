"""VolumeDiceMetric: segmentations of whole LiTS cases against the labels of its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from ct_volumes import dice
from ct_volumes.optional import module
from deeplesion.errors import MissingDataError
from deeplesion.files import write_whole
from mmdet_ext.evaluation.dice_metric import dice_table, in_percent, without_nan


@METRICS.register_module()
class VolumeDiceMetric(BaseMetric):
    """Dice of liver and lesions, per case and global, of predictions on the files' own grid; the
    figures are those of `DiceMetric`.

    A case is scored, and its prediction let go, as soon as it is there.

    Args:
        result_file: where to write the figures and those of each case, as JSON, or None.
        segmentations: folder for what was predicted, prediction-N.nii with the labels 0, 1, 2 on
            the grid of volume-N.nii, or None.

    Raises:
        MissingDataError: the files of a case are gone.
    """

    default_prefix = "Dice"

    def __init__(
        self,
        result_file: str | None = None,
        segmentations: str | None = None,
        collect_device: str = "gpu",  # see FROCMetric
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.result_file, self.segmentations = result_file, segmentations

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        lits = module("lits", "scoring LiTS")
        folder = self.dataset_meta["lits"]["folder"]
        files = lits.find_cases(folder).cases
        for sample in data_samples:
            number = int(sample["patient"])
            if number not in files:
                raise MissingDataError(f"{folder} has no files of case {number} any more")
            case = lits.read_case(files[number])
            predicted = sample["prediction"].cpu().numpy()
            score = dice.score_case(predicted, case.labels, case.volume.spacing_mm)
            score = score if case.known_geometry else replace(score, lesions=())
            self.results.append(dict(case=number, score=score))
            if self.segmentations is not None:
                path = Path(self.segmentations) / f"prediction-{number}.nii"
                lits.write_labels(predicted, case, path)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        # A loader of several processes may give one case twice, to fill up the last batch.
        scores = {result["case"]: result["score"] for result in results}
        figures = in_percent(dice.summarise([scores[n] for n in sorted(scores)]))
        cases = {n: asdict(scores[n]) for n in sorted(scores)}
        content = without_nan(dict(scores=[dict(lesion_score=None, figures=figures, cases=cases)]))
        print_log("\n" + dice_table(content), logger="current")
        if self.result_file is not None:
            write_whole(Path(self.result_file), json.dumps(content, indent=1) + "\n")
        return figures
