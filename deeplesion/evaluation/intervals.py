"""95 % intervals by bootstrap over patients, whose images are alike. Needs NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

QUANTILES = (0.025, 0.975)  # the ends of a 95 % interval
MIN_PATIENTS = 2  # of one all resamples are equal: an interval without width says nothing
MIN_RESAMPLES = 100  # fewer say nothing about a 2.5 % quantile


def check_resamples(resamples: int) -> None:
    """Raises ValueError where the number of resamples is too small for a 95 % interval."""
    if resamples < MIN_RESAMPLES:
        raise ValueError(
            f"resamples must be at least {MIN_RESAMPLES} for a 95 % interval (1000 is usual), got "
            f"{resamples}"
        )


def draw_groups(groups: Sequence, number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws groups with replacement, as many as there are, `number` times.

    The same groups and seed give the same draws, so that what is computed from two detectors on the
    same images, or from a set and a part of it, can be subtracted draw by draw.

    Args:
        groups: (n,) the label of each item, such as the patient of each image.
        number: how many draws.
        seed: of the random generator.

    Returns:
        (n,) the number of each item's group, and (number, groups) how often each is drawn.
    """
    labels, group = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    times = np.stack(
        [np.bincount(rng.integers(len(labels), size=len(labels)), minlength=len(labels))
         for _ in range(number)]
    )  # fmt: skip
    return group, times


def with_lesions(drawn: np.ndarray) -> np.ndarray:
    """The draws that hold a lesion; the others are rows of NaN."""
    return drawn[~np.isnan(drawn).any(axis=1)]
