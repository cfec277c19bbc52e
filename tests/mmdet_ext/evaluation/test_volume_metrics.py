"""Dice and IoU of several classes against plain loops, per volume and per batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmdet_ext.evaluation.shapes_metric import ShapesMetric
from mmdet_ext.evaluation.volume_metrics import class_counts, per_batch, per_volume

CLASSES = 4
VOLUME = arrays(np.uint8, (2, 3, 2), elements=st.integers(0, CLASSES - 1))
PAIRS = st.lists(st.tuples(VOLUME, VOLUME), min_size=1, max_size=5)


def voxels(volumes, label):
    return {
        (number, *map(int, place))
        for number, volume in enumerate(volumes)
        for place in np.argwhere(volume == label)
    }


def plain(volumes, references, label):
    """(Dice, IoU), or None where there is nothing to divide by."""
    one, other = voxels(volumes, label), voxels(references, label)
    if not one | other:
        return None
    both = len(one & other)
    return 2 * both / (len(one) + len(other)), both / len(one | other)


def mean(pairs):
    pairs = [pair for pair in pairs if pair is not None]
    return [sum(column) / len(pairs) for column in zip(*pairs)] if pairs else None


def counts_of(pairs):
    return np.array([class_counts(*pair, CLASSES) for pair in pairs])


@settings(max_examples=50, deadline=None)
@given(PAIRS, st.sets(st.integers(0, CLASSES - 1), min_size=1))
def test_per_volume_is_a_loop(pairs, classes):
    expected = mean(mean(plain([p], [r], c) for c in classes if (r == c).any()) for p, r in pairs)
    found = per_volume(counts_of(pairs), sorted(classes))
    assert found == pytest.approx(expected or (math.nan, math.nan), nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(PAIRS, st.sets(st.integers(0, CLASSES - 1), min_size=1), st.integers(1, 6))
def test_per_batch_is_a_loop(pairs, classes, batch):
    batches = [zip(*pairs[i : i + batch]) for i in range(0, len(pairs), batch)]
    expected = mean(
        mean(plain(p, r, c) for c in classes) for p, r in (tuple(batch) for batch in batches)
    )
    found = per_batch(counts_of(pairs), sorted(classes), batch)
    assert found == pytest.approx(expected or (math.nan, math.nan), nan_ok=True)


def test_the_same_is_one_and_other_places_are_zero():
    volume = np.array([[[0, 1], [2, 3]]], np.uint8)
    for score in (per_volume(counts_of([(volume, volume)]), range(4)),
                  per_batch(counts_of([(volume, volume)]), range(4), 20)):  # fmt: skip
        assert score == (1, 1)
    assert per_volume(counts_of([(3 - volume, volume)]), range(4)) == (0, 0)


def test_a_class_that_is_not_there_is_left_out():
    reference = np.zeros((1, 2, 2), np.uint8)
    prediction = reference.copy()
    prediction[0, 0, 0] = 1
    counts = counts_of([(prediction, reference)])
    assert per_volume(counts, [0, 1]) == pytest.approx((6 / 7, 3 / 4))
    assert per_batch(counts, [0, 1], 1) == pytest.approx((3 / 7, 3 / 8))
    assert math.isnan(per_volume(counts, [1])[0])


def test_labels_beyond_the_classes_and_other_shapes_are_refused():
    volume = np.full((2, 2), CLASSES, np.uint8)
    for pair in ((volume, volume % CLASSES), (volume % CLASSES, volume)):
        with pytest.raises(ValueError, match="labels of the"):
            class_counts(*pair, CLASSES)
    with pytest.raises(ValueError, match="differ"):
        class_counts(np.zeros((2, 2), int), np.zeros((2, 3), int), 2)


def test_the_metric_has_the_papers_its_codes_and_the_honest_way():
    generator = np.random.default_rng(0)
    pairs = [tuple(generator.integers(0, CLASSES, (2, 3, 4, 4))[:2]) for _ in range(5)]
    metric = ShapesMetric(batch=2)
    metric.dataset_meta = dict(classes=("cone", "cube", "ball", "background"))
    # Whatever the order in which samples come, batches are of neighbours in the test set.
    for index in (3, 0, 4, 1, 2):
        prediction, labels = map(torch.from_numpy, pairs[index])
        metric.process({}, [dict(prediction=prediction, labels=labels, index=index)])
    counts = counts_of(pairs)
    expected = {
        "dice": per_volume(counts, [0, 1, 2])[0],
        "iou": per_volume(counts, [0, 1, 2])[1],
        "paper_dice": per_batch(counts, [0, 1, 2], 2)[0],
        "paper_iou": per_batch(counts, [0, 1, 2], 2)[1],
        "code_dice": per_batch(counts, [1, 2, 3], 2)[0],
        "code_iou": per_batch(counts, [1, 2, 3], 2)[1],
    }
    found = metric.evaluate(5)
    assert found == {f"Shapes/{k}": pytest.approx(100 * v) for k, v in expected.items()}
    with pytest.raises(ValueError, match="batch"):
        ShapesMetric(batch=0)
