"""Anchors: overlaps by a plain loop, optima that are known, and folds that share no patient."""

import itertools

import numpy as np
import pytest

from deeplesion.data.anchors import (
    anchor_sizes,
    best_overlaps,
    held_out_overlaps,
    optimal_anchors,
    overlap_summary,
    patient_folds,
)
from deeplesion.errors import DataError


def boxes_like(anchors, seed=0, count=400, spread=0.02):
    """Boxes (count, 2) that each lie near one of the anchors."""
    rng = np.random.default_rng(seed)
    chosen = np.asarray(anchors)[np.arange(count) % len(anchors)]
    return chosen * np.exp(rng.normal(0, spread, (count, 2)))


def centred_iou(box, anchor):
    """The oracle: the two rectangles around one centre, corner by corner."""
    a, b = ([-w / 2, -h / 2, w / 2, h / 2] for w, h in (box, anchor))
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    union = box[0] * box[1] + anchor[0] * anchor[1] - wide * high
    return wide * high / union


def test_the_best_overlap_is_that_of_a_plain_loop():
    rng = np.random.default_rng(1)
    boxes, anchors = rng.uniform(3, 90, (40, 2)), rng.uniform(3, 90, (7, 2))
    expected = [max(centred_iou(box, anchor) for anchor in anchors) for box in boxes]
    np.testing.assert_allclose(best_overlaps(boxes, anchors), expected, rtol=1e-12)
    np.testing.assert_allclose(best_overlaps(anchors, anchors), 1)


def test_anchors_have_the_area_of_their_scale_and_the_shape_of_their_ratio():
    sizes = anchor_sizes([4, 8], [3, 5, 6], [0.5, 1])
    assert sizes.shape == (12, 2)
    order = itertools.product([4, 8], [3, 5, 6], [0.5, 1])
    for (width, height), (base, scale, ratio) in zip(sizes, order):
        assert np.isclose(width * height, (base * scale) ** 2)
        assert np.isclose(height / width, ratio)


@pytest.mark.parametrize(
    ("bases", "scales", "ratios"),
    [
        ([4], [4, 7, 15], [0.5, 1, 2]),
        ([4], [5, 9], [0.625, 1.6]),
        ([8], [2, 3, 5, 9], [1]),
        ([4, 16], [3, 5], [1]),
    ],
    ids=["an odd number of ratios", "an even number", "squares", "two maps"],
)
def test_anchors_that_the_boxes_were_drawn_from_are_found_again(bases, scales, ratios):
    true = anchor_sizes(bases, scales, ratios)
    boxes = boxes_like(true)
    found_scales, found_ratios = optimal_anchors(boxes, bases, len(scales), len(ratios))
    np.testing.assert_allclose(found_scales, scales, rtol=0.03)
    np.testing.assert_allclose(found_ratios, ratios, rtol=0.03)
    found = best_overlaps(boxes, anchor_sizes(bases, found_scales, found_ratios))
    assert found.mean() > best_overlaps(boxes, true).mean() - 0.003


def test_one_square_is_the_best_of_all_squares():
    rng = np.random.default_rng(5)
    boxes = rng.uniform(10, 60, (300, 2))
    (scale,), ratios = optimal_anchors(boxes, [1], 1, 1)
    sides = np.arange(10, 60, 0.05)
    means = [best_overlaps(boxes, np.array([[side, side]])).mean() for side in sides]
    mean = best_overlaps(boxes, np.array([[scale, scale]])).mean()
    assert ratios == [1.0]
    assert mean > max(means) - 5e-4  # of boxes that are looked at together, 4 % apart


def test_a_box_alone_is_fitted_and_the_same_seed_finds_the_same():
    assert optimal_anchors(np.array([[24.0, 24.0]]), [4], 1, 1) == ([6.0], [1.0])
    boxes = boxes_like([[20, 30], [40, 30]], spread=0.3)
    assert optimal_anchors(boxes, [4], 2, 3, seed=3) == optimal_anchors(boxes, [4], 2, 3, seed=3)


def test_progress_is_told_and_an_interruption_ends_the_search():
    told = []
    boxes = boxes_like([[20, 30], [40, 30]], spread=0.3)
    optimal_anchors(boxes, [4], 2, 1, progress=lambda *each: told.append(each))
    generations, means = zip(*told)
    assert generations == tuple(range(1, len(told) + 1))
    assert list(means) == sorted(means) and 0.5 < means[-1] < 1

    def interrupt(generation, mean):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimal_anchors(boxes, [4], 2, 1, progress=interrupt)


@pytest.mark.parametrize(
    ("boxes", "bases", "numbers", "words"),
    [
        ([[10, 0]], [4], (1, 1), "boxes must be positive"),
        (np.empty((0, 2)), [4], (1, 1), "boxes must be positive"),
        ([[10, np.nan]], [4], (1, 1), "boxes must be positive"),
        ([[10, 10]], [-4], (1, 1), "bases must be positive"),
        ([[10, 10]], [4], (0, 1), "1 scale and 1 ratio at least"),
        ([[10, 10]], [4], (1, 0), "1 scale and 1 ratio at least"),
    ],
)
def test_what_cannot_be_searched_is_refused(boxes, bases, numbers, words):
    with pytest.raises(ValueError, match=words):
        optimal_anchors(np.array(boxes, float), bases, *numbers)


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_share_no_patient_and_are_of_one_size(folds):
    patients = np.random.default_rng(2).integers(0, 23, 200).tolist()
    fold = patient_folds(patients, folds, seed=4)
    held = [{p for p, f in zip(patients, fold) if f == k} for k in range(folds)]
    assert set().union(*held) == set(patients)
    assert sum(map(len, held)) == len(set(patients)), "a patient is in two folds"
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert (patient_folds(patients, folds, seed=4) == fold).all()
    assert (patient_folds(patients, folds, seed=5) != fold).any()


def test_folds_need_patients():
    with pytest.raises(DataError, match="3 patients cannot be split into 4 folds"):
        patient_folds(["a", "b", "b", "c"], 4)
    with pytest.raises(ValueError, match="2 folds at least"):
        patient_folds(["a", "b"], 1)


def test_patients_left_out_are_judged_by_the_anchors_of_the_others():
    """The boxes of each patient are alike, and unlike those of all others."""
    patients = np.repeat(["a", "b", "c"], 30)
    boxes = np.concatenate([boxes_like([[s, s]], seed=s, count=30) for s in (12, 30, 75)])
    told = []
    held_out = held_out_overlaps(
        boxes, patients, [4], 2, 1, folds=3, seed=1, progress=lambda *each: told.append(each)
    )
    for patient in "abc":
        own = patients == patient
        anchors = anchor_sizes([4], *optimal_anchors(boxes[~own], [4], 2, 1, seed=1))
        expected = [max(centred_iou(box, anchor) for anchor in anchors) for box in boxes[own]]
        np.testing.assert_allclose(held_out[own], expected)
        assert held_out[own].mean() < 0.25, "the patient itself was learnt from"
    assert [fold for fold, group in itertools.groupby(told, lambda each: each[0])] == [0, 1, 2]


def test_a_summary_counts_every_group_that_has_boxes():
    best = np.array([0.4, 0.5, 0.6, 0.7, 0.9])
    groups = np.array(["small", "small", "other", "large", "large"])
    summary = overlap_summary(best, groups, ["large", "none", "small"])
    assert list(summary) == ["all", "large", "small", "other"]
    assert summary["all"] == {
        "boxes": 5, "mean": pytest.approx(0.62), "below_0.5": 0.2, "below_0.7": pytest.approx(0.6),
    }  # fmt: skip
    assert summary["small"]["below_0.5"] == 0.5 and summary["large"]["below_0.7"] == 0
