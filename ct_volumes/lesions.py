"""A lesion in 3D: what linking makes of the detections of single slices, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class SliceDetections:
    """What a detector found on one slice, in pixel centres of the volume.

    Attributes:
        index: of the slice.
        boxes: (n, 4) float x1, y1, x2, y2.
        scores: (n,) float.
        masks: n `Patch`es, or None of a detector without masks.
    """

    index: int
    boxes: np.ndarray
    scores: np.ndarray
    masks: tuple[Patch, ...] | None = None


@dataclass(frozen=True, eq=False)
class Patch:
    """The part of a slice's mask that is not empty: `mask` (h, w) bool, its corner at pixel
    (x, y). The whole mask of a slice takes a hundred times the memory."""

    x: int
    y: int
    mask: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray) -> Patch:
        """Of the (H, W) mask of a slice; an empty one has an empty patch."""
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return cls(0, 0, np.zeros((0, 0), bool))
        top, left = int(rows[0]), int(columns[0])
        return cls(left, top, mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(bool))

    def paint(self, slice_: np.ndarray, value: object = True) -> None:
        """Writes `value` into an (H, W) array where the mask is."""
        height, width = self.mask.shape
        slice_[self.y : self.y + height, self.x : self.x + width][self.mask] = value


@dataclass(frozen=True, eq=False)
class LesionSlice:
    """A lesion on one slice.

    Attributes:
        index: of the slice.
        bbox: (4,) x1, y1, x2, y2, pixel centres.
        score: of the detection; None where the slice lies between detected ones, box and mask
            interpolated, or up to half-way from the outermost to the next slice looked at.
        patch: the mask; never empty (of a detector without masks the ellipse in the box).
    """

    index: int
    bbox: np.ndarray
    score: float | None
    patch: Patch


@dataclass(frozen=True, eq=False)
class Lesion:
    """A lesion in 3D.

    Attributes:
        score: of its best slice.
        slices: `LesionSlice`s, head to feet, every slice of the volume from the first to the last.
        volume_mm3: areas of the masks times what belongs to each slice (`CTVolume.extent_mm`; gaps
            within the lesion are filled).
        centroid_mm: (3,) in LPS, of the masks, weighted as the volume is.
        recist: (4, 2) x, y end points, long then short axis, on slice `recist_index`, the one with
            the longest long axis.
        recist_index: of that slice in the volume.
        diameters_mm: (2,) long and short axis.
    """

    score: float
    slices: tuple[LesionSlice, ...]
    volume_mm3: float
    centroid_mm: np.ndarray
    recist: np.ndarray
    recist_index: int
    diameters_mm: np.ndarray

    @property
    def first(self) -> int:
        return self.slices[0].index

    @property
    def last(self) -> int:
        return self.slices[-1].index

    @property
    def box(self) -> np.ndarray:
        """(6,) x1, y1, first slice, x2, y2, last slice, around the boxes of all its slices."""
        boxes = np.stack([s.bbox for s in self.slices])
        return np.array([*boxes[:, :2].min(0), self.first, *boxes[:, 2:].max(0), self.last])

    @property
    def best(self) -> LesionSlice:
        """The slice of the highest score."""
        return max(self.slices, key=lambda s: -1 if s.score is None else s.score)

    def labels(self, shape: tuple[int, int, int], value: int = 1) -> np.ndarray:
        """(S, H, W) uint16: `value` where the lesion is."""
        labels = np.zeros(shape, np.uint16)
        for each in self.slices:
            each.patch.paint(labels[each.index], value)
        return labels


@dataclass(frozen=True)
class Algorithm:
    """What found the lesions: it stands in every file that leaves.

    Attributes:
        name: of the experiment, such as 'alignshift_3slice'.
        version: of this software.
        checkpoint_sha256: hash of the weights' file.
        options: what else decided the result (interval, thresholds ...), as JSON can hold it.
    """

    name: str
    version: str
    checkpoint_sha256: str
    options: dict = field(default_factory=dict)
