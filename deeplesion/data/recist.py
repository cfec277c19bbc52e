"""RECIST geometry: a lesion's mask from its two diameters, and the two diameters of a mask.

All coordinates are (x, y) in 0-based pixel centres. A RECIST measurement is a (4, 2) array: both
ends of the long axis, then both ends of the short axis. Needs NumPy and OpenCV.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from deeplesion.conventions import HU_WINDOW

GRABCUT_ITERATIONS = 3
# Found on the phantom, see docs/masks.md. A reader's end points lie on the outline or a little
# beyond: what is surely lesion and what may be is drawn with both axes scaled about their middle.
CORE_SCALE = 0.9
REACH_SCALE = 1.2
# Pixels around the box that the background's grey levels are learnt from.
MARGIN = 8
# The grey window reaches as far from the lesion's HU as its surroundings differ, at least so many
# HU: as little as can be is lost to 8 bits, and a lesion like its surroundings is not all noise.
MIN_HALF_WINDOW = 60


@dataclass(frozen=True, eq=False)
class Diameters:
    """The RECIST measurement of a mask.

    Attributes:
        recist: (4, 2) float64 end points x, y: long axis, then short axis.
        lengths_px: (2,) long and short diameter in pixels.
        lengths_mm: (2,) the same in millimetres.
    """

    recist: np.ndarray
    lengths_px: np.ndarray
    lengths_mm: np.ndarray


def mask_from_recist(hu: np.ndarray, bbox: np.ndarray, recist: np.ndarray) -> np.ndarray:
    """Mask of one lesion by GrabCut from its RECIST diameters.

    The recipe is that of Improved RetinaNet (Zlocha et al., MICCAI 2019): outside the box is
    background, inside probable foreground, the quadrilateral of the diameters' end points
    foreground; three iterations. What differs, because it brings the masks nearer to the truth
    (docs/masks.md): grey levels are a window around the lesion's own HU, as wide as its contrast
    asks for, and nothing wraps around; beyond the RECIST ellipse scaled by 1.2 is background too;
    the quadrilateral is scaled by 0.9; only the box and a few pixels around it are looked at; and
    of the result the part that holds the quadrilateral is kept, its holes filled. Where GrabCut
    cannot run the mask is the RECIST ellipse, or the box where that lies outside it.

    The same lesion gives the same mask in any order of calls: OpenCV's random generator is seeded
    anew for each.

    Args:
        hu: (H, W) int16 slice in Hounsfield units.
        bbox: (4,) x1, y1, x2, y2; clipped to the image.
        recist: (4, 2) end points of the long, then the short axis; may reach outside the image.

    Returns:
        (H, W) bool, inside the box and never empty.

    Raises:
        ValueError: wrong shapes, non-finite coordinates, or a box outside the image.
    """
    if hu.ndim != 2:
        raise ValueError(f"hu must be one (H, W) slice, got shape {hu.shape}")
    recist = _checked_recist(recist)
    left, top, right, bottom = _pixels_of_box(bbox, hu.shape)

    # Work on the surroundings; x0, y0 is their corner in the image.
    x0, y0 = max(left - MARGIN, 0), max(top - MARGIN, 0)
    crop = hu[y0 : bottom + MARGIN, x0 : right + MARGIN]
    recist = recist - (x0, y0)
    in_box = np.zeros(crop.shape, bool)
    in_box[top - y0 : bottom - y0, left - x0 : right - x0] = True
    core = quadrilateral_from_recist(_scaled(recist, CORE_SCALE), crop.shape) & in_box
    reach = ellipse_from_recist(_scaled(recist, REACH_SCALE), crop.shape) & in_box | core

    if core.any() and not reach.all():
        foreground = _grabcut(_grey_levels(crop, core, ~reach), core, reach)
        mask = _whole_lesion(foreground, core, reach)
    else:
        mask = ellipse_from_recist(recist, crop.shape) & in_box
    if not mask.any():
        # Diameters that miss the box altogether: nothing but the box is known.
        mask = in_box

    whole = np.zeros(hu.shape, bool)
    whole[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = mask
    return whole


def released_mask_from_recist(hu: np.ndarray, bbox: np.ndarray, recist: np.ndarray) -> np.ndarray:
    """Mask of one lesion as the released code drew it, to train as the published runs did.

    The recipe of Improved RetinaNet (Zlocha et al., MICCAI 2019) as it stands, see
    `mask_from_recist`, on the whole slice, whose grey levels are the network's input cast to 8
    bits: HU in [-1024, 2050] become -50 to 205, and what is negative wraps around. Lung and air,
    below -433 HU, come out as bright as bone. The cast of a negative number is undefined in C; here
    it is the remainder by 256, as most machines have it. OpenCV's random generator is seeded, which
    it was not there, so the published masks themselves cannot be had. Where GrabCut cannot run or
    finds nothing, the mask is the box.

    Arguments, result and errors are those of `mask_from_recist`, but that the quadrilateral belongs
    to the mask wherever it leaves the box.
    """
    if hu.ndim != 2:
        raise ValueError(f"hu must be one (H, W) slice, got shape {hu.shape}")
    core = quadrilateral_from_recist(recist, hu.shape)
    left, top, right, bottom = _pixels_of_box(bbox, hu.shape)
    in_box = np.zeros(hu.shape, bool)
    in_box[top:bottom, left:right] = True
    if (in_box | core).all():
        return in_box
    mask = _grabcut(released_grey_levels(hu), core, in_box)
    return mask if mask.any() else in_box


def released_grey_levels(hu: np.ndarray) -> np.ndarray:
    """HU -> the released code's uint8 grey levels: windowed, minus 50, modulo 256."""
    low, high = HU_WINDOW
    grey = (np.clip(hu, low, high) - float(low)) * (255 / (high - low)) - 50
    return (np.trunc(grey).astype(np.int64) % 256).astype(np.uint8)


def quadrilateral_from_recist(recist: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixel centres within the quadrilateral of the four end points.

    The pixels nearest to the two axes belong to it, so that it is empty only where the measurement
    lies outside the image.
    """
    recist = _checked_recist(recist)
    hull = cv2.convexHull(recist.astype(np.float32))[:, 0].astype(np.float64)
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside = np.full(shape, len(hull) > 2)
    for a, b in zip(hull, np.roll(hull, -1, axis=0), strict=True):
        inside &= (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) >= 0

    for a, b in (recist[:2], recist[2:]):
        steps = np.linspace(0, 1, 2 + int(2 * np.hypot(*(b - a))))[:, None]
        x, y = np.round(a + steps * (b - a)).astype(int).T
        visible = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
        inside[y[visible], x[visible]] = True
    return inside


def ellipse_from_recist(recist: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixel centres within the ellipse that has the two axes as conjugate diameters.

    It is as long as the long axis and as wide as the short one, and lies where they reach: the two
    need not halve each other. A zero axis is taken as one pixel wide.
    """
    recist = _checked_recist(recist)
    long_half, short_half = (recist[1] - recist[0]) / 2, (recist[3] - recist[2]) / 2
    if np.hypot(*long_half) < 0.5:
        long_half = np.array([0.5, 0.0])
    normal = np.array([-long_half[1], long_half[0]]) / np.hypot(*long_half)
    if abs(short_half @ normal) < 0.5:
        short_half = 0.5 * normal
    to_unit_disc = np.linalg.inv(np.stack([long_half, short_half], axis=1))

    # The middle of the long axis, moved along the short one to be abreast of its middle.
    long_middle, short_middle = recist[:2].mean(axis=0), recist[2:].mean(axis=0)
    centre = long_middle + (to_unit_disc @ (short_middle - long_middle))[1] * short_half
    y, x = np.mgrid[: shape[0], : shape[1]]
    u, v = np.tensordot(to_unit_disc, np.stack([x - centre[0], y - centre[1]]), axes=1)
    return u**2 + v**2 <= 1


def recist_from_mask(mask: np.ndarray, spacing_mm: float | tuple[float, float]) -> Diameters:
    """Long and short axis of a mask, as RECIST defines them (Eisenhauer et al., 2009).

    Of several pieces the largest is measured, on its outline: half-way between the pixels that
    belong to it and those that do not, so that one pixel is one pixel long and a drawn disc as long
    as its diameter. `recist_from_contour` says what the axes are. Where pixels are not square the
    axes are the longest in mm and at right angles in mm, not in pixels.

    Args:
        mask: (H, W) bool or 0/1.
        spacing_mm: size of a pixel in mm: one number, or that of rows and that of columns (along y
            and along x).

    Raises:
        ValueError: an empty mask, not two dimensions, or a spacing that is not positive.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or not mask.any():
        raise ValueError(f"mask must be (H, W) with at least one pixel, got shape {mask.shape}")
    spacing = np.asarray(spacing_mm, np.float64)
    if spacing.shape not in ((), (2,)) or not ((spacing > 0) & (spacing < np.inf)).all():
        raise ValueError(
            f"spacing_mm must be a positive size of a pixel, or two (of rows, of columns), got"
            f" {spacing_mm}"
        )
    row, column = np.broadcast_to(spacing, 2).tolist()
    recist = recist_from_contour(mask_outline(mask), aspect=row / column)
    ends = recist[1::2] - recist[::2]
    lengths = np.linalg.norm(ends, axis=1)
    if row == column:
        return Diameters(recist, lengths, lengths * row)
    return Diameters(recist, lengths, np.linalg.norm(ends * (column, row), axis=1))


def mask_outline(mask: np.ndarray) -> np.ndarray:
    """(n, 2) corners x, y of the outer outline of the largest piece of an (H, W) mask.

    The line at which the mask, linear between pixel centres, is a half; pixels that touch at a
    corner belong together. Raises ValueError if the mask is empty.
    """
    mask = np.ascontiguousarray(mask, np.uint8)
    left, top, width, height = cv2.boundingRect(mask)
    if width == 0:
        raise ValueError(f"mask must have at least one pixel, got an empty one of {mask.shape}")
    # Every second sample is a pixel of the padded mask, the others lie half-way in between.
    fine = np.zeros((2 * height + 5, 2 * width + 5), np.uint8)
    fine[3:-3:2, 3:-3:2] = mask[top : top + height, left : left + width] != 0
    fine = cv2.filter2D(fine, -1, np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32)) >= 2
    pieces = cv2.findContours(fine.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    largest = max(pieces, key=cv2.contourArea)
    return largest[:, 0] / 2 + (left - 1.5, top - 1.5)


def recist_from_contour(contour: np.ndarray, aspect: float = 1.0) -> np.ndarray:
    """The RECIST measurement of a closed polygon: (n, 2) corners x, y -> (4, 2) end points.

    The long axis is the polygon's diameter, the longest distance of two corners of its convex hull.
    The short axis is the longest perpendicular: of all lines at right angles to the long axis, the
    one whose outermost crossings with the polygon lie farthest apart.

    Args:
        contour: (n, 2).
        aspect: the height of a pixel divided by its width, with which lengths and right angles are
            measured.
    """
    contour = np.asarray(contour, np.float64).reshape(-1, 2)
    corners = cv2.convexHull(contour.astype(np.float32), returnPoints=False)[:, 0]
    contour = contour * (1.0, aspect)
    hull = contour[corners]
    lengths = np.linalg.norm(hull[:, None] - hull, axis=2)
    start, end = hull[list(np.unravel_index(lengths.argmax(), lengths.shape))]
    length = lengths.max()
    if length == 0:
        return np.repeat(start[None], 4, axis=0) / (1.0, aspect)

    # Along and across the long axis. Between two corners both outermost crossings move on straight
    # lines, so the widest place is at a corner: each edge is measured at all corners it passes.
    direction = (end - start) / length
    normal = np.array([-direction[1], direction[0]])
    along, across = (contour - start) @ direction, (contour - start) @ normal
    next_along, next_across = np.roll(along, -1), np.roll(across, -1)
    places = np.unique(along)
    first = np.searchsorted(places, np.minimum(along, next_along))
    count = np.searchsorted(places, np.maximum(along, next_along), side="right") - first
    edge = np.repeat(np.arange(len(contour)), count)
    place = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - first, count)
    run = np.where(next_along == along, 1.0, next_along - along)
    rise = (next_across - across) / run
    height = across[edge] + (places[place] - along[edge]) * rise[edge]
    above, below = np.full(len(places), -np.inf), np.full(len(places), np.inf)
    np.maximum.at(above, place, height)
    np.minimum.at(below, place, height)
    widest = np.argmax(above - below)
    foot = start + places[widest] * direction
    ends = [start, end, foot + above[widest] * normal, foot + below[widest] * normal]
    return np.stack(ends) / (1.0, aspect)


def _checked_recist(recist: np.ndarray) -> np.ndarray:
    recist = np.asarray(recist, np.float64)
    if recist.shape != (4, 2) or not np.isfinite(recist).all():
        raise ValueError(
            "recist must be 4 finite end points (x, y), long axis then short axis, got "
            f"{recist.tolist()}"
        )
    return recist


def _pixels_of_box(bbox: np.ndarray, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels in a box and the image; the last two exclusive."""
    bbox = np.asarray(bbox, np.float64)
    if bbox.shape != (4,) or not np.isfinite(bbox).all() or (bbox[2:] < bbox[:2]).any():
        raise ValueError(
            f"bbox must be finite x1 <= x2, y1 <= y2 in 4 numbers, got {bbox.tolist()}"
        )
    size = np.array(shape[::-1])
    if (bbox[2:] < -0.5).any() or (bbox[:2] > size - 0.5).any():
        raise ValueError(f"bbox {bbox.tolist()} lies outside its {size[0]} x {size[1]} image")
    first, last = np.ceil(bbox[:2]), np.floor(bbox[2:])
    # A box between two pixel centres holds none: take the nearest.
    nearest = np.round((bbox[:2] + bbox[2:]) / 2)
    first, last = np.where(last < first, nearest, first), np.where(last < first, nearest, last)
    first, last = np.clip([first, last], 0, size - 1).astype(int)
    return first[0], first[1], last[0] + 1, last[1] + 1


def _scaled(recist: np.ndarray, scale: float) -> np.ndarray:
    centre = recist.mean(axis=0)
    return centre + scale * (recist - centre)


def _grey_levels(hu: np.ndarray, core: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Grey levels (uint8) of HU: the core's median is mid-grey, the background's black or white."""
    level = np.median(hu[core])
    half_window = max(abs(level - np.median(hu[background])), MIN_HALF_WINDOW)
    return np.clip(127.5 + (hu - level) * (127.5 / half_window), 0, 255).astype(np.uint8)


def _grabcut(grey: np.ndarray, core: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """GrabCut, (H, W) bool: the core is surely lesion, the reach may be, the rest is not."""
    labels = np.where(reach, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    labels[core] = cv2.GC_FGD
    models = np.zeros((1, 65)), np.zeros((1, 65))
    # GrabCut starts from a random clustering. One seed for every lesion, and not the coordinates,
    # so that a lesion moved by whole pixels keeps its mask.
    cv2.setRNGSeed(0)
    image = np.repeat(grey[:, :, None], 3, axis=2)
    cv2.grabCut(image, labels, None, *models, GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def _whole_lesion(foreground: np.ndarray, core: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """(H, W) bool: of GrabCut's foreground the parts that hold the core, their holes filled."""
    _, parts = cv2.connectedComponents(foreground.astype(np.uint8), connectivity=4)
    lesion = np.isin(parts, parts[core])
    # What cannot be reached from outside the crop is lesion, or a hole in it.
    outside = np.pad(~lesion, 1, constant_values=True).astype(np.uint8)
    _, parts = cv2.connectedComponents(outside, connectivity=4)
    return (parts != parts[0, 0])[1:-1, 1:-1] & reach
