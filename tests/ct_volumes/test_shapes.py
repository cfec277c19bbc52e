"""The proof of concept's synthetic shapes: by their definition, in their shares, seeded."""

import itertools

import numpy as np
import pytest

from ct_volumes.shapes import CELL, CLASSES, SHAPES, ball, draw, shapes, tapered, turned

MEAN_SQUARE = np.mean([a**2 for a in range(5, 25)])
MEAN_CUBE = np.mean([a**3 for a in range(5, 25)])
MEAN = np.mean(range(5, 25))
# Mean area or volume of a shape, as of the true body.
CONTENT = {
    "square": MEAN_SQUARE, "circle": np.pi / 4 * MEAN_SQUARE,
    "cone": np.pi / 12 * MEAN_SQUARE * MEAN, "pyramid": MEAN_SQUARE * MEAN / 3,
    "cube": MEAN_CUBE, "cylinder": np.pi / 4 * MEAN_SQUARE * MEAN, "ball": np.pi / 6 * MEAN_CUBE,
}  # fmt: skip


@pytest.mark.parametrize("dimensions, count", [(2, 60), (3, 4)])
def test_sizes_types_noise_and_classes(dimensions, count):
    images, labels = shapes(dimensions, count)
    assert images.shape == labels.shape == (count, *[48] * dimensions)
    assert (images.dtype, labels.dtype) == (np.float32, np.uint8)
    background = len(CLASSES[dimensions]) - 1
    assert labels.max() == background and len(np.unique(labels)) > background / 2
    inside = images[labels < background]
    outside = images[labels == background]
    for values, mean in ((inside, 1), (outside, 0)):
        assert abs(values.mean() - mean) < 5 * 0.5 / len(values) ** 0.5
        assert abs(values.std() - 0.5) < 5 * 0.5 / (2 * len(values)) ** 0.5


def test_the_same_seed_gives_the_same_and_a_smaller_set_begins_a_larger_one():
    images, labels = shapes(2, 6, "test", seed=3)
    again = shapes(2, 4, "test", seed=3)
    assert np.array_equal(images[:4], again[0]) and np.array_equal(labels[:4], again[1])
    for other in (shapes(2, 6, "train", seed=3), shapes(2, 6, "test", seed=4)):
        for a, b in itertools.product(images, other[0]):
            assert not np.array_equal(a, b)
    assert shapes(3, 0)[0].shape == (0, 48, 48, 48)


@pytest.mark.parametrize("dimensions, shown", [(2, 3), (3, 4)])
def test_so_many_cells_have_one_shape_each(dimensions, shown):
    random = np.random.default_rng(0)
    background = len(CLASSES[dimensions]) - 1
    seen = set()
    for _ in range(30):
        label = draw(dimensions, random)
        found = 0
        for cell in itertools.product((0, 1), repeat=dimensions):
            part = label[tuple(slice(CELL * c, CELL * (c + 1)) for c in cell)]
            kinds = set(np.unique(part)) - {background}
            assert len(kinds) <= 1
            found += len(kinds)
            seen |= {(cell, kind) for kind in kinds}
        assert found == shown
    assert len(seen) > 0.8 * 2**dimensions * background  # every kind in every cell


@pytest.mark.parametrize("dimensions, count", [(2, 600), (3, 100)])
def test_classes_have_their_shares(dimensions, count):
    random = np.random.default_rng(0)
    classes = CLASSES[dimensions]
    contents = {kind: [] for kind in classes[:-1]}
    for _ in range(count):
        label = draw(dimensions, random)
        for i, kind in enumerate(contents):
            contents[kind].append((label == i).sum())
    shown = {2: 3, 3: 4}[dimensions]
    for kind, found in contents.items():
        expected = shown / len(contents) * CONTENT[kind]
        error = np.std(found) / count**0.5
        # Bodies of voxels differ from true ones by less than 4 %.
        assert abs(np.mean(found) - expected) < 4 * error + 0.04 * expected, kind


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_shapes_are_of_5_to_24_pixels_and_fill_their_box(kind):
    random = np.random.default_rng(0)
    sides = set()
    for _ in range(200):
        body = SHAPES[kind](random)
        assert body.dtype == bool and body.any()
        sides |= set(body.shape)
        if kind in ("square", "cube", "circle", "ball"):
            assert len(set(body.shape)) == 1
        if kind == "cylinder":
            assert body.shape[0] == body.shape[1]
            assert (body == body[:, :, :1]).all()
    assert sides == set(range(5, 25))


@pytest.mark.parametrize("diameter", [5, 8, 11])
def test_a_ball_is_what_its_definition_says(diameter):
    middle = (diameter - 1) / 2
    for dimensions in (2, 3):
        for place in np.ndindex(*[diameter] * dimensions):
            inside = sum((n - middle) ** 2 for n in place) <= (diameter / 2) ** 2
            assert ball(dimensions, diameter)[place] == inside


@pytest.mark.parametrize("side, height", [(5, 7), (8, 12), (11, 5)])
def test_a_pyramid_and_a_cone_are_what_their_definition_says(side, height):
    """A voxel's centre, on height h, lies in the base shrunk by 1 - h / height."""
    pyramid, cone = (tapered(base, height) for base in (np.ones((side, side), bool), ball(2, side)))
    for level, i, j in np.ndindex(height, side, side):
        shrunk = (1 - (level + 0.5) / height) * side / 2
        dy, dx = i - (side - 1) / 2, j - (side - 1) / 2
        farther = max(abs(dy), abs(dx))
        if abs(farther - shrunk) > 1e-9:
            assert pyramid[level, i, j] == (farther < shrunk)
        if abs(np.hypot(dy, dx) - shrunk) > 0.75 * shrunk / (side / 2):  # but a voxel of the base
            assert cone[level, i, j] == (np.hypot(dy, dx) < shrunk)


def test_quarter_turns_lead_to_all_orientations():
    body = np.arange(8).reshape(2, 2, 2)
    random = np.random.default_rng(0)
    assert len({turned(body, random).tobytes() for _ in range(400)}) == 24
    tips = {
        tuple(turned(tapered(np.ones((5, 5), bool), 5), random).sum((1, 2)).argsort(kind="stable"))
        for _ in range(40)
    }
    assert len(tips) >= 2


def test_wrong_arguments_are_refused():
    for arguments, message in (
        ((4, 1), "dimensions must be"), ((2, -1), "count must be"), ((2, 1, "val"), "part must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            shapes(*arguments)
