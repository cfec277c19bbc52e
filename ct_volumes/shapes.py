"""Synthetic images of squares and circles, and volumes of cones, pyramids, cubes, cylinders and
balls: the proof of concept of the ACS paper (JBHI 2021, section IV-A)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

SIZE = 48
LEAST_SIDE = 5  # up to half the image
NOISE = 0.5
# By the number of axes; a label is an index of this, and the background the last one.
SHAPES = {2: ("square", "circle"), 3: ("cone", "pyramid", "cube", "cylinder", "ball")}
OCCUPIED = {2: 3, 3: 4}  # of 4 quadrants, of 8 octants
SPLITS = ("train", "test")


@dataclass(frozen=True)
class ShapeSet:
    """Samples that are a function of (axes, seed, split, index, size) alone.

    Three of the four quadrants, or four of the eight octants, hold a shape each. Which ones, the
    kinds, the sides (and heights) of 5 to `size` / 2 pixels and the places within the quadrant are
    drawn uniformly. Cone and pyramid point along any axis, to either side; the axis of the cylinder
    is always the last. The image is 1 within shapes, 0 elsewhere, and has normal noise of standard
    deviation 0.5.

    Args:
        axes: 2 (images) or 3 (volumes).
        count: number of samples.
        split: 'train' or 'test', which have no sample in common.
        size: of each axis; the paper's is 48.

    Raises:
        ValueError: an option out of its range.
    """

    axes: int
    count: int
    split: str = "train"
    seed: int = 0
    size: int = SIZE

    def __post_init__(self) -> None:
        if self.axes not in SHAPES:
            raise ValueError(f"axes must be 2 or 3, got {self.axes}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'test', got {self.split!r}")
        if self.count < 1 or self.seed < 0:
            raise ValueError(f"there must be a sample and a seed from 0, got {self}")
        if self.size % 2 or self.size < 2 * LEAST_SIDE:
            raise ValueError(f"size must be even and at least {2 * LEAST_SIDE}, got {self.size}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; the background is the last."""
        return (*SHAPES[self.axes], "background")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image, float32 (size, ...), and its labels, uint8 of the same shape."""
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        entropy = [self.seed, self.axes, SPLITS.index(self.split), index]
        generator = np.random.default_rng(entropy)
        labels = draw_labels(self.axes, generator, self.size)
        image = (labels < len(SHAPES[self.axes])).astype(np.float32)
        image += np.float32(NOISE) * generator.standard_normal(image.shape, np.float32)
        return image, labels


def draw_labels(axes: int, generator: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Labels of one image or volume, uint8 (size, ...)."""
    half, kinds = size // 2, SHAPES[axes]
    labels = np.full((size,) * axes, len(kinds), np.uint8)
    corners = np.array(list(itertools.product((0, half), repeat=axes)))
    for corner in generator.permutation(corners)[: OCCUPIED[axes]]:
        kind = int(generator.integers(len(kinds)))
        side, height = generator.integers(LEAST_SIDE, half, 2, endpoint=True).tolist()
        mask = shape_mask(kinds[kind], side, height)
        if kinds[kind] in ("cone", "pyramid"):
            mask = turned(mask, *generator.integers((3, 2)).tolist())
        start = corner + generator.integers(0, half - np.array(mask.shape), endpoint=True)
        place = tuple(slice(low, low + extent) for low, extent in zip(start, mask.shape))
        labels[place][mask] = kind
    return labels


def shape_mask(kind: str, side: int, height: int) -> np.ndarray:
    """A shape in the smallest box that holds it, bool: the pixels whose centre is inside.

    `side` is that of the square, the cube and the base of the pyramid, and the diameter of the
    circle, the ball and the bases of cylinder and cone. Cylinder, cone and pyramid are `height`
    long along the last axis, where cone and pyramid end in their tip; other shapes do not read it.
    """
    # Whole numbers, twice the lengths, so that nothing is rounded at the surface.
    across = np.abs(2 * np.arange(side) + 1 - side)  # of pixel centres to the middle
    if kind == "square":
        return np.ones((side, side), bool)
    if kind == "cube":
        return np.ones((side, side, side), bool)
    disc = across[:, None] ** 2 + across**2
    if kind == "circle":
        return disc <= side**2
    if kind == "ball":
        return disc[..., None] + across**2 <= side**2
    if kind == "cylinder":
        return np.repeat((disc <= side**2)[..., None], height, axis=2)
    # A layer reaches `side` times this, over 2 `height`, from the axis.
    left = 2 * height - 1 - 2 * np.arange(height)
    if kind == "cone":
        return disc[..., None] * (2 * height) ** 2 <= (side * left) ** 2
    if kind == "pyramid":
        return np.maximum(across[:, None], across)[..., None] * 2 * height <= side * left
    raise ValueError(f"there is no shape {kind!r}")


def turned(mask: np.ndarray, axis: int, reverse: int) -> np.ndarray:
    """The mask with its last axis along `axis`, and the other way round if `reverse`."""
    mask = mask[..., ::-1] if reverse else mask
    return np.moveaxis(mask, 2, axis)
