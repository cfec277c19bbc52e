"""Maximum-intensity projections of a whole scan, coronal and sagittal, and where a point of it lies
in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ct_volumes.hounsfield import AIR_HU
from ct_volumes.volume import CTVolume

LONGER_SIDE = 420  # pixels
GREY_HU = (-150, 1050)  # from black to white


@dataclass(frozen=True, eq=False)
class Projection:
    """A view at right angles to the slices' normal, head at the top, in square pixels.

    Attributes:
        grey: (h, w) uint8.
        pixel_mm: size of a pixel.
        corner_mm: of the picture's upper left corner, along `across` and `down`.
        across, down: (3,) unit vectors in LPS; `down` is the slices' normal.
    """

    grey: np.ndarray
    pixel_mm: float
    corner_mm: tuple[float, float]
    across: np.ndarray
    down: np.ndarray

    def place(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) mm in LPS -> (..., 2) x, y in pixels from the upper left corner."""
        return (
            points @ np.stack([self.across, self.down], axis=1) - self.corner_mm
        ) / self.pixel_mm


def project(volume: CTVolume) -> dict[str, Projection]:
    """'coronal' (right on the left) and 'sagittal' (anterior on the left), at one scale.

    Each slice fills what belongs to it along the normal (`CTVolume.reach_mm`) and lies where a
    tilted gantry moved it: no distance is taken for another. Gaps are as black as air.
    """
    starts, ends = volume.positions_mm + (volume.reach_mm * [-1, 1]).T
    row, column = volume.spacing_mm
    views = {
        "coronal": (volume.hu.max(axis=1), volume.row_direction, column),
        "sagittal": (volume.hu.max(axis=2), volume.column_direction, row),
    }
    sides = {}
    for name, (lines, across, spacing) in views.items():
        offsets = volume.origins_mm @ across
        left = offsets.min() - spacing / 2
        sides[name] = (offsets, left, offsets.max() + (lines.shape[1] - 0.5) * spacing - left)
    height = ends[-1] - starts[0]
    pixel = max(height, *(width for _, _, width in sides.values())) / LONGER_SIDE
    # The slices that each row of pixels meets.
    edges = starts[0] + pixel * np.arange(max(round(height / pixel), 1) + 1)
    firsts = np.searchsorted(ends, edges[:-1], "right")
    lasts = np.searchsorted(starts, edges[1:], "left")

    projections = {}
    for name, (lines, across, spacing) in views.items():
        offsets, left, width = sides[name]
        grid = left + pixel * (np.arange(max(round(width / pixel), 1)) + 0.5)
        own = np.arange(lines.shape[1]) * spacing
        placed = np.stack(
            [
                np.interp(grid, offset + own, line, left=AIR_HU, right=AIR_HU)
                for offset, line in zip(offsets, lines, strict=True)
            ]
        )
        hu = np.stack(
            [placed[a:b].max(axis=0, initial=AIR_HU) for a, b in zip(firsts, lasts, strict=True)]
        )
        grey = np.interp(hu, GREY_HU, (0, 255)).round().astype(np.uint8)
        projections[name] = Projection(grey, pixel, (left, starts[0]), across, volume.normal)
    return projections
