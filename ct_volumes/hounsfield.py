"""Stored values -> Hounsfield units in int16, and telling values that are none."""

from __future__ import annotations

import math

import numpy as np

from deeplesion.errors import DataError

AIR_HU = -1000
PADDING_HU = -1024  # of pixels without a value: the least that a CT of 12 bits holds, shown as air
INT16 = np.iinfo(np.int16)
OFFSETS = (1024, 32768)  # with which HU are stored in unsigned files: by scanners, in DeepLesion
LEAST_SPREAD = 100  # HU between the least and the largest value of anything that was scanned


def room_for(shape: tuple[int, int, int], name: object) -> np.ndarray:
    """An int16 array. Raises DataError if it is larger than the memory."""
    try:
        return np.empty(shape, np.int16)
    except (MemoryError, ValueError):
        size = 2 * math.prod(shape) / 1e9
        raise DataError(f"{name} needs {size:,.1f} GB of memory, more than there is") from None


def to_hu(
    stored: np.ndarray, slope: float, intercept: float, padding: np.ndarray | None = None
) -> tuple[np.ndarray, bool]:
    """Stored values of any number type -> int16 HU (stored * slope + intercept), rounded.

    What does not fit into int16 is clipped. `padding`: (same shape) bool, pixels without a value;
    these and NaN become `PADDING_HU`. Returns the HU and whether any were clipped.
    """
    small = stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2
    if small and slope == 1 and float(intercept).is_integer() and abs(intercept) < 1 << 30:
        hu = stored.astype(np.int32)
        hu += int(intercept)
    else:
        with np.errstate(all="ignore"):  # what overflows is clipped below
            hu = stored.astype(np.float64) * slope + intercept
    if hu.dtype.kind == "f":
        np.rint(hu, out=hu)
        unknown = np.isnan(hu)
        if unknown.any():
            padding = unknown if padding is None else padding | unknown
    if padding is not None:
        hu[padding] = PADDING_HU
    clipped = bool(hu.size and (hu.min() < INT16.min or hu.max() > INT16.max))
    if clipped:
        np.clip(hu, INT16.min, INT16.max, out=hu)
    return hu.astype(np.int16), clipped


def offset_of(values: np.ndarray) -> int:
    """What to subtract from the values of a volume, of any whole-number type, to get HU.

    0 where any is negative: then they may be HU as they are. A volume without negative values has
    no air and no fat, so they are no HU; where subtracting one of `OFFSETS` shows both air and soft
    tissue, it is that one. Raises ValueError, with the reason, if neither makes HU of them.
    """
    low, high = int(values.min()), int(values.max())
    if high - low < LEAST_SPREAD:
        raise ValueError(f"the values go from {low} to {high} only")
    if low < 0:
        return 0
    steps = [max(len(values) // 64, 1)] + [4] * (values.ndim - 1)
    sample = values[tuple(slice(None, None, step) for step in steps)].astype(np.int32)
    if sample.size < 1000:
        sample = values.astype(np.int32)
    for offset in OFFSETS:
        hu = sample - offset
        air = ((hu >= -1100) & (hu <= -700)).mean()
        soft_tissue = ((hu >= -200) & (hu <= 300)).mean()
        if air > 0.005 and soft_tissue > 0.01:
            return offset
    raise ValueError(f"the values go from {low} to {high}: there is no air and no fat among them")
