"""Masks between two slices, by shape-based interpolation, and the mask of a box without one.

The signed distances to the two outlines are interpolated, not the masks (Raya and Udupa, IEEE
Trans. Med. Imaging 1990); the masks are laid on each other at their centroids first, so that a
lesion that runs obliquely moves on from slice to slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from ct_volumes.lesions import Patch

MARGIN = 3  # pixels around the masks in which distances are known; they move by less than two
ON_OUTLINE_MM = 1e-4  # signed distances so near to the outline are on it, whatever was rounded


def interpolate(
    first: Patch,
    last: Patch,
    fractions: Sequence[float],
    spacing_mm: tuple[float, float],
    shape: tuple[int, int],
) -> list[Patch]:
    """The masks of slices between two.

    Args:
        first, last: masks that are not empty.
        fractions: where each slice lies, from 0 (at `first`) to 1 (at `last`).
        spacing_mm: of rows, of columns.
        shape: (H, W) of the slices.

    Returns:
        a patch for each fraction, within the slice and never empty: where two shapes have nothing
        in common, the mask of the nearer slice; half-way between them, the larger one.
    """
    patches = (first, last)
    centres = [centroid(patch) for patch in patches]
    nearest = [np.round(centre).astype(int) for centre in centres]
    # Both masks in one frame, which counts from the pixel that is nearest to their centroid.
    corners = np.array([(p.x, p.y) - n for p, n in zip(patches, nearest)])
    sizes = np.array([p.mask.shape[::-1] for p in patches])
    low, high = corners.min(axis=0) - MARGIN, (corners + sizes).max(axis=0) + MARGIN
    distances = []
    for patch, (x, y) in zip(patches, corners - low):
        frame = np.zeros((high - low)[::-1], bool)
        frame[y : y + patch.mask.shape[0], x : x + patch.mask.shape[1]] = patch.mask
        distances.append(signed_distance(frame, spacing_mm))

    between = []
    for fraction in fractions:
        centre = (1 - fraction) * centres[0] + fraction * centres[1]
        whole = np.floor(centre).astype(int)
        distance = sum(
            weight * _moved(d, whole - centre + c - n)
            for weight, d, c, n in zip((1 - fraction, fraction), distances, centres, nearest)
        )
        corner = whole + low + 2  # `_moved` takes two pixels off each side
        patch = _in_slice(distance >= -ON_OUTLINE_MM, corner, shape)
        between.append(patch if patch.mask.size else _nearer(patches, fraction))
    return between


def _nearer(patches: tuple[Patch, Patch], fraction: float) -> Patch:
    def order(i: int) -> tuple:
        patch, away = patches[i], round(abs(i - fraction), 6)
        # The last ones decide between equals, so that a volume upside down gives the same.
        return away, -np.count_nonzero(patch.mask), patch.y, patch.x, patch.mask.tobytes()

    return patches[min((0, 1), key=order)]


def signed_distance(mask: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """(H, W) mm from each pixel's centre to the outline of a mask, positive inside.

    Distance transforms measure to the nearest pixel on the other side; the outline lies half a
    pixel before it. The mask holds pixels of both sides.
    """
    row, column = spacing_mm
    half = min(spacing_mm) / 2
    if row == column:  # several times as fast as SciPy, but for square pixels alone
        inside, outside = (
            row * cv2.distanceTransform(side.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            for side in (mask, ~mask)
        )
    else:
        inside = distance_transform_edt(mask, sampling=spacing_mm)
        outside = distance_transform_edt(~mask, sampling=spacing_mm)
    return np.where(mask, inside - half, half - outside)


def shrink(patch: Patch, share: float, spacing_mm: tuple[float, float]) -> Patch:
    """The part of a mask that lies farthest inside: this share of its pixels, at least one.

    Of pixels equally far from the outline those nearest to the centroid belong to it first.
    """
    inside = signed_distance(np.pad(patch.mask, 1), spacing_mm)[1:-1, 1:-1][patch.mask]
    rows, columns = np.nonzero(patch.mask)
    x, y = (centroid(patch) - (patch.x, patch.y)).tolist()
    from_centre = np.hypot((columns - x) * spacing_mm[1], (rows - y) * spacing_mm[0])
    first = np.lexsort((from_centre, -np.round(inside, 6)))[: max(1, round(share * len(rows)))]
    mask = np.zeros_like(patch.mask)
    mask[rows[first], columns[first]] = True
    return _patch_at(mask, patch.x, patch.y)


def ellipse(box: np.ndarray, shape: tuple[int, int]) -> Patch:
    """The pixel centres within the ellipse that fills a box; at least the pixel nearest to its
    middle.

    Args:
        box: (4,) x1, y1, x2, y2, which touches the slice.
        shape: (H, W) of the slice.
    """
    box = np.asarray(box, np.float64)
    corner = np.floor(box[:2]).astype(int)
    x, y = (np.arange(low, np.ceil(high) + 1) for low, high in zip(corner, box[2:]))
    centre, half = (box[:2] + box[2:]) / 2, np.maximum((box[2:] - box[:2]) / 2, 1e-9)
    u, v = (x - centre[0]) / half[0], (y - centre[1]) / half[1]
    patch = _in_slice(u**2 + v[:, None] ** 2 <= 1, corner, shape)
    if not patch.mask.size:
        x, y = np.clip(np.round(centre), 0, np.array(shape[::-1]) - 1).astype(int).tolist()
        patch = Patch(x, y, np.ones((1, 1), bool))
    return patch


def centroid(patch: Patch) -> np.ndarray:
    """(2,) mean x, y of a mask's pixels."""
    moments = cv2.moments(np.ascontiguousarray(patch.mask).view(np.uint8), binaryImage=True)
    middle = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
    return middle + (patch.x, patch.y)


def _moved(array: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The array at places moved by less than two pixels (x, y), linear in between, without two
    pixels on each side."""
    for axis, step in ((1, by[0]), (0, by[1])):
        whole = int(np.floor(step))
        rest = step - whole
        length = array.shape[axis] - 4
        here = np.take(array, range(2 + whole, 2 + whole + length), axis)
        if rest:
            there = np.take(array, range(3 + whole, 3 + whole + length), axis)
            here = (1 - rest) * here + rest * there
        array = here
    return array


def _in_slice(mask: np.ndarray, corner: np.ndarray, shape: tuple[int, int]) -> Patch:
    """The part of a mask whose first pixel lies at `corner` (x, y) that is within the slice."""
    left, top = np.maximum(-np.asarray(corner), 0).tolist()
    x, y = (int(c) + cut for c, cut in zip(corner, (left, top)))
    bottom, right = max(top, top + shape[0] - y), max(left, left + shape[1] - x)
    return _patch_at(mask[top:bottom, left:right], x, y)


def _patch_at(mask: np.ndarray, x: int, y: int) -> Patch:
    patch = Patch.of(mask)
    return Patch(patch.x + x, patch.y + y, patch.mask)
