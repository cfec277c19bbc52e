"""How well predicted masks measure: their RECIST diameters against the annotated ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from deeplesion.data.recist import Diameters, recist_from_mask
from deeplesion.evaluation.intervals import MIN_PATIENTS, QUANTILES, draw_groups
from deeplesion.evaluation.matching import match
from deeplesion.evaluation.results import patients_of

AXES = ("long", "short")


def diameter_errors(
    records: Sequence[dict],
    iou_threshold: float = 0.5,
    pixel_offset: int = 1,
    resamples: int = 1000,
    seed: int = 0,
) -> dict | None:
    """Predicted minus annotated long and short axis, in mm, of the lesions that are hit.

    A lesion is measured on the mask of the detection that hits it first (see `matching.match`),
    whatever its score.

    Args:
        records: of a result file (`results.read_results`).
        iou_threshold, pixel_offset: of a hit, see `deeplesion.evaluation.froc.froc`.
        resamples, seed: of the bootstrap over patients.

    Returns:
        `n`, lesions measured, and for 'long' and 'short': `mean`; `interval` [low, high], the 95 %
        interval of the mean (None, None of one patient); `median`; `mean_absolute`; `limits`
        [low, high], the limits of agreement, mean -+ 1.96 standard deviations (Bland and Altman,
        1986). None where no lesion that is hit has a mask and annotated diameters.
    """
    errors, patients = [], []
    for record, patient in zip(records, patients_of(records)):
        if not record.get("masks") or record["spacing_mm"] is None:
            continue
        _, hit_by = match(record, iou_threshold, pixel_offset)
        for lesion, detection in zip(record["lesions"], hit_by):
            if detection is None or not lesion.get("diameters_mm"):
                continue
            measured = diameters_of_mask(record["masks"][detection], record["spacing_mm"])
            if measured is not None:
                errors.append(measured.lengths_mm - lesion["diameters_mm"])
                patients.append(patient)
    if not errors:
        return None
    errors = np.array(errors)
    if len(set(patients)) < MIN_PATIENTS:
        ends = np.full((2, len(AXES)), None)
    else:
        ends = np.quantile(_drawn_means(errors, patients, resamples, seed), QUANTILES, axis=0)
    mean, spread = errors.mean(axis=0), 1.96 * errors.std(axis=0, ddof=min(1, len(errors) - 1))
    rows = dict(
        mean=mean,
        interval=ends.T,
        median=np.median(errors, axis=0),
        mean_absolute=np.abs(errors).mean(axis=0),
        limits=np.stack([mean - spread, mean + spread], axis=1),
    )
    return dict(
        n=len(errors),
        **{
            axis: {name: value[i].tolist() for name, value in rows.items()}
            for i, axis in enumerate(AXES)
        },
    )


def diameters_of_mask(rle: dict, spacing_mm: float | None) -> Diameters | None:
    """The RECIST diameters of a mask as COCO run lengths; None without a pixel or a spacing."""
    if spacing_mm is None:
        return None
    mask = coco_mask.decode(rle)
    return recist_from_mask(mask, spacing_mm) if mask.any() else None


def _drawn_means(errors: np.ndarray, patients: Sequence, resamples: int, seed: int) -> np.ndarray:
    """(resamples, 2) mean errors of as many patients as there are, drawn with replacement."""
    patient, times = draw_groups(patients, resamples, seed)
    sums = np.stack([np.bincount(patient, errors[:, i]) for i in range(2)], axis=1)
    return (times @ sums) / (times @ np.bincount(patient))[:, None]
