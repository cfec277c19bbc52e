"""Pictures of attention: the images of a bag side by side, under each how much it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from deeplesion.report.pictures import (
    BAR,
    GREY,
    TRUTH,
    WHITE,
    caption,
    enlarged,
    to_grey,
    window_for,
    write,
)

SIDE = 200  # px of an image of the bag
CROP = 64  # pixels of the slice that it shows, or all of a smaller one
ROW = 46  # px of a level's bars
LABEL = 70  # px, for the levels' names
GAP = 6  # px
# BGR, after Okabe and Ito.
PARTS = {"channel": (233, 180, 86), "spatial": (0, 159, 230)}


def draw_attention(
    bag: np.ndarray,
    weights: Mapping[str, Mapping[str, Sequence[float]]],
    distances_mm: Sequence[float],
    box: Sequence[float],
    title: str,
) -> np.ndarray:
    """A strip of the bag's images, and a row of bars for each level.

    Args:
        bag: (N, H, W) HU, one slice of each image, sorted along z; the target is the middle one.
        weights: level -> part ('channel', 'spatial') -> N weights that add up to 1, or N - 1 where
            the target does not attend to itself.
        distances_mm: of the N slices from the target's, NaN where it is not known.
        box: x1, y1, x2, y2 of the lesion, pixel centres; drawn on the target.
        title: written above.

    Returns:
        (2 BAR + SIDE + levels * ROW, LABEL + N * (SIDE + GAP), 3) uint8 BGR.

    Raises:
        ValueError: numbers of images, distances or weights that do not fit, or an unknown part.
    """
    images, middle = len(bag), len(bag) // 2
    if len(distances_mm) != images:
        raise ValueError(f"{images} images have {len(distances_mm)} distances")
    height = 2 * BAR + SIDE + len(weights) * ROW
    picture = np.zeros((height, LABEL + images * (SIDE + GAP), 3), np.uint8)
    caption(picture, 0, [(title, WHITE), *PARTS.items(), ("line: all alike", GREY)])
    window = window_for(bag[middle], [box])
    for i, (hu, distance) in enumerate(zip(bag, distances_mm)):
        left = LABEL + i * (SIDE + GAP)
        text = f"{distance:+.3g} mm" if np.isfinite(distance) else f"{i - middle:+d}"
        write(picture, "target" if i == middle else text, left, BAR + 4, WHITE)
        picture[2 * BAR : 2 * BAR + SIDE, left : left + SIDE] = panel(
            hu, window, box, draw_box=i == middle
        )
    for row, (level, parts) in enumerate(weights.items()):
        bottom = 2 * BAR + SIDE + (row + 1) * ROW - 4
        write(picture, level, 8, bottom - ROW // 2, WHITE)
        for part, values in parts.items():
            for i, value in enumerate(with_target(values, images)):
                draw_bar(picture, LABEL + i * (SIDE + GAP), bottom, part, value, 1 / len(values))
    return picture


def panel(
    hu: np.ndarray, window: tuple[float, float], box: Sequence[float], draw_box: bool
) -> np.ndarray:
    """(SIDE, SIDE, 3): the part of a slice around the lesion, which is the same in all slices."""
    x1, y1, x2, y2 = box
    size = min(CROP, *hu.shape)
    left = int(np.clip((x1 + x2) / 2 - size / 2, 0, hu.shape[1] - size))
    top = int(np.clip((y1 + y2) / 2 - size / 2, 0, hu.shape[0] - size))
    image = enlarged(to_grey(hu[top : top + size, left : left + size], window), SIDE / size)
    image = cv2.resize(image, (SIDE, SIDE))  # the scale may be off by a pixel
    if draw_box:
        corners = (np.reshape(box, (2, 2)) - (left, top) + 0.5) * SIDE / size
        cv2.rectangle(image, *np.round(corners).astype(int).tolist(), TRUTH, 1)
    return image


def with_target(values: Sequence[float], images: int) -> np.ndarray:
    """(N,) weights, NaN for a target that does not attend to itself."""
    values = np.asarray(values, float)
    if len(values) == images - 1:
        return np.insert(values, images // 2, np.nan)
    if len(values) != images:
        raise ValueError(f"{images} images have {len(values)} weights")
    return values


def draw_bar(
    picture: np.ndarray, left: int, bottom: int, part: str, value: float, uniform: float
) -> None:
    """One bar in half a column, as high as the weight, and the weight beside it."""
    if part not in PARTS:
        raise ValueError(f"the attention has no part {part!r}, only {', '.join(PARTS)}")
    height, half = ROW - 10, SIDE // 2
    left += list(PARTS).index(part) * half
    right = left + half // 2
    cv2.line(picture, (left, bottom), (right, bottom), GREY, 1)
    if np.isnan(value):
        write(picture, "-", right + 5, bottom - 18, GREY)
        return
    if top := round(height * value):
        cv2.rectangle(picture, (left, bottom - top), (right, bottom), PARTS[part], -1)
    line = bottom - round(height * uniform)
    cv2.line(picture, (left, line), (right, line), GREY, 1)
    write(picture, f"{value:.2f}", right + 5, bottom - 18, PARTS[part])
