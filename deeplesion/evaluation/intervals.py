"""95 % intervals by bootstrap over patients. Needs NumPy alone."""

from __future__ import annotations

import numpy as np

QUANTILES = (0.025, 0.975)  # the ends of a 95 % interval

MIN_RESAMPLES = 100  # fewer say nothing about a 2.5 % quantile


def check_resamples(resamples: int) -> None:
    """Raises ValueError where the number of resamples is too small for a 95 % interval."""
    if resamples < MIN_RESAMPLES:
        raise ValueError(
            f"resamples must be at least {MIN_RESAMPLES} for a 95 % interval (1000 is usual), got "
            f"{resamples}"
        )


def with_lesions(drawn: np.ndarray) -> np.ndarray:
    """The draws that hold a lesion; the others are rows of NaN."""
    return drawn[~np.isnan(drawn).any(axis=1)]
