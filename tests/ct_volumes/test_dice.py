"""Scores of LiTS against plain loops over voxels, closed cases, and properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ct_volumes.dice import LesionDice, long_axis_mm, score_case, summarise

SPACING = (0.8, 0.5)
LABELS = arrays(np.uint8, (2, 4, 4), elements=st.integers(0, 2))
PAIRS = st.tuples(LABELS, LABELS)


def components(mask):
    """Sets of voxels that are connected by faces, by a plain flood fill."""
    left, found = {tuple(map(int, v)) for v in np.argwhere(mask)}, []
    while left:
        todo, one = [left.pop()], set()
        while todo:
            z, y, x = todo.pop()
            one.add((z, y, x))
            for v in ((z - 1, y, x), (z + 1, y, x), (z, y - 1, x), (z, y + 1, x), (z, y, x - 1),
                      (z, y, x + 1)):  # fmt: skip
                if v in left:
                    left.remove(v)
                    todo.append(v)
        found.append(one)
    return found


def detected(prediction, reference):
    """True, false, missed: groups grow until nothing more touches them."""
    found, there = components(prediction == 2), components(reference == 2)
    true, left = 0, list(there)
    while left:
        predictions, lesions, grown = [], [left.pop()], True
        while grown:
            more = [p for p in found if p not in predictions and any(p & r for r in lesions)]
            predictions += more
            others = [r for r in left if any(p & r for p in predictions)]
            left = [r for r in left if r not in others]
            lesions += others
            grown = bool(more or others)
        p, r = set().union(*predictions), set().union(*lesions)
        true += len(p & r) / len(p | r) > 0.5
    return true, len(found) - true, len(there) - true


def plain_dice(one, other, empty):
    return 2 * len(one & other) / (len(one) + len(other)) if one or other else empty


def voxels(mask):
    return {tuple(map(int, v)) for v in np.argwhere(mask)}


@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_a_case_is_scored_as_by_plain_loops(pair):
    prediction, reference = pair
    score = score_case(prediction, reference, SPACING)
    one, other = voxels(prediction == 2), voxels(reference == 2)
    assert score.lesion == pytest.approx(plain_dice(one, other, 1.0))
    organ = voxels(prediction >= 1) if 1 in prediction else set()
    assert score.liver == pytest.approx(plain_dice(organ, voxels(reference >= 1), 0.0))
    assert (
        score.true_positives, score.false_positives, score.false_negatives
    ) == detected(prediction, reference)  # fmt: skip
    expected = []
    for lesion in components(reference == 2):
        parts = [p for p in components(prediction == 2) if p & lesion]
        expected.append(plain_dice(lesion, set().union(*parts), 0.0))
    assert sorted(x.dice for x in score.lesions) == pytest.approx(sorted(expected))
    assert score.burden == pytest.approx(len(one) / max(len(voxels(prediction >= 1)), 1))


@settings(max_examples=50, deadline=None)
@given(LABELS)
def test_the_reference_itself_is_perfect(labels):
    score = score_case(labels, labels, SPACING)
    assert score.lesion == 1 and score.false_positives == score.false_negatives == 0
    assert score.liver == (1 in labels)
    assert all(x.dice == 1 for x in score.lesions) and score.burden == score.reference_burden


@settings(max_examples=50, deadline=None)
@given(PAIRS)
def test_sides_exchange_precision_and_recall(pair):
    one, other = score_case(*pair, SPACING), score_case(*pair[::-1], SPACING)
    assert one.lesion == other.lesion and one.true_positives == other.true_positives
    assert one.false_positives == other.false_negatives


@settings(max_examples=50, deadline=None)
@given(arrays(bool, (2, 5, 5)))
def test_the_long_axis_is_the_largest_distance_of_edge_midpoints(mask):
    longest = 0.0
    for plane in mask:
        points = [
            ((y + dy) * SPACING[0], (x + dx) * SPACING[1])
            for y, x in np.argwhere(plane)
            for dy, dx in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5))
        ]
        longest = max([longest] + [math.dist(a, b) for a in points for b in points])
    assert long_axis_mm(mask, SPACING) == pytest.approx(longest)


def line(*spans, label=2, length=40):
    labels = np.ones((1, 1, length), np.uint8)
    for start, end in spans:
        labels[..., start:end] = label
    return labels


@pytest.mark.parametrize(
    ("prediction", "reference", "counts"),
    [
        ([(0, 10)], [(0, 10)], (1, 0, 0)),
        ([(0, 5)], [(0, 10)], (0, 1, 1)),  # IoU of exactly 0.5 is none
        ([(0, 6)], [(0, 10)], (1, 0, 0)),
        ([(0, 21)], [(0, 10), (11, 21)], (1, 0, 1)),  # one prediction over two lesions
        ([(0, 10), (11, 21)], [(0, 21)], (1, 1, 0)),  # two predictions on one lesion
        ([(0, 40)], [(0, 3), (20, 23)], (0, 1, 2)),  # a merge that fails is never negative
        ([(0, 6), (7, 14)], [(0, 3), (5, 9), (12, 14)], (1, 1, 2)),  # a chain is one group
        ([], [(0, 10)], (0, 0, 1)),
        ([(0, 10)], [], (0, 1, 0)),
    ],
)
def test_detection_in_closed_cases(prediction, reference, counts):
    score = score_case(line(*prediction), line(*reference), SPACING)
    assert (score.true_positives, score.false_positives, score.false_negatives) == counts


def test_components_are_those_of_faces_in_three_dimensions():
    labels = np.ones((3, 3, 3), np.uint8)
    labels[:2, 0, 0] = labels[1, 0, :2] = 2  # one lesion around two corners
    labels[2, 1, 1] = 2
    assert score_case(labels, labels, SPACING).true_positives == 2


def test_diagonal_neighbours_are_two_lesions():
    labels = np.ones((1, 2, 2), np.uint8)
    labels[0, 0, 0] = labels[0, 1, 1] = 2
    assert score_case(labels, labels, SPACING).true_positives == 2


def test_lesions_without_liver_are_no_liver():
    reference = line((0, 10))
    only_lesions = np.where(reference == 2, 2, 0).astype(np.uint8)
    score = score_case(only_lesions, reference, SPACING)
    assert score.liver == 0 and score.liver_counts == (0, 40) and score.lesion == 1
    both = summarise([score, score_case(reference, reference, SPACING)])
    assert both["liver_dice_global"] == pytest.approx(80 / 120)
    assert both["liver_dice_per_case"] == 0.5
    assert both["burden_rmse"] == pytest.approx(np.sqrt(0.75**2 / 2))
    assert both["burden_max_error"] == 0.75


def test_global_is_of_sums_and_per_case_a_mean():
    cases = [score_case(line((0, 10)), line((0, 20)), SPACING)]
    cases += [score_case(line(), line(), SPACING), score_case(line((0, 2)), line(), SPACING)]
    figures = summarise(cases)
    assert figures["lesion_dice_per_case"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert figures["lesion_dice_global"] == pytest.approx(20 / 32)
    assert (figures["lesion_precision"], figures["lesion_recall"]) == (0, 0)
    nothing = summarise(cases[1:2])
    assert nothing["lesion_dice_global"] == 1
    assert math.isnan(nothing["lesion_recall"]) and math.isnan(nothing["dice_small"])
    with pytest.raises(ValueError, match="no cases"):
        summarise([])


def test_lesions_are_small_below_15_and_large_above_30_mm():
    sizes = [LesionDice(d, 1.0).size for d in (14.99, 15.0, 30.0, 30.01)]
    assert sizes == ["small", "medium", "medium", "large"]
    reference = line((0, 14), (16, 31), (33, 40))
    figures = summarise([score_case(line((0, 14)), reference, (1.0, 1.0))])
    assert (figures["lesions_small"], figures["lesions_medium"]) == (2, 1)
    assert figures["dice_small"] == 0.5 and figures["dice_medium"] == 0


def test_what_is_no_label_is_refused():
    with pytest.raises(ValueError, match="two"):
        score_case(line(), line(length=3), SPACING)
    with pytest.raises(ValueError, match="prediction"):
        score_case(line((0, 1), label=3), line(), SPACING)
    with pytest.raises(ValueError, match="spacing"):
        score_case(line(), line(), (0.0, 1.0))
