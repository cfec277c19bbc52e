"""The synthetic shapes of the ACS paper's proof of concept (JBHI 2021, section IV-A): images of
squares and circles, volumes of cones, pyramids, cubes, cylinders and balls, in noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng

SIDE = 48
CELL = SIDE // 2  # a shape lies within one quadrant or octant
SIZES = (5, 24)  # of every side, diameter and height, both included
NOISE = 0.5
FOREGROUND = {2: 3, 3: 4}  # how many cells have a shape
# By label; background is the last.
CLASSES = {
    2: ("square", "circle", "background"),
    3: ("cone", "pyramid", "cube", "cylinder", "ball", "background"),
}
PARTS = {"train": 0, "test": 1}


def shapes(
    dimensions: int, count: int, part: str = "train", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A data set of `count` samples.

    The i-th sample depends on `dimensions`, `part`, `seed` and i alone, so that a smaller set is
    the beginning of a larger one.

    Args:
        dimensions: 2 or 3.
        part: 'train' or 'test'; no sample is in both.

    Returns:
        images: (count, 48, 48) or (count, 48, 48, 48) float32, 1 in shapes and 0 outside, plus
            normal noise of standard deviation 0.5.
        labels: the same shape, uint8, indices into `CLASSES[dimensions]`.

    Raises:
        ValueError: other dimensions or part, a negative count.
    """
    if dimensions not in CLASSES:
        raise ValueError(f"dimensions must be 2 or 3, got {dimensions}")
    if part not in PARTS:
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    images = np.empty((count, *[SIDE] * dimensions), np.float32)
    labels = np.empty(images.shape, np.uint8)
    for i in range(count):
        random = default_rng(SeedSequence([seed, dimensions, PARTS[part], i]))
        labels[i] = draw(dimensions, random)
        union = labels[i] != len(CLASSES[dimensions]) - 1
        images[i] = union + NOISE * random.standard_normal(union.shape)
    return images, labels


def draw(dimensions: int, random: Generator) -> np.ndarray:
    """The labels of one sample: shapes of random class and size at random places of some cells."""
    background = len(CLASSES[dimensions]) - 1
    label = np.full([SIDE] * dimensions, background, np.uint8)
    for cell in random.choice(2**dimensions, FOREGROUND[dimensions], replace=False):
        kind = int(random.integers(background))
        body = SHAPES[CLASSES[dimensions][kind]](random)
        corner = [
            CELL * (cell >> axis & 1) + random.integers(CELL - length + 1)
            for axis, length in enumerate(body.shape)
        ]
        where = tuple(slice(c, c + length) for c, length in zip(corner, body.shape))
        label[where][body] = kind
    return label


def size(random: Generator) -> int:
    return int(random.integers(SIZES[0], SIZES[1] + 1))


def ball(dimensions: int, diameter: int) -> np.ndarray:
    """Pixels whose centre is at most half the diameter from the middle."""
    distance = np.arange(diameter) - (diameter - 1) / 2
    squares = sum(np.meshgrid(*[distance**2] * dimensions, indexing="ij"))
    return squares <= diameter**2 / 4


def tapered(base: np.ndarray, height: int) -> np.ndarray:
    """(height, *base.shape): the base shrunk linearly to a tip. A voxel is in it if, seen from the
    axis, its centre scaled up to the base is."""
    side = len(base)
    layers = np.zeros((height, side, side), bool)
    offsets = np.arange(side) - (side - 1) / 2
    for level in range(height):
        scale = 1 - (level + 0.5) / height
        at = np.rint(offsets / scale + (side - 1) / 2).astype(int)
        inside = (at >= 0) & (at < side)
        rows = np.clip(at, 0, side - 1)
        layers[level] = base[np.ix_(rows, rows)] & inside[:, None] & inside
    return layers


def turned(body: np.ndarray, random: Generator) -> np.ndarray:
    """By a random number of quarter turns in each of the three planes."""
    for plane in ((0, 1), (0, 2), (1, 2)):
        body = np.rot90(body, int(random.integers(4)), plane)
    return body


def square(random: Generator) -> np.ndarray:
    return np.ones([size(random)] * 2, bool)


def circle(random: Generator) -> np.ndarray:
    return ball(2, size(random))


def cube(random: Generator) -> np.ndarray:
    return np.ones([size(random)] * 3, bool)


def solid_ball(random: Generator) -> np.ndarray:
    return ball(3, size(random))


def cylinder(random: Generator) -> np.ndarray:
    """Always along the last axis."""
    disc, height = ball(2, size(random)), size(random)
    return np.repeat(disc[:, :, None], height, axis=2)


def cone(random: Generator) -> np.ndarray:
    return turned(tapered(ball(2, size(random)), size(random)), random)


def pyramid(random: Generator) -> np.ndarray:
    return turned(tapered(np.ones([size(random)] * 2, bool), size(random)), random)


SHAPES: dict[str, Callable[[Generator], np.ndarray]] = {
    "square": square,
    "circle": circle,
    "cone": cone,
    "pyramid": pyramid,
    "cube": cube,
    "cylinder": cylinder,
    "ball": solid_ball,
}
