"""DiceMetric: instances on slices, stacked to segmentations of whole LiTS cases and scored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ct_volumes import dice
from ct_volumes.optional import module
from deeplesion.data.coco import encode_mask
from deeplesion.errors import DataError, MissingDataError
from deeplesion.files import write_whole

LIVER, LESION = 0, 1  # labels of the network
SIZES = ("small", "medium", "large")


@METRICS.register_module()
class DiceMetric(BaseMetric):
    """Dice of liver and lesions, per case and over all, on the grid of LiTS's own files.

    On each slice the masks of a class whose score is high enough are one region; the slices of a
    case are stacked, lesions outside the liver dropped, each original slice takes the nearest of
    the resampled ones, and `ct_volumes.dice` scores. Figures are in percent, precision, recall and
    burden as there: `Dice/lesion_dice_per_case`, by which papers compare, `Dice/liver_dice_global`,
    `Dice/dice_small` (of lesions), ... Cases whose files state no geometry have no size classes.

    Args:
        liver_score, lesion_scores: the lowest score of a mask that counts. Several for lesions give
            a row each in the table; figures without a name are of the first.
        result_file: where to write the figures and those of each case, as JSON, or None.
        folder: of LiTS's files, where it is not the one that the data was prepared from.
        segmentations: folder for what was predicted, prediction-N.nii with the labels 0, 1, 2 on
            the grid of volume-N.nii, or None.

    Raises:
        DataError: a case of which not every slice was tested. MissingDataError: its files are gone.
    """

    default_prefix = "Dice"

    def __init__(
        self,
        liver_score: float = 0.5,
        lesion_scores: Sequence[float] = (0.5,),
        result_file: str | None = None,
        folder: str | None = None,
        segmentations: str | None = None,
        collect_device: str = "gpu",  # see FROCMetric
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not lesion_scores:
            raise ValueError("lesion_scores is empty: give at least one score")
        self.liver_score, self.lesion_scores = liver_score, tuple(lesion_scores)
        self.result_file, self.folder, self.segmentations = result_file, folder, segmentations

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keeps one record a slice: the region of the liver and those of the lesions."""
        for sample in data_samples:
            found = sample["pred_instances"]
            masks = np.asarray(found["masks"].cpu(), bool)
            scores, labels = found["scores"].float().cpu().numpy(), found["labels"].cpu().numpy()

            def region(label, least, masks=masks, scores=scores, labels=labels) -> dict:
                return encode_mask(masks[(labels == label) & (scores >= least)].any(0))

            self.results.append(
                dict(
                    case=int(sample["patient"]),
                    slices=sample["slice_range"][1] + 1,
                    index=int(Path(sample["file_name"]).stem),
                    liver=region(LIVER, self.liver_score),
                    lesions=[region(LESION, least) for least in self.lesion_scores],
                )
            )

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        lits = module("lits", "scoring LiTS")
        prepared = self.dataset_meta["lits"]
        cases: dict[int, list[dict]] = {}
        for record in results:
            cases.setdefault(record["case"], []).append(record)
        files = lits.find_cases(Path(self.folder or prepared["folder"])).cases
        scored: list[list[dice.CaseScore]] = []
        for number, slices in tqdm(sorted(cases.items()), desc="cases", leave=False):
            if number not in files:
                raise MissingDataError(
                    f"{self.folder or prepared['folder']} has no files of case {number} any more. "
                    "Say where they are: --cfg-options test_evaluator.folder=FOLDER"
                )
            scored.append(self._score(lits, files[number], prepared["step_mm"], slices))
        rows = [dice.summarise(list(of_score)) for of_score in zip(*scored, strict=True)]
        rows = [in_percent(row) for row in rows]
        content = self._content(sorted(cases), scored, rows)
        print_log("\n" + dice_table(content), logger="current")
        if self.result_file is not None:
            write_whole(Path(self.result_file), json.dumps(content, indent=1) + "\n")
        named = dict(rows[0])
        for score, row in list(zip(self.lesion_scores, rows))[1:]:
            named[f"lesion_dice_per_case_of_score_{score}"] = row["lesion_dice_per_case"]
        return named

    def _score(
        self, lits: ModuleType, files, step_mm: float, slices: list[dict]
    ) -> list[dice.CaseScore]:
        """A case's scores, one for each of `lesion_scores`."""
        indices = sorted(record["index"] for record in slices)
        if indices != list(range(slices[0]["slices"])):
            raise DataError(
                f"of case {files.number} {len(indices)} of {slices[0]['slices']} slices were "
                "tested: Dice is of whole cases"
            )
        case = lits.read_case(files)
        resampled = lits.resample(case, step_mm)
        scores = []
        for number, least in enumerate(self.lesion_scores):
            labels = np.zeros(resampled.volume.hu.shape, np.uint8)
            for record in slices:
                labels[record["index"]] = stacked(record["liver"], record["lesions"][number])
            predicted = resampled.back(labels)
            score = dice.score_case(predicted, case.labels, case.volume.spacing_mm)
            scores.append(score if case.known_geometry else replace(score, lesions=()))
            if self.segmentations is not None and least == self.lesion_scores[0]:
                lits.write_labels(
                    predicted, case, Path(self.segmentations) / f"prediction-{files.number}.nii"
                )
        return scores

    def _content(self, numbers: list[int], scored: list, rows: list[dict]) -> dict:
        """What the result file holds: figures, and scores of each case, for each score."""
        scores = [
            dict(
                lesion_score=least,
                figures=row,
                cases={n: asdict(of_case[i]) for n, of_case in zip(numbers, scored, strict=True)},
            )
            for i, (least, row) in enumerate(zip(self.lesion_scores, rows))
        ]
        return without_nan(dict(liver_score=self.liver_score, scores=scores))


def stacked(liver: dict, lesion: dict) -> np.ndarray:
    """(H, W) uint8 labels of a slice: lesions are where both regions are, liver the rest of it."""
    organ, inside = (coco_mask.decode(region) for region in (liver, lesion))
    return organ + (organ & inside)


def in_percent(figures: Mapping[str, float]) -> dict[str, float]:
    """The same with every Dice times 100."""
    return {k: 100 * v if "dice" in k else v for k, v in figures.items()}


def without_nan(value):
    """Nested dicts and lists with None for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def dice_table(content: Mapping) -> str:
    """The figures of a result file as text, a row for each lowest score of lesions, of which
    segmentations of whole volumes have none."""
    rows = [(part["lesion_score"], part["figures"]) for part in content["scores"]]
    sizes = "  ".join(f"{size} (n={rows[0][1][f'lesions_{size}']})" for size in SIZES)
    first = "" if rows[0][0] is None else "score >="
    lines = [
        "          lesion Dice       liver Dice        lesions             burden  Dice per lesion",
        f"{first:8}  per case  global  per case  global  precision  recall    RMSE  {sizes}",
    ]

    def cell(value: float | None, width: int, digits: int = 1) -> str:
        return ("-" if value is None else f"{value:.{digits}f}").rjust(width)

    for least, row in rows:
        lines.append(
            ("" if least is None else f"{least:g}").rjust(8)
            + cell(row["lesion_dice_per_case"], 10)
            + cell(row["lesion_dice_global"], 8)
            + cell(row["liver_dice_per_case"], 10)
            + cell(row["liver_dice_global"], 8)
            + cell(row["lesion_precision"], 11, 2)
            + cell(row["lesion_recall"], 8, 2)
            + cell(row["burden_rmse"], 8, 3)
            + "  "
            + "  ".join(
                cell(row[f"dice_{size}"], len(f"{size} (n={row[f'lesions_{size}']})"))
                for size in SIZES
            )
        )
    return "\n".join(lines)
