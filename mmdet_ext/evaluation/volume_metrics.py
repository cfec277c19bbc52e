"""Dice and IoU of segmentations of several classes, from counts of voxels: per volume, and over
batches of them as the ACS paper has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def class_counts(prediction: np.ndarray, reference: np.ndarray, classes: int) -> np.ndarray:
    """Voxels of each class in both, in the prediction and in the reference: int64 (classes, 3).

    Raises ValueError for arrays of different shapes, or labels beyond 0 to classes - 1.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"the shapes {prediction.shape} and {reference.shape} differ")
    for name, labels in (("prediction", prediction), ("reference", reference)):
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"labels of the {name} must be 0 to {classes - 1}")
    both = prediction[prediction == reference]
    counted = [np.bincount(x.ravel(), minlength=classes) for x in (both, prediction, reference)]
    return np.stack(counted, axis=1)


def dice(counts: np.ndarray) -> np.ndarray:
    """2 |P and R| / (|P| + |R|) of (..., 3) counts; NaN where there is neither."""
    both, predicted, there = np.moveaxis(counts, -1, 0)
    return _divide(2 * both, predicted + there)


def iou(counts: np.ndarray) -> np.ndarray:
    """|P and R| / |P or R| of (..., 3) counts; NaN where there is neither."""
    both, predicted, there = np.moveaxis(counts, -1, 0)
    return _divide(both, predicted + there - both)


def per_volume(counts: np.ndarray, classes: Sequence[int]) -> tuple[float, float]:
    """Mean Dice and IoU of (volumes, all classes, 3) counts: over the `classes` that a volume's
    reference has, then over the volumes that have any of them. NaN if none has.

    Of a class that is not there what is predicted is not counted against it: it lowers the class
    that it takes voxels from, if that is one of `classes`.
    """
    there = counts[:, list(classes), 2] > 0
    found = []
    for score in (dice, iou):
        values = np.where(there, score(counts[:, list(classes)]), 0.0)
        volumes = there.any(axis=1)
        means = values[volumes].sum(axis=1) / there[volumes].sum(axis=1)
        found.append(float(means.mean()) if volumes.any() else float("nan"))
    return tuple(found)


def per_batch(counts: np.ndarray, classes: Sequence[int], batch: int) -> tuple[float, float]:
    """Mean Dice and IoU of (volumes, all classes, 3) counts, each of `batch` volumes, in their
    order, taken together: over `classes`, then over the batches. The last batch may be smaller.

    A class in neither prediction nor reference of a batch is left out of its mean.
    """
    groups = [counts[i : i + batch].sum(axis=0) for i in range(0, len(counts), batch)]
    found = []
    for score in (dice, iou):
        values = score(np.stack(groups)[:, list(classes)])
        means = [row[~np.isnan(row)].mean() for row in values if not np.isnan(row).all()]
        found.append(float(np.mean(means)) if means else float("nan"))
    return tuple(found)


def _divide(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.divide(one, other, out=np.full(other.shape, np.nan), where=other > 0)
