"""FROC of 3D boxes against a plain loop of its definition; calibration."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplesion.errors import DataError, MissingDataError, UserError
from deeplesion.evaluation.volume_froc import (
    VOLUME_FPS,
    Calibration,
    box_overlap,
    read_calibration,
    volume_froc,
    write_calibration,
)

NOTHING = np.zeros((0, 7))
LESION = [10.0, 10, 5, 29, 29, 9]
FAR = [200.0, 200, 50, 210, 210, 52]


def plain_overlap(a, b, kind):
    common, own, other = 1, 1, 1
    for axis in range(3):
        common *= max(0, min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis]) + 1)
        own *= a[axis + 3] - a[axis] + 1
        other *= b[axis + 3] - b[axis] + 1
    return common / (own if kind == "iobb" else own + other - common)


def plain_curve(detections, ground_truths, kind, threshold):
    """(false positives per volume, sensitivity) after each detection."""
    rows = [(row[6], v, row[:6]) for v, rows in enumerate(detections) for row in rows]
    rows.sort(key=lambda row: -row[0])  # stable
    hit, false_positives, points = set(), 0, []
    lesions = sum(len(rows) for rows in ground_truths)
    for _, v, box in rows:
        reached = [
            j
            for j, truth in enumerate(ground_truths[v])
            if plain_overlap(box, truth, kind) >= threshold
        ]
        hit |= {(v, j) for j in reached}
        false_positives += not reached
        points.append((false_positives / len(ground_truths), len(hit) / lesions))
    return points


def plain_sensitivity_at(points, fps):
    """0 below the first point, linear between points, the last beyond."""
    if not points or fps < points[0][0]:
        return 0.0
    left = points[0]
    for point in points:
        if point[0] > fps:
            return left[1] + (fps - left[0]) / (point[0] - left[0]) * (point[1] - left[1])
        left = point
    return left[1]


corner = st.tuples(*[st.integers(0, 5)] * 6)
box = corner.map(lambda c: [*np.minimum(c[:3], c[3:]), *np.maximum(c[:3], c[3:])])
detection = st.tuples(box, st.sampled_from([0.1, 0.2, 0.3, 0.9])).map(lambda p: [*p[0], p[1]])
volume = st.tuples(st.lists(detection, max_size=6), st.lists(box, max_size=3))


@settings(max_examples=120, deadline=None)
@given(
    volumes=st.lists(volume, min_size=1, max_size=5),
    kind=st.sampled_from(["iobb", "iou"]),
    threshold=st.sampled_from([0.1, 0.3, 1.0]),
)
def test_equals_the_plain_loop(volumes, kind, threshold):
    volumes[0][1].append([1, 1, 1, 3, 3, 3])
    detections = [np.array(d, float).reshape(-1, 7) for d, _ in volumes]
    ground_truths = [np.array(g, float).reshape(-1, 6) for _, g in volumes]
    curve = volume_froc(detections, ground_truths, kind, threshold)
    points = plain_curve(detections, ground_truths, kind, threshold)
    assert list(zip(curve.fps_per_image, curve.sensitivity)) == points
    expected = [plain_sensitivity_at(points, fps) for fps in VOLUME_FPS]
    np.testing.assert_allclose(curve.sensitivity_at(), expected, atol=1e-12)
    assert curve.average == pytest.approx(np.mean(expected))
    assert (curve.num_images, curve.num_lesions) == (
        len(volumes),
        sum(len(g) for g in ground_truths),
    )


def test_overlaps_count_the_last_pixel_and_slice():
    a, b = np.array([0, 0, 0, 9, 9, 0]), np.array([5, 0, 0, 14, 9, 1])
    assert box_overlap(a, b, "iobb") == 50 / 100
    assert box_overlap(b, a, "iobb") == 50 / 200
    assert box_overlap(a, b, "iou") == 50 / 250
    assert box_overlap(a, a + 10, "iobb") == 0


def test_perfect_and_empty():
    truths = [[LESION], [LESION, FAR], []]
    perfect = volume_froc([[[*box, 1.0] for box in boxes] for boxes in truths], truths)
    assert perfect.sensitivity_at().tolist() == [1.0] * 7
    nothing = volume_froc([NOTHING] * 3, truths)
    assert nothing.sensitivity_at().tolist() == [0.0] * 7
    assert np.isnan(volume_froc([[[*FAR, 0.5]]], [[]]).average)


def test_volumes_without_lesions_count_for_the_false_positives():
    curve = volume_froc([[[*LESION, 0.5], [*FAR, 0.4]], [[*FAR, 0.9]]], [[LESION], []])
    # (0.5, 0), (0.5, 1), (1, 1); below the first point 0, not on a line from (0, 0).
    assert curve.fps_per_image.tolist() == [0.5, 0.5, 1.0]
    assert curve.sensitivity_at((0, 0.25, 0.499, 0.5, 0.75, 8)).tolist() == [0, 0, 0, 1, 1, 1]
    assert curve.average == pytest.approx(5 / 7)


def test_one_detection_may_hit_several_and_a_part_is_enough_for_iobb():
    other = [10.0, 10, 5, 29, 29, 12]
    within = [12.0, 12, 6, 14, 14, 6]
    curve = volume_froc([[[*within, 0.5]]], [[LESION, other]])
    assert curve.sensitivity.tolist() == [1.0]
    assert volume_froc([[[*within, 0.5]]], [[LESION, other]], "iou", 0.1).sensitivity[-1] == 0


def test_intervals_draw_groups_of_volumes():
    curve = volume_froc([[[*LESION, 0.9]], [[*FAR, 0.8]]] * 4, [[LESION], [LESION]] * 4)
    drawn = curve.bootstrap([0, 0, 1, 1, 2, 2, 3, 3], number=50)
    assert drawn.shape == (50, 7)
    np.testing.assert_array_equal(drawn, 0.5)
    assert curve.bootstrap(range(8), number=50).std() > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([NOTHING], []), "one entry a volume"),
        (([], []), "no volumes"),
        (([np.zeros((1, 6))], [[]]), r"detections\[0\] has shape"),
        (([NOTHING, [[5, 0, 0, 1, 1, 1, 0.5]]], [[], []]), r"detections\[1\] holds a box"),
        (([NOTHING], [[[0, 0, np.nan, 1, 1, 1]]]), r"ground_truths\[0\] holds a NaN"),
        (([NOTHING], [[]], "dice"), "overlap"),
        (([NOTHING], [[]], "iou", 0), "threshold"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        volume_froc(*arguments)


# Calibration


@settings(max_examples=60, deadline=None)
@given(volumes=st.lists(volume, min_size=1, max_size=5), fps=st.floats(0.2, 6))
def test_a_calibration_gives_the_lowest_score_with_at_most_so_many(volumes, fps):
    detections = [np.array(d, float).reshape(-1, 7) for d, _ in volumes]
    truths = [np.array(g, float).reshape(-1, 6) for _, g in volumes]
    curve = volume_froc(detections, truths)
    calibration = Calibration.of(curve, {"name": "a"})
    count = len(volumes)

    def false_positives(score):
        kept = [rows[rows[:, 6] >= score] for rows in detections]
        return volume_froc(kept, truths).false_positives.sum() / count

    good = [s for s in (0.1, 0.2, 0.3, 0.9) if s in curve.thresholds and false_positives(s) <= fps]
    if 1 / count <= fps <= false_positives(0) and good:
        assert calibration.score_at(fps) == min(good)
    else:
        with pytest.raises(UserError):
            calibration.score_at(fps)


def example():
    curve = volume_froc(
        [[[*LESION, 0.9], [*FAR, 0.6], [*FAR, 0.4]], [[*FAR, 0.7], [*FAR, 0.4]]], [[LESION], []]
    )
    return Calibration.of(curve, {"name": "alignshift_3slice", "options": {"interval_mm": 2.0}})


def test_a_calibration_survives_its_file(tmp_path):
    path = tmp_path / "calibration.json"
    write_calibration(path, example())
    read = read_calibration(path)
    assert read.scores.tolist() == [0.9, 0.7, 0.6, 0.4]
    assert read.fps_per_scan.tolist() == [0, 0.5, 1, 2]
    assert read.sensitivity.tolist() == [1, 1, 1, 1]
    assert (read.scans, read.lesions, read.algorithm) == (2, 1, example().algorithm)
    assert [read.score_at(fps) for fps in (0.5, 0.9, 1, 1.5, 2)] == [0.7, 0.7, 0.6, 0.6, 0.4]
    for beyond in (0.1, 0, 2.1, np.nan):
        with pytest.raises(UserError, match=r"calibration.json.*2 scans.*from 0.5 to 2"):
            read.score_at(beyond)


def test_without_lesions_or_detections(tmp_path):
    path = tmp_path / "calibration.json"
    write_calibration(path, Calibration.of(volume_froc([[[*FAR, 0.5]]], [[]]), {}))
    assert read_calibration(path).score_at(1) == 0.5
    write_calibration(path, Calibration.of(volume_froc([NOTHING], [[]]), {}))
    with pytest.raises(UserError, match="no false positives"):
        read_calibration(path).score_at(1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(format="x"), "format"),
        (dict(scans=0), "scans"),
        (dict(scans=True), "scans"),
        (dict(algorithm="a"), "algorithm"),
        (dict(score=[0.9, 0.9, 0.6, 0.4]), "falling"),
        (dict(score=[0.9]), "equally many"),
        (dict(score="abcd"), "equally many"),
        (dict(score=[[1], 2]), "equally many"),
        (dict(fp_per_scan=[0, 2, 1, 2]), "rising"),
        (dict(sensitivity=None), "equally many"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path, change, message):
    path = tmp_path / "calibration.json"
    write_calibration(path, example())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        read_calibration(path)


def test_files_that_are_not_there_or_not_json(tmp_path):
    with pytest.raises(MissingDataError, match=r"nothing.json"):
        read_calibration(tmp_path / "nothing.json")
    for content in ("", "[]", "{", "[" * 100000):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=r"bad.json"):
            read_calibration(tmp_path / "bad.json")
