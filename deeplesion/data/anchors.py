"""Anchors that fit the boxes of a data set: sizes and ratios by differential evolution, as in
Improved RetinaNet (Zlocha, Dou and Glocker, MICCAI 2019), judged on patients left out.

An anchor is as wide and high as (base * scale / sqrt(ratio), base * scale * sqrt(ratio)), which is
how MMDetection makes them; the base is the stride of a feature map. Boxes and anchors are compared
by their sizes alone, as if they had one centre.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.optimize import differential_evolution

from deeplesion.errors import DataError

# The search looks at boxes of nearly one size together, a sixteenth of an octave (4 %) apart: the
# mean overlap of official boxes moves by 0.0003, and it takes the same time for any data set.
BINS_PER_OCTAVE = 16
# Ratios from 1 / 4 to 4: of the official boxes 99.8 % lie between 1 / 2.8 and 2.4.
MAX_RATIO = 4.0
POPULATION = 15  # times the number of unknowns
MUTATION = (0.3, 0.7)  # scipy's usual (0.5, 1) takes twice as long to the same anchors
TOLERANCE = 1e-3
GENERATIONS = 1000
# Digits of the result: of a stride of 4 px, scales in steps of 0.04 px.
SCALE_DIGITS, RATIO_DIGITS = 2, 3

MAX_FOLDS = 100

Progress = Callable[[int, float], None]


def anchor_sizes(bases: Sequence, scales: Sequence, ratios: Sequence) -> np.ndarray:
    """(bases * scales * ratios, 2) widths and heights in px of all anchors.

    Args:
        bases: px, one of each feature map.
        scales: times a base, the square root of an anchor's area.
        ratios: height by width.
    """
    sides = np.multiply.outer(np.asarray(bases, float), np.asarray(scales, float)).ravel()
    stretch = np.sqrt(np.asarray(ratios, float))
    return np.stack([np.outer(sides, 1 / stretch), np.outer(sides, stretch)], -1).reshape(-1, 2)


def best_overlaps(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(n,) the IoU of each box, (n, 2) widths and heights, with the best of (k, 2) anchors."""
    (width, height), area = boxes.T, boxes.prod(axis=1)
    best = np.zeros(len(boxes))
    for w, h in anchors:
        shared = np.minimum(width, w) * np.minimum(height, h)
        np.maximum(best, shared / (area + w * h - shared), out=best)
    return best


def optimal_anchors(
    boxes: np.ndarray,
    bases: Sequence,
    num_scales: int,
    num_ratios: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[float], list[float]]:
    """The scales and ratios whose anchors have the highest mean best overlap with the boxes.

    Scales are free, ratios come in pairs of r and 1 / r, and of an odd number one is 1, as in
    Improved RetinaNet.

    Args:
        boxes: (n, 2) widths and heights in px.
        bases: px, one of each feature map; all have the same scales and ratios.
        num_scales, num_ratios: how many there are to be.
        seed: of the evolution.
        progress: told after each generation its number and the mean best overlap reached.

    Returns:
        Scales and ratios, each ascending, rounded to 0.01 and 0.001.

    Raises:
        ValueError: boxes or bases that are not positive, or none; numbers below 1.
    """
    boxes, bases = _positive(boxes, "boxes"), _positive(bases, "bases")
    if num_scales < 1 or num_ratios < 1:
        raise ValueError(f"expected 1 scale and 1 ratio at least, got {num_scales}, {num_ratios}")
    kinds, share = _binned(boxes)
    sides = np.log(np.sqrt(kinds.prod(axis=1)))
    # With several bases a scale serves them all: from the smallest box on the largest map to the
    # largest box on the smallest.
    low, high = sides.min() - np.log(bases.max()), sides.max() - np.log(bases.min())
    bounds = [(low, max(high, low + 1e-6))] * num_scales
    bounds += [(0.0, np.log(MAX_RATIO))] * (num_ratios // 2)

    def anchors_of(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scales, halves = np.exp(unknowns[:num_scales]), np.exp(unknowns[num_scales:])
        return scales, np.concatenate([1 / halves, np.ones(num_ratios % 2), halves])

    area = kinds.prod(axis=1)

    def missed(unknowns: np.ndarray) -> float:
        anchors = anchor_sizes(bases, *anchors_of(unknowns))
        shared = np.minimum(anchors[:, :1], kinds[:, 0])
        shared *= np.minimum(anchors[:, 1:], kinds[:, 1])
        # The IoU grows with the shared part of both areas together: one division of the best.
        shared /= anchors.prod(axis=1)[:, None] + area
        best = shared.max(axis=0)
        return 1 - float(best / (1 - best) @ share)

    generation = 0

    def report(intermediate_result) -> None:
        nonlocal generation
        generation += 1
        if progress is not None:
            progress(generation, 1 - intermediate_result.fun)

    found = differential_evolution(
        missed,
        bounds,
        maxiter=GENERATIONS,
        popsize=POPULATION,
        mutation=MUTATION,
        tol=TOLERANCE,
        rng=seed,
        polish=False,  # the overlap has kinks, at which gradients mislead
        callback=report,
    )
    scales, ratios = anchors_of(found.x)
    return (
        [round(float(scale), SCALE_DIGITS) for scale in sorted(scales)],
        [round(float(ratio), RATIO_DIGITS) for ratio in sorted(ratios)],
    )


def held_out_overlaps(
    boxes: np.ndarray,
    patients: Sequence[Hashable],
    bases: Sequence,
    num_scales: int,
    num_ratios: int,
    folds: int = 5,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> np.ndarray:
    """(n,) best overlaps of boxes with anchors that were optimised on other patients.

    Arguments as of `optimal_anchors`, and:
        patients: n labels, that of each box.
        folds: the patients are split into so many parts, of which each is left out once.
        progress: told the fold, from 0, and what `optimal_anchors` tells.

    Raises DataError if there are fewer patients than folds.
    """
    fold = patient_folds(patients, folds, seed)
    best = np.empty(len(boxes))
    for left_out in range(folds):
        tell = None
        if progress is not None:

            def tell(generation: int, mean: float, left_out: int = left_out) -> None:
                progress(left_out, generation, mean)

        others = boxes[fold != left_out]
        anchors = optimal_anchors(others, bases, num_scales, num_ratios, seed, tell)
        chosen = fold == left_out
        best[chosen] = best_overlaps(boxes[chosen], anchor_sizes(bases, *anchors))
    return best


def overlap_summary(best: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> dict[str, dict]:
    """Of all boxes, and of those in each group that has any: their number (`boxes`), the `mean` of
    their best overlaps, and the shares `below_0.5` and `below_0.7`.

    Args:
        best: (n,) of `best_overlaps`.
        groups: (n,) the name of each box's group.
        names: in which order the groups come; the others follow.
    """
    order = [*names, *sorted(set(groups.tolist()) - set(names))]
    parts = {"all": np.ones(len(best), bool)} | {name: groups == name for name in order}
    return {
        name: {
            "boxes": int(part.sum()),
            "mean": float(best[part].mean()),
            "below_0.5": float((best[part] < 0.5).mean()),
            "below_0.7": float((best[part] < 0.7).mean()),
        }
        for name, part in parts.items()
        if part.any()
    }


def patient_folds(patients: Sequence[Hashable], folds: int, seed: int = 0) -> np.ndarray:
    """(n,) int, the fold of each item: all of one patient are in one, and the folds have equally
    many patients (or one more), drawn at random.

    Raises DataError if there are fewer patients than folds, and ValueError for less than 2 folds.
    """
    if folds < 2:
        raise ValueError(f"expected 2 folds at least, got {folds}")
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    if len(number) < folds:
        raise DataError(
            f"{len(number)} patients cannot be split into {folds} folds: give fewer folds or more"
            " data"
        )
    fold_of = np.random.default_rng(seed).permutation(len(number)) % folds
    return fold_of[[number[patient] for patient in patients]]


def _positive(values: Sequence | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, float)
    if not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} must be positive sizes in px, one at least")
    return values


def _binned(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(kinds, 2) mean size of the boxes of nearly one size, and (kinds,) their share of all."""
    cells = np.round(np.log2(boxes) * BINS_PER_OCTAVE).astype(int)
    _, kind, count = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    kind = kind.reshape(-1)
    means = [np.bincount(kind, boxes[:, axis]) / count for axis in (0, 1)]
    return np.stack(means, axis=1), count / count.sum()
