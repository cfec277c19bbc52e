"""FROC against the plain loop of benchmarks/froc.py, and its edge cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.froc import iou, plain_froc
from deeplesion.evaluation.froc import BLOCK, _falling, box_iou, froc

NOTHING = np.zeros((0, 5))
LESION = [10.0, 10.0, 29.0, 29.0]


def loop_sensitivity_at(fps, sensitivity, f):
    """Walk along the polyline from (0, 0)."""
    left = (0.0, 0.0)
    for point in zip(fps, sensitivity, strict=True):
        if point[0] > f:
            share = (f - left[0]) / (point[0] - left[0])
            return left[1] + share * (point[1] - left[1])
        left = point
    return left[1]


coordinate = st.integers(0, 6)
score = st.sampled_from([0.1, 0.2, 0.3, 0.9])
# Few small boxes and few scores, so that hits, ties and duplicates are common.
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
)
detection = st.tuples(box, score).map(lambda pair: [*pair[0], pair[1]])
image = st.tuples(st.lists(detection, max_size=6), st.lists(box, max_size=3))


@settings(max_examples=300, deadline=None)
@given(
    images=st.lists(image, min_size=1, max_size=6),
    iou_threshold=st.sampled_from([0.25, 0.5, 1.0]),
    offset=st.sampled_from([0, 1]),
)
def test_equals_the_plain_loop(images, iou_threshold, offset):
    images[0][1].append([1, 1, 4, 4])  # at least one lesion
    detections = [np.array(d, float).reshape(-1, 5) for d, _ in images]
    ground_truths = [np.array(g, float).reshape(-1, 4) for _, g in images]

    curve = froc(detections, ground_truths, iou_threshold, offset)

    fps, sensitivity = plain_froc(detections, ground_truths, iou_threshold, offset)
    np.testing.assert_array_equal(curve.fps_per_image, fps)
    np.testing.assert_array_equal(curve.sensitivity, sensitivity)
    at = (0, 0.1, 0.5, 1, 2, 4, 8, 16)
    expected = [loop_sensitivity_at(fps, sensitivity, f) for f in at]
    np.testing.assert_allclose(curve.sensitivity_at(at), expected, rtol=0, atol=1e-12)
    assert curve.average == pytest.approx(np.mean(expected[2:6]))
    assert curve.num_images == len(images)
    assert curve.num_lesions == sum(len(g) for g in ground_truths)
    assert np.all(np.diff(curve.thresholds) <= 0)


def test_equals_the_plain_loop_at_the_size_of_the_benchmark():
    rng = np.random.default_rng(0)
    detections, ground_truths = [], []
    for _ in range(300):
        corner = rng.uniform(0, 400, (rng.integers(0, 4), 2))
        lesions = np.hstack([corner, corner + rng.uniform(5, 80, corner.shape)])
        near = lesions[rng.integers(0, max(len(lesions), 1), 25 if len(lesions) else 0)]
        corner = rng.uniform(0, 400, (25, 2))
        boxes = np.vstack(
            [near + rng.normal(0, 5, near.shape), np.hstack([corner, corner + 30]), near]
        )
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        scores = rng.uniform(size=(len(boxes), 1)).round(2)
        detections.append(np.hstack([boxes, scores]))
        ground_truths.append(lesions)

    curve = froc(detections, ground_truths)

    fps, sensitivity = plain_froc(detections, ground_truths)
    np.testing.assert_array_equal(curve.fps_per_image, fps)
    np.testing.assert_array_equal(curve.sensitivity, sensitivity)


def test_box_iou_pairs_and_broadcasts():
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 20, (2, 50, 2))
    a, b = np.concatenate([corner, corner + rng.uniform(0, 20, corner.shape)], axis=2)
    for offset in (0, 1):
        expected = [iou(p, q, offset) for p, q in zip(a, b, strict=True)]
        np.testing.assert_allclose(box_iou(a, b, offset), expected)
        expected = [iou(a[0], q, offset) for q in b]
        np.testing.assert_allclose(box_iou(a[0], b, offset), expected)


def test_perfect_detector():
    ground_truths = [[LESION], [LESION, [50, 50, 80, 70]]]
    detections = [[[*box, 1.0] for box in boxes] for boxes in ground_truths]
    curve = froc(detections, ground_truths)
    np.testing.assert_array_equal(curve.sensitivity_at(), np.ones(6))
    assert curve.average == 1.0
    assert curve.fps_per_image[-1] == 0


def test_no_detections_is_zero_everywhere():
    curve = froc([NOTHING, []], [[LESION], np.zeros((0, 4))])
    np.testing.assert_array_equal(curve.sensitivity_at(), np.zeros(6))
    assert curve.average == 0.0
    assert curve.thresholds.shape == (0,)


def test_one_box_hits_several_lesions():
    nested = [LESION, [11, 11, 29, 29]]
    curve = froc([[[*LESION, 0.5]]], [nested])
    np.testing.assert_array_equal(curve.sensitivity, [1.0])
    np.testing.assert_array_equal(curve.fps_per_image, [0.0])


def test_duplicate_of_a_hit_is_neither_hit_nor_false_positive():
    curve = froc([[[*LESION, 0.9], [*LESION, 0.8]]], [[LESION, [100, 100, 120, 120]]])
    np.testing.assert_array_equal(curve.sensitivity, [0.5, 0.5])
    np.testing.assert_array_equal(curve.fps_per_image, [0.0, 0.0])


def test_ties_keep_image_then_row_order():
    far = [200, 200, 220, 220, 0.5]
    detections = [[far, [*LESION, 0.5]], [[*LESION, 0.5], far]]
    curve = froc(detections, [[LESION], [LESION]])
    np.testing.assert_array_equal(curve.fps_per_image, [0.5, 0.5, 0.5, 1.0])
    np.testing.assert_array_equal(curve.sensitivity, [0.0, 0.5, 1.0, 1.0])


def test_operating_points_outside_the_curve():
    far = [200, 200, 220, 220]
    # One false positive an image comes first, then the hit.
    curve = froc([[[*far, 0.9], [*LESION, 0.8], [*far, 0.1]]], [[LESION, [50, 50, 60, 60]]])
    # (0, 0) -> (1, 0) -> (1, 0.5) -> (2, 0.5)
    np.testing.assert_allclose(
        curve.sensitivity_at((0, 0.5, 0.999, 1, 1.5, 2, 9)), 3 * [0] + 4 * [0.5]
    )


def test_scalar_operating_point():
    assert froc([[[*LESION, 1.0]]], [[LESION]]).sensitivity_at(1) == 1.0


def test_pixel_offset_decides_borderline_overlap():
    lesion = [[0, 0, 9, 9]]
    detection = [[0, 0, 9, 4, 1.0]]
    # Old widths: 10 x 5 of 10 x 10 is exactly 0.5. Modern: 9 x 4 of 9 x 9 is 0.44.
    assert froc([detection], [lesion]).sensitivity[-1] == 1.0
    assert froc([detection], [lesion], pixel_offset=0).sensitivity[-1] == 0.0


def test_boxes_without_area_never_hit_under_the_modern_definition():
    point = [[5, 5, 5, 5]]
    assert froc([[[5, 5, 5, 5, 1.0]]], [point], pixel_offset=0).sensitivity[-1] == 0.0
    assert froc([[[5, 5, 5, 5, 1.0]]], [point], pixel_offset=1).sensitivity[-1] == 1.0


def test_input_is_left_alone():
    detections = np.array([[*LESION, 0.1], [*LESION, 0.9]], np.float32)
    before = detections.copy()
    froc([detections], [[LESION]])
    np.testing.assert_array_equal(detections, before)


def random_images(rng, number, lesions=2):
    """Detections, half of them on lesions, and lesions; no two scores alike."""
    corner = rng.uniform(0, 400, (number, lesions, 2))
    ground_truths = np.concatenate([corner, corner + 30], axis=2)
    boxes = np.concatenate([ground_truths, rng.uniform(0, 400, ground_truths.shape)], axis=1)
    boxes[:, lesions:, 2:] = boxes[:, lesions:, :2] + 30
    scores = rng.permutation(number * 2 * lesions).reshape(number, -1, 1) / number
    return list(np.concatenate([boxes, scores], axis=2)), list(ground_truths)


def repeated_images(groups, number, seed):
    """The definition of the bootstrap: which images each draw holds, and how often."""
    rng = np.random.default_rng(seed)
    labels = np.unique(groups)
    for _ in range(number):
        drawn = rng.integers(len(labels), size=len(labels))
        yield [i for k in drawn for i in np.flatnonzero(groups == labels[k])]


def test_bootstrap_rows_are_the_sensitivities_of_the_repeated_images():
    detections, ground_truths = random_images(np.random.default_rng(0), 9)
    patients = np.array(list("bbaacdddc"))
    at = (0, 0.1, 0.5, 1, 2, 16)
    rows = froc(detections, ground_truths).bootstrap(patients, at, number=30, seed=3)
    assert rows.shape == (30, 6)
    for row, chosen in zip(rows, repeated_images(patients, 30, 3), strict=True):
        curve = froc([detections[i] for i in chosen], [ground_truths[i] for i in chosen])
        np.testing.assert_allclose(row, curve.sensitivity_at(at), atol=1e-12)


def test_bootstrap_of_more_false_positives_than_a_block_is_exact_also_for_parts():
    rng = np.random.default_rng(5)
    detections, ground_truths = random_images(rng, 80)
    detections = [np.repeat(boxes, 12, axis=0) for boxes in detections]
    for boxes in detections:
        boxes[:, 4] = rng.integers(0, 40, len(boxes))  # ties, and hits among false positives
    patients = rng.integers(0, 25, 80)
    chosen = rng.random(80) < 0.5
    lesions = rng.random(160) < 0.3
    whole = froc(detections, ground_truths)
    assert whole.false_positives.sum() > 3 * BLOCK
    at = (0, 0.3, 1, 4, 8, 24, 100)
    for curve in (whole, whole.of_images(chosen), whole.of_images(chosen).of_lesions(lesions)):
        rows = curve.bootstrap(patients, at, number=15, seed=1)
        for row, images in zip(rows, repeated_images(patients, 15, 1), strict=True):
            times = np.bincount(images, minlength=80) * curve.counted
            fps = np.cumsum(curve.false_positives * times[curve.images]) / times.sum()
            weight = times[curve.lesion_images]
            sensitivity = [
                weight[curve.hit_at <= i].sum() / weight.sum() for i in range(len(fps))
            ]  # fmt: skip
            expected = [loop_sensitivity_at(fps, sensitivity, f) for f in at]
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


def test_draws_of_a_single_patient_are_the_curve_itself_to_the_last_bit():
    """At 0.29, say, 29 false positives on 100 images are allowed, though 0.29 * 100 < 29."""
    detections, ground_truths = random_images(np.random.default_rng(0), 100)
    curve = froc(detections, ground_truths)
    at = np.arange(300) / 100
    (row,) = curve.bootstrap(100 * ["a"], at, number=1)
    np.testing.assert_array_equal(row, curve.sensitivity_at(at))
    assert len(set(row)) > 30


def test_bootstrap_spread_is_the_binomial_one():
    # One lesion an image, hit in 70 % of 400, nothing else: resampled sensitivity is a proportion.
    found = np.arange(400) < 280
    detections = [[[*LESION, 1.0]] if hit else [] for hit in found]
    drawn = froc(detections, 400 * [[LESION]]).bootstrap(np.arange(400), (1,), number=2000)
    assert np.mean(drawn) == pytest.approx(0.7, abs=0.003)
    assert np.std(drawn) == pytest.approx(np.sqrt(0.7 * 0.3 / 400), rel=0.1)


def test_bootstrap_repeats_with_the_seed_and_a_draw_without_a_lesion_is_nan():
    detections, ground_truths = random_images(np.random.default_rng(0), 4)
    ground_truths[1:] = 3 * [np.zeros((0, 4))]
    curve = froc(detections, ground_truths)
    first, again, other = (curve.bootstrap(range(4), number=50, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    without = [0 not in chosen for chosen in repeated_images(np.arange(4), 50, 0)]
    assert 0 < sum(without) < 50
    np.testing.assert_array_equal(np.isnan(first), np.tile(np.array(without)[:, None], 6))
    assert not np.array_equal(np.isnan(first), np.isnan(other))


def test_wrong_groups_are_refused():
    with pytest.raises(ValueError, match="each of the 1 images"):
        froc([GOOD], [[LESION]]).bootstrap(["a", "b"])


def test_curve_of_some_images_is_the_curve_of_these_alone():
    detections, ground_truths = random_images(np.random.default_rng(2), 12)
    ground_truths[3] = np.zeros((0, 4))
    chosen = np.arange(12) % 3 == 0
    part = froc(detections, ground_truths).of_images(chosen)
    alone = froc(*([x for x, c in zip(xs, chosen) if c] for xs in (detections, ground_truths)))
    assert (part.num_images, part.num_lesions) == (alone.num_images, alone.num_lesions) == (4, 6)
    at = (0, 0.2, 0.5, 1, 2, 4)
    np.testing.assert_array_equal(part.sensitivity_at(at), alone.sensitivity_at(at))
    assert part.average == alone.average


def test_curve_of_some_lesions_keeps_the_false_positives_of_all_images():
    detections, ground_truths = random_images(np.random.default_rng(2), 12)
    curve = froc(detections, ground_truths)
    chosen = np.arange(24) % 4 == 1
    part = curve.of_lesions(chosen)
    assert (part.num_images, part.num_lesions) == (12, 6)
    np.testing.assert_array_equal(part.fps_per_image, curve.fps_per_image)
    expected = [np.mean(curve.hit_at[chosen] <= i) for i in range(len(curve.thresholds))]
    np.testing.assert_allclose(part.sensitivity, expected)
    # What finds a lesion that is left out does not become a false positive.
    other = curve.of_lesions(~chosen)
    together = (6 * part.sensitivity + 18 * other.sensitivity) / 24
    np.testing.assert_allclose(together, curve.sensitivity)


def test_parts_are_chosen_by_one_bool_each():
    curve = froc([GOOD, GOOD], [[LESION], [LESION]])
    with pytest.raises(ValueError, match="2 images, got bool of shape"):
        curve.of_images(np.array([True]))
    with pytest.raises(ValueError, match="2 lesions, got int64"):
        curve.of_lesions(np.array([0, 1]))


@pytest.mark.parametrize("number", [0, 1, 7, 5000])
def test_falling_scores_keep_ties_in_place(number):
    scores = np.random.default_rng(0).integers(0, 50, number) / 7
    order, ordered = _falling(scores)
    np.testing.assert_array_equal(order, np.argsort(-scores, kind="stable"))
    np.testing.assert_array_equal(ordered, scores[order])


def test_box_iou_of_whole_numbers():
    assert box_iou(np.array([0, 0, 9, 9]), np.array([0, 0, 9, 4])) == 0.5


GOOD = [[*LESION, 0.5]]


@pytest.mark.parametrize(
    ("detections", "ground_truths", "message"),
    [
        ([GOOD, GOOD], [[LESION]], "2 images, ground_truths 1"),
        ([GOOD, [[*LESION, np.nan]]], [[LESION], [LESION]], r"detections\[1\].*NaN"),
        ([GOOD, NOTHING, [[*LESION, np.inf]]], 3 * [[LESION]], r"detections\[2\].*infinite"),
        ([GOOD], [[[10, 10, np.nan, 20]]], r"ground_truths\[0\].*NaN"),
        ([GOOD, [[20, 0, 10, 5, 0.5]]], [[LESION], [LESION]], r"detections\[1\].*x2 < x1"),
        ([GOOD, NOTHING], [[], [[0, 9, 5, 3]]], r"ground_truths\[1\].*y2 < y1"),
        ([GOOD, [LESION]], [[LESION], [LESION]], r"detections\[1\] has shape \(1, 4\)"),
        ([[*LESION, 0.5]], [[LESION]], r"detections\[0\] has shape \(5,\)"),
        ([GOOD], [GOOD], r"ground_truths\[0\] has shape \(1, 5\)"),
        ([], [], "no images"),
    ],
)
def test_bad_input_is_named(detections, ground_truths, message):
    with pytest.raises(ValueError, match=message):
        froc(detections, ground_truths)


@pytest.mark.parametrize("iou_threshold", [0, -0.5, 1.5, np.nan])
def test_bad_threshold_is_refused(iou_threshold):
    with pytest.raises(ValueError, match="iou_threshold"):
        froc([GOOD], [[LESION]], iou_threshold)


@pytest.mark.parametrize("fps", [-1, (0.5, np.nan)])
def test_bad_operating_point_is_refused(fps):
    with pytest.raises(ValueError, match="fps"):
        froc([GOOD], [[LESION]]).sensitivity_at(fps)
