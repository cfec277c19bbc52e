"""Linking: shapes of known geometry, a plain loop of the rule, what must not change the result."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ct_volumes.interpolation import centroid, ellipse, interpolate, shrink, signed_distance
from ct_volumes.lesions import Patch, SliceDetections
from ct_volumes.linking import link
from ct_volumes.volume import CTVolume, Source

SIZE = (48, 56)  # rows, columns
SPACING = (0.8, 0.8)


def scan(steps, spacing=SPACING, size=SIZE):
    """A volume whose slices lie `steps` mm apart; the first at 100 mm."""
    below = np.append(0.0, np.cumsum(steps))
    origins = np.stack([0 * below, 0 * below, 100 - below], axis=1)
    hu = np.zeros((len(below), *size), np.int16)
    source = Source(Path("scan"), "dicom", hu.shape)
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), spacing, source)


def ball_detections(volume, balls, looked_at, masks=True, missed=()):
    """What a perfect detector sees of balls (x, y in pixels, mm from the first slice, radius in
    mm, score) on the slices that it looks at."""
    rows, columns = volume.spacing_mm
    below = volume.positions_mm - volume.positions_mm[0]
    y, x = np.mgrid[: volume.hu.shape[1], : volume.hu.shape[2]]
    detections = []
    for index in looked_at:
        boxes, scores, patches = [], [], []
        for cx, cy, depth, radius, score in balls:
            square = radius**2 - (below[index] - depth) ** 2
            if square <= 0 or index in missed:
                continue
            disc = ((x - cx) * columns) ** 2 + ((y - cy) * rows) ** 2 <= square
            half = np.sqrt(square) / np.array([columns, rows])
            if disc.any():
                boxes.append([cx - half[0], cy - half[1], cx + half[0], cy + half[1]])
                scores.append(score - 0.001 * abs(below[index] - depth))
                patches.append(Patch.of(disc))
        detections.append(
            SliceDetections(
                index,
                np.array(boxes).reshape(-1, 4),
                np.array(scores),
                tuple(patches) if masks else None,
            )
        )
    return detections


def summary(lesions):
    """Everything that a lesion says, to compare."""
    return [
        (
            each.score,
            each.first,
            each.last,
            each.box.tolist(),
            each.volume_mm3,
            each.centroid_mm.tolist(),
            each.diameters_mm.tolist(),
            [(s.index, s.score, s.bbox.tolist(), s.patch.mask.sum()) for s in each.slices],
        )
        for each in lesions
    ]


# Balls, tubes


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("step, every", [(1.0, 1), (1.0, 2), (0.7, 3), (1.25, 4), (2.5, 1), (5, 1)])
@pytest.mark.parametrize("radius", [3.0, 5.0, 8.0])
def test_a_ball_at_every_phase_is_one_lesion_of_its_size(radius, step, every, masks):
    volume = scan([step] * int(40 / step))
    volumes = []
    for phase in np.arange(0, 1, 0.1) * step * every:
        ball = (28.3, 23.6, 18 + phase, radius, 0.9)
        detections = ball_detections(volume, [ball], range(1, len(volume.hu), every), masks)
        (lesion,) = link(detections, volume)

        seen = [d.index for d in detections if len(d.boxes)]
        assert [s.index for s in lesion.slices if s.score is not None] == seen
        assert [s.index for s in lesion.slices] == list(range(lesion.first, lesion.last + 1))
        assert lesion.score == max(d.scores.max() for d in detections if len(d.scores))
        # It reaches to half-way between what is seen and what is not.
        assert abs((seen[0] - lesion.first) - every // 2) == 0
        assert abs((lesion.last - seen[-1]) - every // 2) == 0
        volumes.append(lesion.volume_mm3)

        # The longest section looked at.
        nearest = np.abs(np.array(seen) * step - ball[2]).min()
        diameter = 2 * np.sqrt(radius**2 - nearest**2)
        np.testing.assert_allclose(lesion.diameters_mm, diameter, atol=1.3 * SPACING[0])
        assert abs(lesion.recist_index * step - ball[2]) == pytest.approx(nearest)
        ends = lesion.recist
        lengths = np.linalg.norm((ends[1::2] - ends[::2]) * SPACING[::-1], axis=1)
        np.testing.assert_allclose(lengths, lesion.diameters_mm)

        true = volume.to_world(*ball[:2], 0) + volume.normal * ball[2]
        np.testing.assert_allclose(lesion.centroid_mm[:2], true[:2], atol=0.3)
        assert abs(lesion.centroid_mm - true)[2] <= 0.5 * every * step
    # On the average over the phase; of a ball that few sections meet interpolation takes a little.
    error = 0.03 + 0.5 * (step * every / (2 * radius)) ** 2 * (every > 1)
    assert np.mean(volumes) == pytest.approx(4 / 3 * np.pi * radius**3, rel=error)


def test_all_sections_looked_at_give_the_sum_of_their_areas():
    """Cavalieri: areas times the distance of sections, here to the bit of the masks."""
    volume = scan([1.5] * 20)
    detections = ball_detections(volume, [(28, 24, 14.2, 9, 0.9)], range(21))
    (lesion,) = link(detections, volume)
    pixels = sum(p.mask.sum() for d in detections for p in d.masks)
    assert lesion.volume_mm3 == pytest.approx(pixels * 0.64 * 1.5)
    labels = lesion.labels(volume.hu.shape, 7)
    assert labels.dtype == np.uint16
    assert (labels == 7).sum() == pixels


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_an_oblique_tube_moves_on_between_the_slices_looked_at(every):
    volume = scan([1.0] * 30)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]

    def centre(index):
        return 15 + 0.8 * index, 30 - 0.4 * index

    def section(index):
        cx, cy = centre(index)
        return (x - cx) ** 2 + (y - cy) ** 2 <= 6.5**2

    detections = [
        SliceDetections(
            i,
            np.array([[*np.subtract(centre(i), 6.5), *np.add(centre(i), 6.5)]]),
            np.array([0.5 + 0.01 * i]),
            (Patch.of(section(i)),),
        )
        for i in range(0, 31, every)
    ]
    (lesion,) = link(detections, volume)
    assert (lesion.first, lesion.last) == (0, 30)
    for each in lesion.slices:
        cx, cy = centre(each.index)
        np.testing.assert_allclose(each.bbox, [cx - 6.5, cy - 6.5, cx + 6.5, cy + 6.5])
        painted = np.zeros(SIZE, bool)
        each.patch.paint(painted)
        true = section(each.index)
        assert (painted & true).sum() / (painted | true).sum() > 0.93
    assert lesion.volume_mm3 == pytest.approx(31 * np.pi * 6.5**2 * 0.64, rel=0.03)
    assert lesion.best.index == 30


def test_non_square_pixels_are_measured_in_mm():
    """A ball of 9 mm through pixels three times as high as wide; its centre on a slice."""
    volume = scan([1.0] * 24, spacing=(1.5, 0.5), size=(20, 60))
    for every in (1, 3):
        detections = ball_detections(volume, [(30, 10, 12, 9, 0.9)], range(0, 25, every))
        (lesion,) = link(detections, volume)
        np.testing.assert_allclose(lesion.diameters_mm, 18, atol=1.5)
        assert lesion.volume_mm3 == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.06)
        np.testing.assert_allclose(lesion.centroid_mm, volume.to_world(30, 10, 12), atol=0.3)


def test_unevenly_spaced_slices_count_for_what_belongs_to_them():
    steps = [1, 1, 3, 2, 1, 1, 4, 1, 2, 2, 1, 1, 3, 1]
    volume = scan(steps)
    detections = ball_detections(volume, [(28, 24, 11, 9.5, 0.9)], range(15))
    (lesion,) = link(detections, volume)
    areas = [d.masks[0].mask.sum() * 0.64 for d in detections if len(d.boxes)]
    # Half the way to each neighbour, over gaps as well; the last slice lies beside one, and ends
    # there as at an end.
    extents = [1.5 + 0.5, 2.5, 1.5, 1, 2.5, 2.5, 1.5, 2, 1.5, 1, 0.5 + 0.5]
    assert (lesion.first, lesion.last) == (2, 12)
    assert lesion.volume_mm3 == pytest.approx(np.dot(areas, extents))
    assert lesion.volume_mm3 == pytest.approx(4 / 3 * np.pi * 9.5**3, rel=0.06)


def test_interpolation_goes_by_position_not_by_number():
    volume = scan([1.0, 3.0])
    boxes = [np.array([[10.0, 10, 30, 30]]), np.array([[14.0, 10, 34, 30]])]
    (lesion,) = link(
        [SliceDetections(i, b, np.array([0.9])) for i, b in zip((0, 2), boxes)], volume
    )
    np.testing.assert_allclose(lesion.slices[1].bbox, [11, 10, 31, 30])
    assert lesion.slices[1].score is None


# What is one lesion and what are two


def test_two_balls_near_each_other_stay_apart():
    volume = scan([1.0] * 30)
    side_by_side = [(20, 24, 12, 6, 0.9), (36, 24, 13, 6, 0.8)]  # 0.8 mm between them
    astride = [(18, 24, 9, 6, 0.9), (30, 24, 21, 6, 0.8)]  # one ends where the other starts
    for balls in (side_by_side, astride):
        for every in (1, 2, 3):
            detections = ball_detections(volume, balls, range(0, 31, every))
            lesions = link(detections, volume)
            assert len(lesions) == 2
            for lesion, ball in zip(lesions, balls):
                assert lesion.volume_mm3 == pytest.approx(4 / 3 * np.pi * 6**3, rel=0.2)
                world = volume.to_world(ball[0], ball[1], ball[2])
                np.testing.assert_allclose(lesion.centroid_mm, world, atol=0.8)


def test_balls_above_each_other_are_two_beyond_the_bridge():
    volume = scan([1.0] * 40)
    balls = [(28, 24, 10, 5, 0.9), (28, 24, 28, 5, 0.8)]  # 8 mm between them
    detections = ball_detections(volume, balls, range(41))
    assert len(link(detections, volume)) == 2
    assert len(link(detections, volume, bridge_mm=10.0)) == 1


@pytest.mark.parametrize(
    "missed, bridge_mm, parts",
    [((14,), 2.0, 1), ((14, 15), 2.0, 2), ((14, 15), 3.0, 1), ((13, 14, 15, 16), 5.0, 1)],
)
def test_missed_slices_are_bridged_up_to_a_distance(missed, bridge_mm, parts):
    volume = scan([1.0] * 30)
    ball = [(28, 24, 14.5, 8, 0.9)]
    (whole,) = link(ball_detections(volume, ball, range(31)), volume)
    lesions = link(
        ball_detections(volume, ball, range(31), missed=missed), volume, bridge_mm=bridge_mm
    )
    assert len(lesions) == parts
    assert sum(each.volume_mm3 for each in lesions) == pytest.approx(whole.volume_mm3, rel=0.2)
    if parts == 1:
        assert (lesions[0].first, lesions[0].last) == (whole.first, whole.last)
        assert lesions[0].volume_mm3 == pytest.approx(whole.volume_mm3, rel=0.03)


@pytest.mark.parametrize("step", [1.0, 5.0, 10.0])
def test_the_next_slice_looked_at_is_always_in_reach(step):
    volume = scan([step] * 4)
    ball = [(28, 24, 2 * step, 1.5 * step, 0.9)]
    (lesion,) = link(ball_detections(volume, ball, range(5)), volume, bridge_mm=0.0)
    assert (lesion.first, lesion.last) == (1, 3)


def test_a_ball_over_a_gap_of_the_scan_is_one_lesion():
    """6 mm of slices are missing in the middle of the ball."""
    volume = scan([1.0] * 10 + [7.0] + [1.0] * 10)
    ball = [(28, 24, 13.5, 9, 0.9)]
    for every in (1, 2):
        (lesion,) = link(ball_detections(volume, ball, range(0, 22, every)), volume)
        assert [s.index for s in lesion.slices] == list(range(lesion.first, lesion.last + 1))
        assert lesion.volume_mm3 == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.1)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("radius, seen", [(3, range(17, 20)), (8, range(12, 23))])
def test_a_lesion_ends_beside_a_long_gap(radius, seen, every):
    """Two parts of 20 slices, 300 mm apart: what is found at the end of the one ends there, and
    what is found at the beginning of the other is another lesion."""
    volume = scan([1.0] * 19 + [300.0] + [1.0] * 19)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    disc = Patch.of((x - 28) ** 2 + (y - 24) ** 2 <= radius**2)
    box = np.array([[28.0, 24, 28, 24]]) + radius * np.array([-1, -1, 1, 1])
    looked_at = sorted({*range(0, 20, every), 19, *range(20, 40, every)})
    found = [
        SliceDetections(i, box, np.array([0.9 - i / 100]), (disc,))
        if i in seen
        else SliceDetections(i, np.zeros((0, 4)), np.zeros(0), ())
        for i in looked_at
    ]
    lesions = link(found, volume)
    parts = [[i for i in seen if i < 20], [i for i in seen if i >= 20]]
    assert len(lesions) == sum(map(bool, parts))
    for lesion, part in zip(lesions, parts):
        true = disc.mask.sum() * 0.64 * len(part)
        assert lesion.volume_mm3 == pytest.approx(true, abs=disc.mask.sum() * 0.64 * every / 2)
        assert {lesion.first, lesion.last} & {19, 20}
        middle = volume.to_world(28, 24, np.array(part)).mean(axis=0)
        np.testing.assert_allclose(lesion.centroid_mm, middle, atol=0.5)


@pytest.mark.parametrize(
    "steps, bridge_mm, parts",
    [
        ([1.0] * 3 + [10.0] + [1.0] * 3, 0.0, 1),
        ([1.0] * 3 + [11.0] + [1.0] * 3, 5.0, 2),
        ([1.0] * 3 + [11.0] + [1.0] * 3, 12.0, 1),
        ([5.0] * 3 + [10.0] + [5.0] * 3, 5.0, 1),  # one slice is missing
        ([5.0] * 3 + [15.0] + [5.0] * 3, 5.0, 2),
        ([12.0] * 6, 5.0, 1),  # no gap
        ([1.0] * 3 + [12.0] * 3, 5.0, 1),
    ],
)
def test_gaps_are_bridged_up_to_10_mm_or_as_far_as_is_asked(steps, bridge_mm, parts):
    volume = scan(steps)
    box = np.array([[10.0, 10, 20, 20]])
    found = [SliceDetections(i, box, np.array([0.5])) for i in range(7)]
    assert len(link(found, volume, bridge_mm=bridge_mm)) == parts


def test_where_few_slices_are_looked_at_nothing_is_repeated_beyond_a_gap():
    """Half the step to the next slice looked at reaches over the gap; the lesion does not."""
    volume = scan([1.0] * 20 + [7.0] + [1.0] * 20)
    box = np.array([[10.0, 10, 20, 20]])
    nothing = np.zeros((0, 4)), np.zeros(0)
    found = [
        SliceDetections(0, *nothing),
        SliceDetections(20, box, np.array([0.5])),
        SliceDetections(40, *nothing),
    ]
    (lesion,) = link(found, volume)
    assert (lesion.first, lesion.last) == (10, 20)
    (lesion,) = link(found[1:], volume)
    assert (lesion.first, lesion.last) == (20, 20)


def test_a_chain_by_hand():
    """A (0.9) goes on with B: the larger IoU, though C has the higher score. C goes on with D,
    which lies in it; E is nobody's. F is B again and suppressed."""
    volume = scan([2.0] * 3)
    a, b, c = [10, 10, 29, 29], [12, 10, 31, 29], [19, 10, 38, 29]
    d, e, f = [33, 12, 38, 18], [2, 40, 9, 46], [12, 11, 31, 29]
    found = [[a], [b, c, f], [d], [e]]
    scores = [[0.9], [0.6, 0.7, 0.5], [0.4], [0.3]]
    detections = [
        SliceDetections(i, np.array(boxes, float), np.array(s))
        for i, (boxes, s) in enumerate(zip(found, scores))
    ]
    lesions = link(detections, volume)
    assert [each.score for each in lesions] == [0.9, 0.7, 0.3]
    assert [[s.score for s in each.slices] for each in lesions] == [[0.9, 0.6], [0.7, 0.4], [0.3]]
    np.testing.assert_array_equal(lesions[0].box, [10, 10, 0, 31, 29, 1])
    assert len(link(detections, volume, min_score=0.35)) == 2
    assert len(link(detections, volume, nms_iou=0.99)) == 4
    # Of a lesion's best slice: what stays keeps its weaker slices.
    (best, second) = link(detections, volume, lesion_score=0.7)
    assert [s.score for s in best.slices] == [0.9, 0.6]
    assert [s.score for s in second.slices] == [0.7, 0.4]


def test_faint_detections_beyond_a_lesion_do_not_lengthen_it():
    """A weak one between strong ones stays; what is cut off starts no lesion of its own."""
    volume = scan([1.0] * 8)
    scores = [0.2, 0.3, 0.6, 0.2, 0.9, 0.5, 0.4, 0.2]
    box = np.array([[10.0, 10, 20, 20]])
    found = [SliceDetections(i, box, np.array([s])) for i, s in enumerate(scores)]
    (lesion,) = link(found, volume)
    assert (lesion.first, lesion.last) == (2, 5)
    (lesion,) = link(found, volume, score_share=0)
    assert (lesion.first, lesion.last) == (0, 7)


def test_by_default_detections_below_a_tenth_are_left_out():
    """Though half of the best score of their lesion, they do not lengthen it, nor make one."""
    volume = scan((1.0,) * 4)
    box, elsewhere = [10.0, 10, 30, 30], [35.0, 10, 45, 20]
    scores = [(0.099, box), (0.1, box), (0.15, box), (0.11, box), (0.099, elsewhere)]
    detections = [
        SliceDetections(index, np.array([where]), np.array([score]), None)
        for index, (score, where) in enumerate(scores)
    ]
    (lesion,) = link(detections, volume)
    assert [each.index for each in lesion.slices] == [1, 2, 3]


def test_detections_need_not_be_where_the_volume_starts_or_ends():
    volume = scan([1.0] * 5)
    box = np.array([[10.0, 10, 20, 20]])
    (lesion,) = link([SliceDetections(3, box, np.array([0.5]))], volume)
    assert (lesion.first, lesion.last) == (3, 3)
    assert link([], volume) == []
    assert link([SliceDetections(3, np.zeros((0, 4)), np.zeros(0), ())], volume) == []
    assert link([SliceDetections(3, np.zeros(0), np.zeros(0))], volume) == []


# Against a plain loop of the rule


def plain_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    common = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return common / (sum(areas) - common), common / min(areas)


def over_a_long_gap(positions, one, other):
    """Whether more than 10 mm lie between two slices of which others are missing."""
    steps = np.diff(positions).tolist()
    for at in range(min(one, other), max(one, other)):
        beside = max(([0] + steps)[at], (steps + [0])[at + 1])
        if steps[at] > 10 and (steps[at] > 1.5 * beside > 0 or steps[at] > 50):
            return True
    return False


def plain_chains(detections, positions, nms_iou, iou, overlap, bridge_mm, share):
    """{slice: box} of each lesion, found one by one."""
    left = []  # score, slice, box
    for each in detections:
        rows = sorted(zip(each.scores.tolist(), each.boxes.tolist()), reverse=True)
        kept = []
        for score, box in rows:
            if all(plain_iou(box, other)[0] <= nms_iou for _, other in kept):
                kept.append((score, box))
        left += [(score, each.index, box) for score, box in kept]
    looked_at = [each.index for each in detections]
    chains = []
    while left:
        start = max(left)
        left.remove(start)
        chain = {start[1]: start}
        for way in (-1, 1):
            _, index, box = start
            while True:
                place = looked_at.index(index)
                ahead = looked_at[place + 1 :] if way > 0 else looked_at[:place][::-1]
                best = None
                for number, other in enumerate(ahead):
                    over = over_a_long_gap(positions, index, other)
                    far = abs(positions[other] - positions[index]) > bridge_mm + 1e-3
                    if far and (number or over):
                        break
                    linked = []
                    for candidate in left:
                        overlaps = plain_iou(box, candidate[2])
                        if candidate[1] == other and (overlaps[0] >= iou or overlaps[1] >= overlap):
                            linked.append((overlaps[0], candidate))
                    if linked:
                        best = max(linked)[1]
                        break
                if best is None:
                    break
                left.remove(best)
                _, index, box = best
                chain[index] = best
        for ends in (sorted(chain), sorted(chain, reverse=True)):
            for index in ends:
                if chain[index][0] >= share * start[0]:
                    break
                del chain[index]
        chains.append({index: box for index, (_, _, box) in chain.items()})
    return chains


@st.composite
def random_scan(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 9))
    volume = scan(rng.choice([0.5, 1, 2, 6, 40], count - 1))
    looked_at = np.flatnonzero(rng.uniform(size=count) < 0.8)
    number = draw(st.integers(0, 8))
    scores = rng.permutation(number * len(looked_at)).reshape(len(looked_at), number) / 100 + 0.05
    detections = []
    for index, score in zip(looked_at.tolist(), scores):
        corner = rng.integers(0, 12, (number, 2))
        boxes = np.hstack([corner, corner + rng.integers(0, 12, (number, 2))])
        detections.append(SliceDetections(index, boxes.astype(float), score))
    return volume, detections


@settings(max_examples=200, deadline=None)
@given(
    found=random_scan(),
    nms_iou=st.sampled_from([0.3, 0.5, 1.0]),
    iou=st.sampled_from([0.3, 0.5]),
    overlap=st.sampled_from([0.5, 0.8]),
    bridge_mm=st.sampled_from([0.0, 2.0, 5.0, 100.0]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_equals_the_plain_loop(found, nms_iou, iou, overlap, bridge_mm, share):
    volume, detections = found
    rule = (nms_iou, iou, overlap, bridge_mm)
    lesions = link(detections, volume, 0.0, *rule, score_share=share)
    expected = plain_chains(detections, volume.positions_mm, *rule, share)
    chains = [
        {s.index: s.bbox.tolist() for s in each.slices if s.score is not None} for each in lesions
    ]
    assert chains == expected
    for each in lesions:
        assert [s.index for s in each.slices] == list(range(each.first, each.last + 1))
        assert all(s.patch.mask.any() for s in each.slices)


@settings(max_examples=60, deadline=None)
@given(found=random_scan(), data=st.data())
def test_the_order_of_detections_and_slices_changes_nothing(found, data):
    volume, detections = found
    expected = summary(link(detections, volume))
    shuffled = []
    for each in detections:
        order = data.draw(st.permutations(range(len(each.boxes))))
        order = np.array(order, int)
        shuffled.append(replace(each, boxes=each.boxes[order], scores=each.scores[order]))
    assert summary(link(data.draw(st.permutations(shuffled)), volume)) == expected


@settings(max_examples=60, deadline=None)
@given(found=random_scan())
def test_a_volume_upside_down_gives_the_same_lesions(found):
    volume, detections = found
    last = len(volume.hu) - 1
    turned = scan(np.diff(volume.positions_mm)[::-1])
    lesions = link(detections, volume)
    others = link([replace(d, index=last - d.index) for d in detections], turned)
    assert len(lesions) == len(others)
    for one, other in zip(lesions, others):
        assert one.score == other.score
        assert (one.first, one.last) == (last - other.last, last - other.first)
        assert one.volume_mm3 == pytest.approx(other.volume_mm3)
        assert one.diameters_mm.tolist() == other.diameters_mm.tolist()
        assert one.recist_index == last - other.recist_index
        for a, b in zip(one.slices, other.slices[::-1]):
            np.testing.assert_allclose(a.bbox, b.bbox)
            assert (a.score, a.patch.x, a.patch.y) == (b.score, b.patch.x, b.patch.y)
            np.testing.assert_array_equal(a.patch.mask, b.patch.mask)


def test_half_way_between_shapes_without_a_common_part_is_the_larger_one():
    one, two = Patch(4, 8, np.ones((1, 1), bool)), Patch(2, 7, np.ones((1, 2), bool))
    for first, last in ((one, two), (two, one)):
        (found,) = interpolate(first, last, [0.5], (1.0, 1.0), SIZE)
        (near,) = interpolate(first, last, [0.0], (1.0, 1.0), SIZE)
        assert found.mask.tolist() == two.mask.tolist()
        assert near.mask.tolist() == first.mask.tolist()
    down = [p.mask.tolist() for p in interpolate(one, two, [0.25, 0.5], (1.0, 1.0), SIZE)]
    up = [p.mask.tolist() for p in interpolate(two, one, [0.5, 0.75], (1.0, 1.0), SIZE)]
    assert down == up[::-1]


# Masks


@pytest.mark.parametrize("masks", [None, (Patch(0, 0, np.zeros((0, 0), bool)),)])
def test_without_a_mask_the_ellipse_in_the_box(masks):
    volume = scan([2.0] * 2)
    box = np.array([[10.0, 12, 34, 26]])
    (lesion,) = link([SliceDetections(1, box, np.array([0.9]), masks)], volume)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    painted = np.zeros(SIZE, bool)
    lesion.slices[0].patch.paint(painted)
    np.testing.assert_array_equal(painted, ((x - 22) / 12) ** 2 + ((y - 19) / 7) ** 2 <= 1)
    np.testing.assert_allclose(lesion.diameters_mm, [24 * 0.8, 14 * 0.8], atol=0.9)
    assert lesion.volume_mm3 == pytest.approx(np.pi * 12 * 7 * 0.64 * 2, rel=0.03)


@pytest.mark.parametrize(
    "box, pixels",
    [
        ([3.2, 4.4, 3.3, 4.4], {(3, 4)}),
        ([-3.0, -3, -0.4, -0.3], {(0, 0)}),
        ([7.4, 5.4, 9, 9], {(7, 5)}),
        ([2.0, 3, 4, 3], {(2, 3), (3, 3), (4, 3)}),
    ],
)
def test_an_ellipse_is_never_empty(box, pixels):
    patch = ellipse(np.array(box), (6, 8))
    rows, columns = np.nonzero(patch.mask)
    assert {(patch.x + x, patch.y + y) for x, y in zip(columns.tolist(), rows.tolist())} == pixels


def disc(cx, cy, radius, shape=(40, 40)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return Patch.of((x - cx) ** 2 + (y - cy) ** 2 <= radius**2)


def test_between_equal_masks_lies_the_same():
    shape = disc(20, 18, 7.5)
    for patch in interpolate(shape, shape, [0.25, 0.5, 0.8], (1, 1), (40, 40)):
        assert (patch.x, patch.y) == (shape.x, shape.y)
        np.testing.assert_array_equal(patch.mask, shape.mask)


def test_radius_and_centre_are_linear_between_discs():
    fractions = np.linspace(0.1, 0.9, 9)
    patches = interpolate(
        disc(15, 15, 5), disc(24, 20, 13), fractions.tolist(), (0.6, 0.6), (40, 40)
    )
    for fraction, patch in zip(fractions, patches):
        rows, columns = np.nonzero(patch.mask)
        radius = np.sqrt(len(rows) / np.pi)
        assert radius == pytest.approx(5 + 8 * fraction, abs=0.3)
        assert columns.mean() + patch.x == pytest.approx(15 + 9 * fraction, abs=0.25)
        assert rows.mean() + patch.y == pytest.approx(15 + 5 * fraction, abs=0.25)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 0.7), (2.0, 0.5)])
def test_signed_distances_and_centroids_by_brute_force(spacing):
    rng = np.random.default_rng(3)
    mask = rng.uniform(size=(9, 11)) < 0.4
    points = np.argwhere(np.ones_like(mask)) * spacing
    ins, outs = points[mask.ravel()], points[~mask.ravel()]
    expected = [
        (-1 if other is ins else 1)
        * (min(np.hypot(*(point - o)) for o in other) - min(spacing) / 2)
        for point, other in zip(points, [outs if m else ins for m in mask.ravel()])
    ]
    distances = signed_distance(mask, spacing)
    np.testing.assert_allclose(distances.ravel(), expected, atol=1e-5)
    rows, columns = np.nonzero(mask)
    expected = [columns.mean() + 5, rows.mean() + 7]
    np.testing.assert_allclose(centroid(Patch(5, 7, mask)), expected)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9])
def test_a_shrunk_mask_has_a_share_of_the_area_and_lies_inside(share):
    whole = disc(20, 18, 9)
    part = shrink(whole, share, (0.7, 0.7))
    count = max(1, round(share * whole.mask.sum()))
    assert part.mask.sum() == count
    rows, columns = np.nonzero(part.mask)
    radii = np.hypot(columns + part.x - 20, rows + part.y - 18)
    assert radii.max() <= np.sqrt(count / np.pi) + 1


def test_shapes_without_anything_in_common_are_not_lost():
    ring = np.zeros((40, 40), bool)
    disc(20, 20, 15).paint(ring)
    disc(20, 20, 13).paint(ring, False)
    ring = Patch.of(ring)
    core = disc(20, 20, 1)
    near, far = interpolate(core, ring, [0.3, 0.7], (1, 1), (40, 40))
    np.testing.assert_array_equal(near.mask, core.mask)
    np.testing.assert_array_equal(far.mask, ring.mask)


def test_what_lies_between_stays_within_the_slice():
    edge = Patch(0, 0, np.eye(12, dtype=bool)[:, ::-1])
    corner = Patch(38, 38, np.ones((2, 2), bool))
    for patch in interpolate(edge, corner, [0.1, 0.5, 0.9], (1, 1), (40, 40)):
        assert patch.mask.any()
        assert min(patch.x, patch.y) >= 0
        assert max(patch.x + patch.mask.shape[1], patch.y + patch.mask.shape[0]) <= 40


# What is refused

BOX = np.array([[10.0, 10, 20, 20]])


@pytest.mark.parametrize(
    "detections, message",
    [
        ([SliceDetections(4, BOX, np.ones(1))], r"slice 4: the volume has slices 0\.\.3"),
        ([SliceDetections(-1, BOX, np.ones(1))], "slice -1"),
        ([SliceDetections(1, BOX, np.ones(1))] * 2, "slice 1 are given twice"),
        ([SliceDetections(1, BOX, np.ones(2))], r"\(n,\) scores"),
        ([SliceDetections(1, BOX[:, :3], np.ones(1))], r"\(n, 4\) boxes"),
        ([SliceDetections(1, BOX, np.ones(1), ())], "n masks"),
        ([SliceDetections(1, BOX[:, ::-1], np.ones(1))], "x1 <= x2"),
        ([SliceDetections(1, BOX * np.nan, np.ones(1))], "finite"),
        ([SliceDetections(1, BOX + 100, np.ones(1))], "outside the 56 x 48 slice"),
        ([SliceDetections(1, BOX, np.array([1.5]))], "score"),
        ([SliceDetections(1, BOX, np.array([np.nan]))], "score"),
        (
            [SliceDetections(1, BOX, np.ones(1), (Patch(50, 3, np.ones((9, 9), bool)),))],
            "reaches out",
        ),
    ],
)
def test_what_does_not_fit_is_refused(detections, message):
    with pytest.raises(ValueError, match=message):
        link(detections, scan([1.0] * 3))


@pytest.mark.parametrize(
    "options",
    [
        dict(iou=-0.1),
        dict(overlap=2),
        dict(bridge_mm=np.nan),
        dict(min_score=np.nan),
        dict(lesion_score=-1),
    ],
)
def test_thresholds_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        link([], scan([1.0] * 3), **options)
