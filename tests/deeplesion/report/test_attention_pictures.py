"""Pictures of attention: bars as high as the weights, in the column of their image."""

import numpy as np
import pytest

from deeplesion.report.attention import BAR, GAP, LABEL, PARTS, ROW, SIDE, draw_attention
from deeplesion.report.pictures import TRUTH

BOX = (40.0, 50.0, 60.0, 66.0)


def bag(images=3, size=128):
    rng = np.random.default_rng(0)
    return rng.normal(40, 20, (images, size, size)).astype(np.int16)


def draw(weights, images=3, **options):
    arguments = dict(
        bag=bag(images),
        weights=weights,
        distances_mm=6.0 * (np.arange(images) - images // 2),
        box=BOX,
        title="a/001.png",
    )
    return draw_attention(**{**arguments, **options})


def bar_height(picture, row, column, part):
    """Pixels of the bar's colour in the middle of its width."""
    left = LABEL + column * (SIDE + GAP) + list(PARTS).index(part) * (SIDE // 2)
    top = 2 * BAR + SIDE + row * ROW
    strip = picture[top : top + ROW, left + SIDE // 8]
    return int((strip == PARTS[part]).all(axis=1).sum())


def test_bars_are_as_high_as_the_weights():
    weights = {
        "P2": {"channel": [0.2, 0.5, 0.3], "spatial": [0.0, 1.0, 0.0]},
        "P3": {"spatial": [0.7, 0.1, 0.2]},
    }
    picture = draw(weights)
    assert picture.shape == (2 * BAR + SIDE + 2 * ROW, LABEL + 3 * (SIDE + GAP), 3)
    for row, parts in enumerate(weights.values()):
        for part in PARTS:
            for column, weight in enumerate(parts.get(part, [0, 0, 0])):
                # The line of uniform attention covers one pixel.
                expected = weight * (ROW - 10)
                assert abs(bar_height(picture, row, column, part) - expected) <= 2


def test_the_lesion_is_outlined_on_the_target_alone():
    picture = draw({"P2": {"channel": [0.2, 0.5, 0.3]}})
    columns = [
        (picture[2 * BAR : 2 * BAR + SIDE, LABEL + i * (SIDE + GAP) :][:, :SIDE] == TRUTH)
        .all(axis=2)
        .sum()
        for i in range(3)
    ]
    assert columns[1] > 100 and columns[0] == columns[2] == 0


def test_the_part_around_the_lesion_is_shown_also_at_the_border():
    for box in [(0, 0, 10, 10), (110, 100, 127, 127)]:
        picture = draw({"P2": {"channel": [0.2, 0.5, 0.3]}}, box=box)
        target = picture[2 * BAR : 2 * BAR + SIDE, LABEL + SIDE + GAP :][:, :SIDE]
        assert (target == TRUTH).all(axis=2).sum() > 50
        assert target.mean() > 50  # none of it is black
    small = draw({"P2": {"channel": [0.2, 0.5, 0.3]}}, bag=bag(size=32), box=(5, 5, 20, 20))
    assert small[2 * BAR : 2 * BAR + SIDE, LABEL : LABEL + SIDE].mean() > 50


def test_a_target_that_does_not_attend_to_itself_has_no_bar():
    picture = draw({"P2": {"channel": [0.25, 0.75]}})
    heights = [bar_height(picture, 0, column, "channel") for column in range(3)]
    assert heights[1] == 0 and 0 < heights[0] < heights[2]


def test_unknown_distances_are_drawn_as_numbers_of_images():
    weights = {"P2": {"channel": [0.2, 0.5, 0.3]}}
    unknown = draw(weights, distances_mm=[np.nan] * 3)
    assert (unknown != draw(weights)).any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(distances_mm=[0.0]), "3 images have 1 distances"),
        (dict(weights={"P2": {"channel": [1.0]}}), "3 images have 1 weights"),
        (dict(weights={"P2": {"time": [0.2, 0.5, 0.3]}}), "no part 'time'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**{"weights": {}, **options})
