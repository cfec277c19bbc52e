"""Scores of liver and lesion segmentations as the LiTS challenge computes them, and the Dice of
each lesion by its size, as the Volumetric Attention paper reports it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import find_objects, label
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

LIVER, LESION = 1, 2
LEAST_IOU = 0.5  # a lesion is found above it
SIZES_MM = (15.0, 30.0)  # small below, large above, medium between and at both


@dataclass(frozen=True)
class LesionDice:
    """The Dice of one lesion of the reference and its long axis in mm."""

    diameter_mm: float
    dice: float

    @property
    def size(self) -> str:
        if self.diameter_mm < SIZES_MM[0]:
            return "small"
        return "large" if self.diameter_mm > SIZES_MM[1] else "medium"


@dataclass(frozen=True)
class CaseScore:
    """What is counted of one case.

    Attributes:
        liver, lesion: Dice per case.
        liver_counts, lesion_counts: (2 |P and R|, |P| + |R|) in voxels, summed for Dice global.
        true_positives, false_positives, false_negatives: lesions.
        burden, reference_burden: lesion voxels by voxels of label >= 1.
        lesions: of the reference, one each.
    """

    liver: float
    lesion: float
    liver_counts: tuple[int, int]
    lesion_counts: tuple[int, int]
    true_positives: int
    false_positives: int
    false_negatives: int
    burden: float
    reference_burden: float
    lesions: tuple[LesionDice, ...]


def score_case(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, float]
) -> CaseScore:
    """Score (S, H, W) labels 0, 1 (liver), 2 (lesion), on the original grid.

    Args:
        spacing_mm: (of rows, of columns), for the long axis alone.

    The liver is label >= 1. Its Dice is 0 if the prediction has no voxel of label 1, even if it has
    lesions: they alone are no liver, and only the reference's voxels are counted for Dice global.
    The lesions' Dice is 1 if neither side has one, 0 if one side has. The burden of a side without
    any label is 0.

    Raises ValueError for arrays of different shapes, of other labels, or a spacing not positive.
    """
    if prediction.shape != reference.shape or reference.ndim != 3:
        raise ValueError(f"expected two (S, H, W), got {prediction.shape} and {reference.shape}")
    box = _box_of((prediction != 0) | (reference != 0))  # most of a scan is far from the liver
    prediction, reference = prediction[box], reference[box]
    for name, array in (("prediction", prediction), ("reference", reference)):
        if not np.isin(array, (0, LIVER, LESION)).all():
            raise ValueError(f"labels of the {name} must be 0, 1 and 2")
    if not (np.isfinite(spacing_mm).all() and min(spacing_mm) > 0):
        raise ValueError(f"spacing_mm must be positive, got {spacing_mm}")

    liver = _counts(prediction >= LIVER, reference >= LIVER)
    if not (prediction == LIVER).any():
        liver = (0, int((reference >= LIVER).sum()))
    lesion = _counts(prediction == LESION, reference == LESION)
    found = label(prediction == LESION)  # scipy's default are the 6 neighbours that share a face
    there = label(reference == LESION)
    return CaseScore(
        liver[0] / liver[1] if liver[1] else 0.0,
        lesion[0] / lesion[1] if lesion[1] else 1.0,
        liver,
        lesion,
        *detect(*found, *there),
        _burden(prediction),
        _burden(reference),
        lesion_dice(*found, *there, spacing_mm),
    )


def detect(
    found: np.ndarray, found_count: int, there: np.ndarray, there_count: int
) -> tuple[int, int, int]:
    """(true positives, false positives, false negatives) of components numbered from 1.

    Predictions that touch one lesion are merged, and lesions that touch one prediction, until
    nothing more merges. Such a group is one true positive if the IoU of its two unions is above
    0.5. All other components of the prediction are false positives, and all other lesions are
    missed: a prediction over two lesions finds one of them, and of two predictions on one lesion
    one is false. A group whose IoU is too low counts no true positive and never a negative number,
    as the challenge's code can.
    """
    both = (found > 0) & (there > 0)
    codes = np.unique((found[both].astype(np.int64) - 1) * (there_count + 1) + there[both] - 1)
    # Nodes: predictions first, then lesions.
    rows, columns = codes // (there_count + 1), codes % (there_count + 1) + found_count
    nodes = found_count + there_count
    graph = coo_matrix((np.ones(len(codes)), (rows, columns)), (nodes, nodes))
    groups, group_of = connected_components(graph, directed=False)
    sizes = np.concatenate(
        [
            np.bincount(found.ravel(), minlength=found_count + 1)[1:],
            np.bincount(there.ravel(), minlength=there_count + 1)[1:],
        ]
    )
    total = np.bincount(group_of, weights=sizes, minlength=groups)
    shared = np.bincount(group_of[found[both] - 1], minlength=groups)
    true = int((shared > LEAST_IOU * (total - shared)).sum())
    return true, found_count - true, there_count - true


def lesion_dice(
    found: np.ndarray,
    found_count: int,
    there: np.ndarray,
    there_count: int,
    spacing_mm: tuple[float, float],
) -> tuple[LesionDice, ...]:
    """The Dice of each lesion with all components of the prediction that touch it, each whole.

    A prediction over two lesions counts in both. A lesion that nothing touches has Dice 0. The
    paper does not say how it assigns predictions; this is our definition.
    """
    sizes = np.bincount(found.ravel(), minlength=found_count + 1)
    lesions = []
    for number, box in enumerate(find_objects(there, there_count), 1):
        mask = there[box] == number
        inside = found[box][mask]
        touching = np.unique(inside[inside > 0])
        dice = 2 * int((inside > 0).sum()) / int(mask.sum() + sizes[touching].sum())
        lesions.append(LesionDice(long_axis_mm(mask, spacing_mm), dice))
    return tuple(lesions)


def long_axis_mm(mask: np.ndarray, spacing_mm: tuple[float, float]) -> float:
    """The longest axial diameter of an (S, H, W) mask in mm: on each slice the largest distance of
    two midpoints of pixel edges, of all slices the largest.

    A straight row of n pixels is n pixels long. The distance of slices does not matter. 0 if empty.
    """
    longest = 0.0
    ends = np.array([[0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]])
    for plane in mask:
        if plane.any():
            points = ((np.argwhere(plane)[:, None] + ends) * spacing_mm).reshape(-1, 2)
            longest = max(longest, float(pdist(points[ConvexHull(points).vertices]).max()))
    return longest


def summarise(cases: list[CaseScore]) -> dict[str, float]:
    """The figures over all cases.

    Dice per case are means over cases; Dice global is 2 sum |P and R| / sum (|P| + |R|), 1 for
    lesions if no case has any on either side (0 for the liver). Precision, recall and the Dice of a
    size are NaN where there is nothing to divide by. `burden_max_error` is absolute. Raises
    ValueError without cases.
    """
    if not cases:
        raise ValueError("there are no cases to score")
    figures = {}
    for name, empty in (("liver", 0.0), ("lesion", 1.0)):
        shared, sizes = np.sum([getattr(c, f"{name}_counts") for c in cases], axis=0).tolist()
        figures[f"{name}_dice_per_case"] = float(np.mean([getattr(c, name) for c in cases]))
        figures[f"{name}_dice_global"] = shared / sizes if sizes else empty
    true = sum(c.true_positives for c in cases)
    predicted = true + sum(c.false_positives for c in cases)
    lesions = true + sum(c.false_negatives for c in cases)
    figures["lesion_precision"] = true / predicted if predicted else float("nan")
    figures["lesion_recall"] = true / lesions if lesions else float("nan")
    errors = np.array([c.burden - c.reference_burden for c in cases])
    figures["burden_rmse"] = float(np.sqrt(np.mean(errors**2)))
    figures["burden_max_error"] = float(np.abs(errors).max())
    for size in ("small", "medium", "large"):
        of_size = [x.dice for c in cases for x in c.lesions if x.size == size]
        figures[f"dice_{size}"] = float(np.mean(of_size)) if of_size else float("nan")
        figures[f"lesions_{size}"] = len(of_size)
    return figures


def _box_of(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box with all that is set in a mask; if nothing is, one voxel."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        there = np.flatnonzero(mask.any(others))
        box.append(slice(there[0], there[-1] + 1) if len(there) else slice(0, 1))
    return tuple(box)


def _counts(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    return 2 * int((one & other).sum()), int(one.sum()) + int(other.sum())


def _burden(labels: np.ndarray) -> float:
    organ = int((labels >= LIVER).sum())
    return int((labels == LESION).sum()) / organ if organ else 0.0
