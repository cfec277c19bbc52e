"""Which voxels around lesions are shown in a page whose size is limited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ct_volumes.lesions import Lesion
from ct_volumes.volume import CTVolume

PAGE_VOXELS = 18_000_000  # of all lesions together ...
LESION_VOXELS = 2_000_000  # ... and of one
MARGINS_MM = ((50, 15), (40, 15), (30, 12), (20, 10))  # beside a lesion; above and below it
DEPTH_SLICES = 2  # above and below, at least
FEWEST_SLICES = 9  # that are to fit before pixels are left out


@dataclass(frozen=True)
class Crop:
    """A part of a volume.

    Attributes:
        x, y: the first pixel.
        width, height: how many pixels are shown, `stride` pixels of the volume apart.
        slices: of the volume, in order.
        every: 1 if all slices from the first to the last are shown, 2 of about every second one ...
    """

    x: int
    y: int
    width: int
    height: int
    slices: tuple[int, ...]
    stride: int = 1
    every: int = 1

    @property
    def voxels(self) -> int:
        return len(self.slices) * self.width * self.height

    def of(self, hu: np.ndarray) -> np.ndarray:
        """An (S, H, W) array -> (slices, height, width)."""
        part = hu[list(self.slices), self.y :: self.stride, self.x :: self.stride]
        return part[:, : self.height, : self.width]


def crop_lesions(lesions: Sequence[Lesion], volume: CTVolume) -> list[Crop]:
    """One crop a lesion, in their order.

    All have the same margin, the widest of `MARGINS_MM` with which none has more than
    `LESION_VOXELS` and all together no more than `PAGE_VOXELS`. Where the narrowest is still too
    much, those above a limit, set so that all fit, are thinned out: to every second slice, every
    third, and so on, but the first, last, best and measured slice of the lesion stay; and to every
    second pixel and so on, if otherwise not even nine slices were left.
    """
    for margin, depth in MARGINS_MM:
        crops = [_crop(lesion, volume, margin, depth) for lesion in lesions]
        limit = _limit([crop.voxels for crop in crops])
        if all(crop.voxels <= limit for crop in crops):
            return crops
    return [_thin(crop, lesion, limit) for crop, lesion in zip(crops, lesions, strict=True)]


def _limit(sizes: list[int]) -> int:
    """How many voxels each lesion may have, if what the small ones leave is for the others."""
    left = PAGE_VOXELS
    for others, size in zip(range(len(sizes), 0, -1), sorted(sizes), strict=True):
        if size * others > left:
            return min(left // others, LESION_VOXELS)
        left -= size
    return LESION_VOXELS


def _crop(lesion: Lesion, volume: CTVolume, margin: float, depth: float) -> Crop:
    """A square in mm around the lesion's boxes, moved or cut to lie in the slice."""
    positions = volume.positions_mm
    near = (positions >= positions[lesion.first] - depth) & (
        positions <= positions[lesion.last] + depth
    )
    index = np.arange(len(positions))
    near |= (index >= lesion.first - DEPTH_SLICES) & (index <= lesion.last + DEPTH_SLICES)
    box, (row, column) = lesion.box, volume.spacing_mm
    side = max((box[3] - box[0]) * column, (box[4] - box[1]) * row) + 2 * margin
    ranges = []
    for low, high, spacing, size in zip(
        box[:2], box[3:5], (column, row), volume.hu.shape[:0:-1], strict=True
    ):
        length = min(int(np.ceil(side / spacing)) + 1, size)
        start = int(np.clip(round((low + high - length + 1) / 2), 0, size - length))
        ranges.append((start, length))
    (x, width), (y, height) = ranges
    return Crop(x, y, width, height, tuple(np.flatnonzero(near).tolist()))


def _thin(crop: Crop, lesion: Lesion, limit: int) -> Crop:
    stride, width, height = 1, crop.width, crop.height
    while width * height * min(FEWEST_SLICES, len(crop.slices)) > limit and stride < crop.width:
        stride += 1
        width, height = -(-crop.width // stride), -(-crop.height // stride)
    every = -(-len(crop.slices) * width * height // limit)
    own = {lesion.first, lesion.last, lesion.best.index, lesion.recist_index}
    kept = tuple(k for k in crop.slices if k in own or (k - lesion.recist_index) % every == 0)
    return replace(crop, width=width, height=height, stride=stride, slices=kept, every=every)
