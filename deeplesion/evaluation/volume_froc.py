"""FROC of 3D boxes in whole volumes, as DeepLesion's fully annotated test set is evaluated, and the
score threshold of an operating point."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeplesion.errors import DataError, MissingDataError, UserError
from deeplesion.evaluation.froc import FROC
from deeplesion.files import parse_json, write_whole

VOLUME_FPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
OVERLAPS = ("iobb", "iou")
CALIBRATION_FORMAT = "deeplesion-calibration-1"
SAME_RATE = 1e-9  # false positives a volume that differ by no more are equally many


class VolumeFROC(FROC):
    """A FROC curve whose images are volumes, with the operating points of volumes."""

    def sensitivity_at(self, fps: float | Sequence[float] = VOLUME_FPS) -> np.ndarray:
        """Sensitivity at given false positives per volume, in the shape of ``fps``.

        Linear between the points of the curve, 0 before its first point and the last sensitivity
        beyond its last. Of several points with as many false positives the highest counts. NaN
        where there are no lesions.

        Raises:
            ValueError: an operating point is negative or NaN.
        """
        at = super().sensitivity_at(fps)  # of a curve from (0, 0)
        if not len(self.thresholds) or not self.num_lesions:
            return at
        return np.where(np.asarray(fps) < self.fps_per_image[0], 0.0, at)

    @property
    def average(self) -> float:
        """Mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives per volume."""
        return float(self.sensitivity_at(VOLUME_FPS).mean())

    def bootstrap(
        self,
        groups: Sequence,
        fps: Sequence[float] = VOLUME_FPS,
        number: int = 1000,
        seed: int = 0,
    ) -> np.ndarray:
        """As `FROC.bootstrap`, (number, len(fps)): give the patient of each volume."""
        return super().bootstrap(groups, fps, number, seed)


def volume_froc(
    detections: Sequence[np.ndarray],
    ground_truths: Sequence[np.ndarray],
    overlap: str = "iobb",
    threshold: float = 0.3,
) -> VolumeFROC:
    """FROC curve of 3D boxes of a set of volumes.

    Detections of all volumes are taken by falling score, ties in input order. One that overlaps
    with lesions of its volume by the threshold hits every such lesion not hit before; one that
    reaches no lesion is a false positive. Boxes count their last pixel and slice: x2 - x1 + 1,
    y2 - y1 + 1, z2 - z1 + 1. So the fully annotated test set of DeepLesion is evaluated (Yan et
    al., "Learning from multiple datasets with heterogeneous and partial labels for universal lesion
    detection in CT", TMI 2021), with 'iobb' and 0.3.

    Args:
        detections: one (n, 7) array a volume, rows x1, y1, z1, x2, y2, z2, score; in any order.
        ground_truths: one (m, 6) array a volume, rows x1, y1, z1, x2, y2, z2; m may be 0, and the
            volume counts all the same.
        overlap: 'iobb', the intersection over the volume of the detected box, or 'iou', over that
            of the union.
        threshold: overlap that makes a hit, in (0, 1].

    Raises:
        ValueError: another overlap, lists of unequal length, wrong shapes, non-finite numbers,
            boxes whose ends come before their starts (the message names the volume's place in the
            list), or no volume.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap must be one of {', '.join(OVERLAPS)}, got {overlap!r}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    if len(detections) != len(ground_truths):
        raise ValueError(
            f"detections has {len(detections)} volumes, ground_truths {len(ground_truths)}: give"
            " both one entry a volume, empty where there is nothing"
        )
    if not len(ground_truths):
        raise ValueError("no volumes: there is nothing to evaluate")
    found = [_checked("detections", i, rows, 7) for i, rows in enumerate(detections)]
    lesions = [_checked("ground_truths", i, rows, 6) for i, rows in enumerate(ground_truths)]

    scores = np.concatenate([rows[:, 6] for rows in found])
    order = np.argsort(-scores, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    false_positives, hit_at, before = np.ones(len(order), bool), [], 0
    for boxes, truth in zip(found, lesions):
        ranks = rank[before : before + len(boxes)]
        before += len(boxes)
        reached = box_overlap(boxes[:, None, :6], truth, overlap) >= threshold
        false_positives[ranks[reached.any(axis=1)]] = False
        ranks = np.where(reached, ranks[:, None], len(order))
        hit_at.append(ranks.min(axis=0, initial=len(order)))
    volumes = np.arange(len(found))
    return VolumeFROC(
        thresholds=scores[order],
        images=np.repeat(volumes, [len(rows) for rows in found])[order],
        false_positives=false_positives,
        lesion_images=np.repeat(volumes, [len(rows) for rows in lesions]),
        hit_at=np.concatenate(hit_at),
        counted=np.ones(len(found), bool),
    )


def box_overlap(a: np.ndarray, b: np.ndarray, overlap: str = "iobb") -> np.ndarray:
    """Overlap of 3D boxes (..., 6) with boxes (..., 6), broadcast against each other -> (...).

    Rows are x1, y1, z1, x2, y2, z2, ends included. 'iobb': the intersection over the volume of `a`;
    'iou': over that of the union.
    """
    sides = np.minimum(a[..., 3:], b[..., 3:]) - np.maximum(a[..., :3], b[..., :3]) + 1
    common = np.maximum(sides, 0).prod(axis=-1)
    whole = (a[..., 3:] - a[..., :3] + 1).prod(axis=-1)
    if overlap == "iou":
        whole = whole + (b[..., 3:] - b[..., :3] + 1).prod(axis=-1) - common
    return common / whole


def _checked(name: str, index: int, rows: np.ndarray, columns: int) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    if not rows.size:
        rows = rows.reshape(0, columns)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"{name}[{index}] has shape {rows.shape}, expected (n, {columns})")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}[{index}] holds a NaN or infinite number")
    if (rows[:, 3:6] < rows[:, :3]).any():
        raise ValueError(f"{name}[{index}] holds a box with x2 < x1, y2 < y1 or z2 < z1")
    return rows


@dataclass(frozen=True, eq=False)
class Calibration:
    """Which score threshold gives how many false positives per scan.

    Attributes:
        scores: (n,) falling thresholds: detections of at least so much are kept.
        fps_per_scan: (n,) false positives per scan at each, rising.
        sensitivity: (n,) at each, rising; NaN where the scans have no lesions.
        scans, lesions: how many it was measured on.
        algorithm: whose detections, as `lesions.json` tells it.
        path: of the file, for messages.
    """

    scores: np.ndarray
    fps_per_scan: np.ndarray
    sensitivity: np.ndarray
    scans: int
    lesions: int
    algorithm: dict
    path: Path | None = None

    @classmethod
    def of(cls, curve: VolumeFROC, algorithm: dict) -> Calibration:
        """The points of a curve, one for each score that occurs in it."""
        last = np.flatnonzero(np.append(np.diff(curve.thresholds) < 0, True)[: len(curve.images)])
        return cls(
            curve.thresholds[last],
            curve.fps_per_image[last],
            curve.sensitivity[last],
            curve.num_images,
            curve.num_lesions,
            algorithm,
        )

    def score_at(self, fp_per_scan: float) -> float:
        """The lowest threshold with at most so many false positives per scan.

        Raises UserError beyond what was measured: below one false positive in all scans, or above
        those of all detections that there were.
        """
        most = self.fps_per_scan[-1] if len(self.scores) else 0.0
        if not 1 / self.scans - SAME_RATE <= fp_per_scan <= most + SAME_RATE:
            measured = (
                f"from {1 / self.scans:.3g} to {most:.3g}"
                if most
                else "none, since there are no false positives"
            )
            raise UserError(
                f"{self.path or 'the calibration'} cannot say which score gives {fp_per_scan:g}"
                f" false positives per scan: {self.scans} scans were measured, {measured}. Choose a"
                " number within, or calibrate on more scans or with a lower score threshold"
            )
        place = np.searchsorted(self.fps_per_scan, fp_per_scan + SAME_RATE, side="right")
        if not place:
            raise UserError(
                f"{self.path or 'the calibration'}: the detections of the highest score alone are"
                f" {self.fps_per_scan[0]:.3g} false positives per scan, more than {fp_per_scan:g}"
            )
        return float(self.scores[place - 1])


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Writes JSON that `read_calibration` reads."""
    sensitivity = calibration.sensitivity.tolist() if calibration.lesions else None
    content = {
        "format": CALIBRATION_FORMAT,
        "scans": calibration.scans,
        "lesions": calibration.lesions,
        "algorithm": calibration.algorithm,
        "hit": "3D IoBB >= 0.3",
        "score": calibration.scores.tolist(),
        "fp_per_scan": calibration.fps_per_scan.tolist(),
        "sensitivity": sensitivity,
    }
    write_whole(path, json.dumps(content, allow_nan=False) + "\n")


def read_calibration(path: Path) -> Calibration:
    """Reads a calibration file of `tools/evaluate.py --volumes`.

    Raises DataError, with the file, if it is not there or not one.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise MissingDataError(
            f"{path} is not there: tools/evaluate.py --volumes writes a calibration.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    wrong = f"{path} is no calibration that tools/evaluate.py --volumes writes: "
    if not isinstance(content, dict) or content.get("format") != CALIBRATION_FORMAT:
        raise DataError(f"{wrong}'format' must be {CALIBRATION_FORMAT}")
    scans, lesions, algorithm = (content.get(key) for key in ("scans", "lesions", "algorithm"))
    if type(scans) is not int or type(lesions) is not int or scans < 1 or lesions < 0:
        raise DataError(f"{wrong}'scans' and 'lesions' must be numbers of scans and lesions")
    if not isinstance(algorithm, dict):
        raise DataError(f"{wrong}'algorithm' must say whose detections they are")
    keys = ("score", "fp_per_scan", *(["sensitivity"] if lesions else []))
    try:
        columns = [np.array(content[key], np.float64) for key in keys]
        scores, fps = columns[:2]
        sensitivity = columns[2] if lesions else np.full(scores.shape, np.nan)
        good = (
            scores.ndim == 1
            and all(column.shape == scores.shape for column in columns)
            and all(np.isfinite(column).all() for column in columns)
            and (np.diff(scores) < 0).all()
            and (np.diff(fps) >= 0).all()
            and (fps >= 0).all()
        )
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise DataError(
            f"{wrong}{', '.join(keys)} must be equally many numbers, of them 'score' falling and"
            " 'fp_per_scan' rising"
        )
    return Calibration(scores, fps, sensitivity, scans, lesions, algorithm, path)
