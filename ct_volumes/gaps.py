"""Where slices of a scan are missing, from the positions of those that are there."""

from __future__ import annotations

import numpy as np

from deeplesion.conventions import THICKNESS_MM

# An interval is a gap, slices missing, if it is so many times longer than those on both its sides.
# Where a scan goes on with thicker slices, one of the two is as long.
GAP = 1.5


def gaps(positions_mm: np.ndarray) -> np.ndarray:
    """(S - 1,) bool: between which neighbouring slices others are missing.

    An interval 1.5 times as long as those on both its sides, or longer than any CT slice is thick.
    """
    steps = np.diff(positions_mm)
    before, after = np.append(0.0, steps[:-1]), np.append(steps[1:], 0.0)
    beside = np.maximum(before, after)
    return ((steps > GAP * beside) & (beside > 0)) | (steps > THICKNESS_MM[1])


def parts(positions_mm: np.ndarray, longer_than_mm: float = 0.0) -> np.ndarray:
    """(S,) the number of the part of the scan that each slice lies in: behind each gap that is
    longer than `longer_than_mm` begins another."""
    walls = gaps(positions_mm) & (np.diff(positions_mm) > longer_than_mm)
    return np.append(0, np.cumsum(walls))
