"""From the lesions that `tools/detect.py` found in a folder of scans, and the boxes of all true
ones, to the numbers of a table in 3D."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeplesion.data.coco import read_json
from deeplesion.errors import DataError, MissingDataError
from deeplesion.evaluation.intervals import (
    MIN_PATIENTS,
    QUANTILES,
    check_resamples,
    with_lesions,
)
from deeplesion.evaluation.volume_froc import VOLUME_FPS, VolumeFROC, volume_froc

LESIONS = "lesions.json"
CRITERIA = (("iobb", 0.3), ("iou", 0.1), ("iou", 0.3))  # the first is that of the test set
VOLUME_POINTS = ("1/8", "1/4", "1/2", "1", "2", "4", "8")
NAMED = 5  # scans that a message names
SUB_VOLUME = re.compile(r".+_(\d+)-(\d+)")
OF_DEEPLESION = re.compile(r"(\d{6})_\d{2}_\d{2}(?:_.*)?")


@dataclass(frozen=True, eq=False)
class VolumeDetections:
    """The lesions found in a set of scans.

    Attributes:
        boxes: (n, 7) of each scan, x1, y1, z1, x2, y2, z2, score, slices counted as the truth does.
        algorithm: what found them, as every scan's file says.
        missing: scans that have no file; they count as scans in which nothing was found.
        others: scans found in the folder that were not asked for.
    """

    boxes: list[np.ndarray]
    algorithm: dict
    missing: list[str]
    others: list[str]


def read_volume_detections(
    folder: Path, names: Sequence[str], count_missing: bool = False
) -> VolumeDetections:
    """Reads FOLDER/NAME/lesions.json of each scan.

    Slices of these files count from 0. The sub-volumes of DeepLesion are called SERIES_FIRST-LAST
    and their true boxes count the numbers of the series' files: FIRST is added.

    Args:
        folder: what `tools/detect.py` wrote for a folder of scans.
        names: of the scans to evaluate.
        count_missing: a scan without a file is one in which nothing was found; otherwise it is
            refused.

    Raises:
        DataError: a folder or file that is not there or not as it should be; scans that were
            searched by different algorithms.
    """
    if not folder.is_dir():
        raise MissingDataError(f"{folder} is no folder: give the folder that tools/detect.py wrote")
    there = {path.parent.name for path in folder.glob(f"*/{LESIONS}")}
    missing = [name for name in names if name not in there]
    if len(missing) == len(names):
        raise MissingDataError(
            f"{folder} holds none of the {len(names):,} scans: expected is {LESIONS} in folders"
            f" called as they are, such as {names[0]}. (Scans that are called after their patient"
            " are scan_... there, unless tools/detect.py was given --identify.)"
        )
    if missing and not count_missing:
        raise MissingDataError(
            f"{folder} lacks {len(missing):,} of {len(names):,} scans: {_some(missing)}. Detect in"
            " them, too, or count them as scans in which nothing was found with --count-missing"
        )
    boxes, algorithm, first = [], None, None
    for name in names:
        if name not in there:
            boxes.append(np.zeros((0, 7)))
            continue
        path = folder / name / LESIONS
        rows, own = _read(path)
        boxes.append(_numbered_as_truth(path, name, rows))
        if algorithm is None:
            algorithm, first = own, path
        elif own != algorithm:
            raise DataError(
                f"{first} and {path} were made by different algorithms or with different options"
                f" ({json.dumps(algorithm)} and {json.dumps(own)}): detect in all scans with one"
            )
    return VolumeDetections(boxes, algorithm, missing, sorted(there.difference(names)))


def evaluate_volumes(
    detections: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    patients: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[list[dict], VolumeFROC]:
    """Sensitivities at false positives per scan, with 95 % intervals by bootstrap over patients.

    Args:
        detections, truths: (n, 7) and (m, 6) of each scan, see `volume_froc`.
        patients: of each scan.
        resamples, seed: of the bootstrap.

    Returns:
        a row for each of `CRITERIA`: `overlap`, `threshold`, `sensitivity` {operating point: %},
        `average` of them, `interval` {operating point or 'average': [low, high]} (where there are
        lesions of several patients); numbers are None where there are no lesions. And the curve of
        the first criterion.

    Raises:
        ValueError: too few resamples, or what `volume_froc` refuses.
    """
    check_resamples(resamples)
    rows, curves = [], []
    for overlap, threshold in CRITERIA:
        curve = volume_froc(detections, truths, overlap, threshold)
        row = dict(overlap=overlap, threshold=threshold)
        values = _percentages(curve.sensitivity_at(VOLUME_FPS)).tolist()
        if not curve.num_lesions:
            values = [None] * len(values)
        row["sensitivity"] = dict(zip(VOLUME_POINTS, values))
        row["average"] = values[-1]
        of_lesions = np.asarray(patients)[curve.lesion_images]
        if len(np.unique(of_lesions)) >= MIN_PATIENTS:
            drawn = with_lesions(
                _percentages(curve.bootstrap(patients, VOLUME_FPS, resamples, seed))
            )
            ends = np.quantile(drawn, QUANTILES, axis=0).T.tolist()
            row["interval"] = dict(zip((*VOLUME_POINTS, "average"), ends))
        rows.append(row)
        curves.append(curve)
    return rows, curves[0]


def patient_of(name: str) -> str:
    """The patient of a scan: what DeepLesion's names tell, of other scans the name itself."""
    known = OF_DEEPLESION.fullmatch(name)
    return known[1] if known else name


def _percentages(sensitivity: np.ndarray) -> np.ndarray:
    """(..., points) fractions -> (..., points + 1) in %, the last one the mean."""
    return 100 * np.append(sensitivity, sensitivity.mean(axis=-1, keepdims=True), axis=-1)


def _read(path: Path) -> tuple[np.ndarray, dict]:
    """(n, 7) boxes and scores of a lesions.json, and its algorithm."""
    content = read_json(path, "the lesions of a scan")
    expected = (
        f"{path} must hold 'lesions', each with 'box' [x1, y1, first slice, x2, y2, last slice] and"
        " 'score' from 0 to 1, and 'algorithm', as tools/detect.py writes them"
    )
    if not isinstance(content, dict) or not isinstance(content.get("algorithm"), dict):
        raise DataError(expected)
    rows = []
    try:
        for lesion in content["lesions"]:
            rows.append([*lesion["box"], lesion["score"]])
            if not all(type(number) in (int, float) for number in rows[-1]):
                raise TypeError
        table = np.array(rows, np.float64).reshape(len(rows), 7)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DataError(expected) from None
    slices, scores = table[:, [2, 5]], table[:, 6]
    if (
        not np.isfinite(table).all()
        or (table[:, 3:6] < table[:, :3]).any()
        or (slices < 0).any()
        or (slices % 1).any()
        or not ((scores >= 0) & (scores <= 1)).all()
    ):
        raise DataError(expected)
    return table, content["algorithm"]


def _numbered_as_truth(path: Path, name: str, rows: np.ndarray) -> np.ndarray:
    part = SUB_VOLUME.fullmatch(name)
    if not part:
        return rows
    first, last = map(int, part.groups())
    rows = rows + [0, 0, first, 0, 0, first, 0]
    if len(rows) and rows[:, 5].max() > last:
        raise DataError(
            f"{path}: a lesion reaches to slice {int(rows[:, 5].max()) - first} (from 0), but by"
            f" its name the scan has the slices {first} to {last} of its series"
        )
    return rows


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
