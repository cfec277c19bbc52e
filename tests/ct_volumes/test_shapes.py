"""Shapes against plain loops over pixels; shares, sizes, places, noise and seeds of the sets."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from ct_volumes.shapes import SHAPES, ShapeSet, shape_mask, turned

BACKGROUND = {2: 2, 3: 5}


def inside(kind, point, side, height):
    """Whether a point of the box belongs to the shape; the last axis of solids is their height."""
    middle = Fraction(side, 2)
    *across, along = point

    def near(coordinates, reach):
        return sum((x - middle) ** 2 for x in coordinates) <= reach**2

    if kind in ("square", "cube"):
        return True
    if kind in ("circle", "ball"):
        return near(point, middle)
    if kind == "cylinder":
        return near(across, middle)
    reach = middle * (height - along) / height  # at this height
    if kind == "cone":
        return near(across, reach)
    return all(abs(x - middle) <= reach for x in across)


@pytest.mark.parametrize("kind", [*SHAPES[2], *SHAPES[3]])
@pytest.mark.parametrize("side, height", [(5, 6), (6, 9), (9, 5)])
def test_a_shape_is_the_pixels_whose_centre_is_inside(kind, side, height):
    box = [side, side]
    if kind in SHAPES[3]:
        box += [side] if kind in ("cube", "ball") else [height]
    expected = np.zeros(box, bool)
    for pixel in itertools.product(*map(range, box)):
        expected[pixel] = inside(kind, [i + Fraction(1, 2) for i in pixel], side, height)
    np.testing.assert_array_equal(shape_mask(kind, side, height), expected)


def test_volumes_of_solids_are_those_of_geometry():
    side, height = 24, 20
    area = math.pi * 12**2
    expected = {
        "cone": area * height / 3,
        "pyramid": side**2 * height / 3,
        "cube": side**3,
        "cylinder": area * height,
        "ball": 4 / 3 * math.pi * 12**3,
    }
    for kind, volume in expected.items():
        assert shape_mask(kind, side, height).sum() == pytest.approx(volume, rel=0.04), kind


def test_a_cone_points_to_six_sides():
    cone = shape_mask("cone", 7, 9)
    seen = set()
    for axis, reverse in itertools.product(range(3), range(2)):
        areas = turned(cone, axis, reverse).sum(axis=tuple({0, 1, 2} - {axis}))
        assert len(areas) == 9
        widening = areas[0] < areas[-1]
        assert (np.sort(areas) == (areas if widening else areas[::-1])).all()
        assert widening == bool(reverse)
        seen.add((axis, widening))
    assert len(seen) == 6


@pytest.mark.parametrize("axes, count", [(2, 300), (3, 40)])
def test_places_sizes_and_shares_are_those_of_the_paper(axes, count):
    samples, half = ShapeSet(axes, count), 24
    kinds, sides, quadrants = [], [], np.zeros(2**axes)
    for _, labels in samples:
        assert labels.shape == (48,) * axes and labels.dtype == np.uint8
        found = 0
        for number, corner in enumerate(itertools.product((0, half), repeat=axes)):
            part = labels[tuple(slice(c, c + half) for c in corner)]
            there = [k for k in np.unique(part).tolist() if k != BACKGROUND[axes]]
            assert len(there) <= 1
            if there:
                found += 1
                quadrants[number] += 1
                kinds += there
                places = np.argwhere(part == there[0])
                sides += (np.ptp(places, axis=0) + 1).tolist()
        assert found == (3 if axes == 2 else 4)
    shares = np.bincount(kinds, minlength=BACKGROUND[axes]) / len(kinds)
    # Four standard deviations of a binomial share.
    p = 1 / BACKGROUND[axes]
    assert np.abs(shares - p).max() < 4 * math.sqrt(p * (1 - p) / len(kinds))
    p = found / 2**axes
    assert np.abs(quadrants / count - p).max() < 4 * math.sqrt(p * (1 - p) / count)
    assert max(sides) == 24
    if axes == 2:  # a cone's last layers may hold no centre
        assert min(sides) == 5
        spread = np.bincount(sides, minlength=25)[5:] / len(sides)
        assert np.abs(spread - 1 / 20).max() < 4 * math.sqrt(2 * 1 / 20 / len(sides))


def test_a_cylinder_lies_along_the_last_axis_and_cones_along_any():
    kinds = {name: index for index, name in enumerate(SHAPES[3])}
    directions = set()
    for _, labels in ShapeSet(3, 60, seed=4):
        for corner in itertools.product((0, 24), repeat=3):
            part = labels[tuple(slice(c, c + 24) for c in corner)]
            if (cylinder := part == kinds["cylinder"]).any():
                layers = cylinder[..., cylinder.any((0, 1))]
                assert (layers == layers[..., :1]).all()
            if (cone := part == kinds["cone"]).any():
                for axis in range(3):
                    areas = cone.sum(tuple({0, 1, 2} - {axis}))
                    areas = areas[areas > 0]
                    if (np.diff(areas) <= 0).all() or (np.diff(areas) >= 0).all():
                        directions.add((axis, bool(areas[0] > areas[-1])))
    assert len(directions) == 6


@pytest.mark.parametrize("axes", [2, 3])
def test_the_image_is_the_union_and_noise(axes):
    image, labels = ShapeSet(axes, 3, "test")[2]
    assert image.dtype == np.float32
    noise = image - (labels != BACKGROUND[axes])
    limit = 5 / math.sqrt(noise.size)
    assert abs(noise.mean()) < limit * 0.5
    assert abs(noise.std() - 0.5) < limit * 0.5
    foreground = noise[labels != BACKGROUND[axes]]
    assert abs(foreground.mean()) < 5 * 0.5 / math.sqrt(foreground.size)


@pytest.mark.parametrize("axes", [2, 3])
def test_a_sample_is_a_function_of_seed_split_and_index(axes):
    samples = ShapeSet(axes, 4)
    last = samples[3]
    for one, other in zip(list(samples)[3], last):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(ShapeSet(axes, 400)[3][0], last[0])
    others = [samples[2], ShapeSet(axes, 4, "test")[3], ShapeSet(axes, 4, seed=1)[3]]
    for other in others:
        assert (other[0] != last[0]).mean() > 0.99


def test_smaller_images_hold_shapes_of_up_to_half_of_them():
    image, labels = ShapeSet(3, 20, size=20)[7]
    assert image.shape == labels.shape == (20, 20, 20)
    sides = [
        np.ptp(np.argwhere(labels[tuple(slice(c, c + 10) for c in corner)] < 5), axis=0).max() + 1
        for _, labels in ShapeSet(3, 20, size=20)
        for corner in itertools.product((0, 10), repeat=3)
        if (labels[tuple(slice(c, c + 10) for c in corner)] < 5).any()
    ]
    assert max(sides) == 10 and len(sides) == 80


@pytest.mark.parametrize(
    "options",
    [dict(axes=1), dict(split="val"), dict(count=0), dict(seed=-1), dict(size=47), dict(size=8)],
)
def test_what_is_out_of_range_is_refused(options):
    with pytest.raises(ValueError):
        ShapeSet(**{"axes": 2, "count": 1, **options})


def test_there_is_no_sample_beyond_the_last():
    samples = ShapeSet(2, 3)
    assert len(samples) == len(list(samples)) == 3
    with pytest.raises(IndexError):
        samples[3]
    with pytest.raises(ValueError, match="torus"):
        shape_mask("torus", 5, 5)
