"""RECIST masks on drawn lesions whose true outline is known, and diameters of known shapes."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeplesion.data.dl_info import read_dl_info
from deeplesion.data.recist import (
    ellipse_from_recist,
    mask_from_recist,
    mask_outline,
    quadrilateral_from_recist,
    recist_from_contour,
    recist_from_mask,
    released_grey_levels,
    released_mask_from_recist,
)
from deeplesion.data.slices import SliceFolder

SHAPE = (160, 160)


def axes(centre, long, short, angle_deg=0.0):
    """RECIST end points (4, 2) of an ellipse with the given diameters."""
    a = np.deg2rad(angle_deg)
    along, across = np.array([np.cos(a), np.sin(a)]), np.array([-np.sin(a), np.cos(a)])
    c = np.asarray(centre, float)
    return np.stack(
        [c - along * long / 2, c + along * long / 2, c - across * short / 2, c + across * short / 2]
    )


def box_of(recist, pad=5.0):
    return np.concatenate([recist.min(axis=0) - pad, recist.max(axis=0) + pad])


def drawn_ellipse(centre, long, short, angle_deg=0.0, shape=SHAPE):
    """The oracle: pixel centres within the ellipse, from its equation in its own frame."""
    a = np.deg2rad(angle_deg)
    y, x = np.mgrid[: shape[0], : shape[1]]
    dx, dy = x - centre[0], y - centre[1]
    u = (dx * np.cos(a) + dy * np.sin(a)) / (long / 2)
    v = (-dx * np.sin(a) + dy * np.cos(a)) / (short / 2)
    return u**2 + v**2 <= 1


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def slice_with(lesion, lesion_hu=100, around_hu=40, noise_hu=15, seed=0):
    """Blurred lesion on even tissue with noise, int16 HU."""
    hu = np.where(lesion, float(lesion_hu), np.broadcast_to(around_hu, lesion.shape))
    hu = cv2.GaussianBlur(hu, (0, 0), 0.8)
    hu += np.random.default_rng(seed).normal(0, noise_hu, lesion.shape)
    return np.round(hu).astype(np.int16)


def irregular_lesion():
    """A crescent with its RECIST: the ellipse of its diameters takes in much that is not lesion."""
    lesion = drawn_ellipse((80, 80), 50, 40) & ~drawn_ellipse((80, 62), 40, 28)
    measured = recist_from_mask(lesion, 1.0)
    return lesion, measured.recist


# Masks


@pytest.mark.parametrize(
    ("lesion_hu", "around_hu"),
    [(100, 40), (20, 110), (-50, -850), (-500, -850), (400, 60), (900, 300), (20, -100)],
    ids=["enhancing", "cyst", "nodule", "ground glass", "calcified", "bone", "node in fat"],
)
@pytest.mark.parametrize("diameters", [(14, 9), (40, 28)], ids=["small", "large"])
def test_mask_sits_on_the_lesion_whatever_its_tissue(lesion_hu, around_hu, diameters):
    lesion = drawn_ellipse((80.3, 75.6), *diameters, 30)
    recist = axes((80.3, 75.6), *diameters, 30)
    mask = mask_from_recist(slice_with(lesion, lesion_hu, around_hu), box_of(recist), recist)
    assert mask.dtype == bool
    assert mask.shape == SHAPE
    assert iou(mask, lesion) > 0.8


def test_lung_is_not_wrapped_to_bright():
    # A nodule beside a dense chest wall that reaches into the box: the lung must not join it.
    lesion = drawn_ellipse((70, 80), 22, 18)
    around = np.where(np.arange(160) >= 85, 60.0, -850.0)[None, :].repeat(160, axis=0)
    recist = axes((70, 80), 22, 18)
    mask = mask_from_recist(slice_with(lesion, -50, around), box_of(recist), recist)
    assert iou(mask, lesion) > 0.85


def test_beats_the_ellipse_on_an_irregular_lesion():
    lesion, recist = irregular_lesion()
    mask = mask_from_recist(slice_with(lesion, 90, 20), box_of(recist), recist)
    assert iou(mask, lesion) > iou(ellipse_from_recist(recist, SHAPE), lesion) + 0.05


def random_lesion(rng):
    centre = rng.uniform(-3, 163, 2)
    long = rng.uniform(1, 60)
    recist = axes(centre, long, rng.uniform(0, long), rng.uniform(0, 180))
    return box_of(recist, rng.uniform(0, 6)), recist


@pytest.mark.parametrize("seed", range(20))
def test_mask_is_inside_the_box_and_never_empty(seed):
    rng = np.random.default_rng(seed)
    hu = rng.normal(0, 200, SHAPE).astype(np.int16)
    bbox, recist = random_lesion(rng)
    mask = mask_from_recist(hu, bbox, recist)
    y, x = np.nonzero(mask)
    assert len(x) > 0
    assert x.min() >= bbox[0]
    assert y.min() >= bbox[1]
    assert x.max() <= bbox[2]
    assert y.max() <= bbox[3]


def test_same_in_any_order_and_leaves_its_input_alone():
    rng = np.random.default_rng(5)
    hu = rng.normal(0, 100, SHAPE).astype(np.int16)
    before = hu.copy()
    lesions = [random_lesion(rng) for _ in range(6)]
    forward = [mask_from_recist(hu, *lesion) for lesion in lesions]
    cv2.setRNGSeed(1234)
    backward = [mask_from_recist(hu, *lesion) for lesion in reversed(lesions)]
    for a, b in zip(forward, reversed(backward), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(hu, before)


@pytest.mark.parametrize("shift", [(17, 0), (-13, 22), (1, -1)])
def test_moves_with_the_lesion(shift):
    lesion, recist = irregular_lesion()
    hu = slice_with(lesion)
    # Wrapping around moves everything; the lesion and its surroundings stay off the seam.
    moved_hu = np.roll(hu, shift[::-1], axis=(0, 1))
    mask = mask_from_recist(hu, box_of(recist), recist)
    moved = mask_from_recist(moved_hu, box_of(recist) + [*shift, *shift], recist + shift)
    np.testing.assert_array_equal(moved, np.roll(mask, shift[::-1], axis=(0, 1)))


def test_crop_gives_the_same_mask_as_the_whole_slice():
    lesion, recist = irregular_lesion()
    hu = slice_with(lesion)
    whole = mask_from_recist(hu, box_of(recist), recist)
    window = np.s_[30:140, 25:150]
    corner = np.array([25, 30])
    crop = mask_from_recist(hu[window], box_of(recist) - [*corner, *corner], recist - corner)
    np.testing.assert_array_equal(crop, whole[window])


def test_released_grey_levels_wrap_around():
    hu = np.array([[-1500, -1024, -434, -433, -421, -420, 0, 2050, 3000]], np.int16)
    # (HU + 1024) * 255 / 3074 - 50 by hand, towards zero; negative ones count from 256 down.
    expected = [[206, 206, 255, 0, 0, 0, 34, 205, 205]]
    assert released_grey_levels(hu).tolist() == expected
    every = np.arange(-1100, 2100, dtype=np.int16)[None]
    grey = (np.clip(every, -1024, 2050) + 1024.0) * 255 / 3074 - 50
    steps = [int(value) if value > -1 else 256 + int(value) for value in grey[0]]
    assert released_grey_levels(every)[0].tolist() == steps


def test_released_mask_is_grabcut_on_the_whole_slice():
    recist = axes((80, 75), 40, 30)
    lesion = drawn_ellipse((80, 75), 40, 30)
    hu = slice_with(lesion, lesion_hu=300, around_hu=-100)
    box = box_of(recist)
    labels = np.full(SHAPE, cv2.GC_BGD, np.uint8)
    x1, y1, x2, y2 = box.astype(int)
    labels[y1 : y2 + 1, x1 : x2 + 1] = cv2.GC_PR_FGD
    labels[quadrilateral_from_recist(recist, SHAPE)] = cv2.GC_FGD
    grey = np.floor((hu + 1024) * (255 / 3074) - 50).astype(np.uint8)  # nothing wraps here
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.dstack([grey] * 3), labels, None, *models, 3, cv2.GC_INIT_WITH_MASK)
    found = released_mask_from_recist(hu, box, recist)
    np.testing.assert_array_equal(found, labels % 2 == 1)
    assert iou(found, lesion) > 0.9
    cv2.setRNGSeed(5)  # the same in any order of calls
    np.testing.assert_array_equal(released_mask_from_recist(hu, box, recist), found)


def test_released_mask_takes_lung_for_bright():
    """A nodule in lung: the released 8 bits have lung brighter than the nodule, ours darker."""
    lesion = drawn_ellipse((80, 75), 40, 30)
    hu = slice_with(lesion, lesion_hu=-20, around_hu=-850)
    grey = released_grey_levels(hu).astype(int)
    assert grey[~lesion].mean() > grey[lesion].mean() + 100


@pytest.mark.parametrize(
    ("bbox", "recist"),
    [
        ([0, 0, 159, 159], axes((80, 80), 150, 150)),
        ([10, 10, 20, 20], axes((120, 120), 30, 20)),
        ([10.2, 10.2, 10.4, 10.4], axes((-50, -50), 3, 2)),
    ],
    ids=["whole image", "elsewhere", "outside"],
)
def test_released_mask_is_never_empty(bbox, recist):
    hu = np.random.default_rng(0).integers(-900, 200, SHAPE).astype(np.int16)
    assert released_mask_from_recist(hu, np.array(bbox), recist).any()


def test_one_piece_without_holes():
    lesion = drawn_ellipse((80, 80), 40, 30)
    hu = slice_with(lesion, 120, 20, noise_hu=5)
    hu[88:91, 91:94] = 20  # dark within the lesion, off its diameters
    hu[79:82, 103] = 120  # a bright speck beside it
    recist = axes((80, 80), 40, 30)
    mask = mask_from_recist(hu, box_of(recist), recist)
    assert mask[89, 92]
    assert not mask[80, 103]
    assert iou(mask, lesion) > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_does_not_leave_the_diameters_by_more_than_a_fifth(seed):
    # A small lesion in a band of its own HU that runs through the box.
    lesion = drawn_ellipse((80, 80), 16, 12)
    around = np.where(abs(np.arange(160) - 80) <= 4, 60.0, -100.0)[:, None].repeat(160, axis=1)
    recist = axes((80, 80), 16, 12)
    hu = slice_with(lesion, 60, around, noise_hu=25, seed=seed)
    mask = mask_from_recist(hu, box_of(recist), recist)
    assert not (mask & ~drawn_ellipse((80, 80), 1.2 * 16, 1.2 * 12)).any()
    assert iou(mask, lesion) > 0.6


def test_nearer_to_the_truth_than_the_ellipse_on_a_phantom(phantom):
    folder = SliceFolder(phantom / "Images_png")
    by_grabcut, by_ellipse = [], []
    for file_name, lesions in read_dl_info(phantom / "DL_info.csv").groupby("file_name"):
        hu = folder.read(file_name)
        truth = phantom / "phantom_truth" / "masks" / file_name.replace("/", "_")
        labels = cv2.imread(str(truth), cv2.IMREAD_UNCHANGED)
        for label, lesion in enumerate(lesions.itertuples(), start=1):
            if not lesion.noisy:
                mask = mask_from_recist(hu, lesion.bbox, lesion.recist)
                by_grabcut.append(iou(mask, labels == label))
                by_ellipse.append(
                    iou(ellipse_from_recist(lesion.recist, hu.shape), labels == label)
                )
    assert np.mean(by_grabcut) > np.mean(by_ellipse)
    assert np.mean(by_grabcut) > 0.855  # 0.859, the ellipses 0.789
    assert np.min(by_grabcut) > 0.3


@pytest.mark.parametrize(
    ("bbox", "recist"),
    [
        ([75, 75, 85, 85], [[80, 80]] * 4),
        ([70, 75, 90, 85], [[75, 80], [85, 80], [80, 80], [80, 80]]),
        ([80.2, 80.3, 80.4, 80.4], [[80.3, 80.3]] * 4),
        ([-5, -5, 9, 9], [[-4, -4], [6, 6], [2, -1], [-1, 2]]),
        ([0, 0, 159, 159], [[40, 80], [120, 80], [80, 50], [80, 110]]),
        ([100, 100, 110, 110], [[40, 40], [50, 50], [42, 48], [48, 42]]),
        ([-30, 70, 1, 90], [[-25, 80], [-5, 80], [-15, 75], [-15, 85]]),
        ([159, 159, 170, 170], [[164, 160], [164, 168], [160, 164], [168, 164]]),
    ],
    ids=[
        "a point",
        "no short axis",
        "box between pixel centres",
        "corner of the image",
        "box is the image",
        "measurement off the box",
        "measurement off the image",
        "one pixel in the image",
    ],
)
def test_degenerate_measurements_still_give_a_mask_in_the_box(bbox, recist):
    hu = np.random.default_rng(0).normal(0, 50, SHAPE).astype(np.int16)
    y, x = np.nonzero(mask_from_recist(hu, np.array(bbox, float), np.array(recist, float)))
    assert len(x) > 0
    assert x.min() >= round(bbox[0])
    assert y.min() >= round(bbox[1])
    assert x.max() <= np.ceil(bbox[2])
    assert y.max() <= np.ceil(bbox[3])


def test_even_image_gives_a_mask():
    recist = axes((80, 80), 20, 10)
    mask = mask_from_recist(np.full(SHAPE, 40, np.int16), box_of(recist), recist)
    assert mask[80, 80]


@pytest.mark.parametrize(
    ("hu", "bbox", "recist", "message"),
    [
        (np.zeros((3, 9, 9)), [1, 1, 5, 5], np.ones((4, 2)), "hu must be"),
        (np.zeros((9, 9)), [1, 1, 5], np.ones((4, 2)), "bbox must be"),
        (np.zeros((9, 9)), [5, 1, 1, 5], np.ones((4, 2)), "bbox must be"),
        (np.zeros((9, 9)), [1, 1, 5, np.nan], np.ones((4, 2)), "bbox must be"),
        (np.zeros((9, 9)), [20, 1, 25, 5], np.ones((4, 2)), "outside its 9 x 9 image"),
        (np.zeros((9, 9)), [1, 1, 5, 5], np.ones(8), "recist must be"),
        (np.zeros((9, 9)), [1, 1, 5, 5], np.full((4, 2), np.nan), "recist must be"),
    ],
)
def test_bad_input_is_refused(hu, bbox, recist, message):
    with pytest.raises(ValueError, match=message):
        mask_from_recist(hu, np.array(bbox), recist)


# Shapes from the measurement


@pytest.mark.parametrize("angle", range(0, 180, 25))
@pytest.mark.parametrize(("long", "short"), [(30, 30), (41.5, 12.2), (9, 5)])
def test_ellipse_is_the_drawn_one(long, short, angle):
    centre = (80.4, 79.7)
    drawn = drawn_ellipse(centre, long, short, angle)
    ellipse = ellipse_from_recist(axes(centre, long, short, angle), SHAPE)
    # Rounding may turn a pixel whose centre is on the very outline.
    assert (ellipse ^ drawn).sum() <= 2


def test_ellipse_of_axes_askew_has_them_as_conjugate_diameters():
    # The unit disc under any linear map: its area scales by the determinant.
    recist = np.array([[40, 80], [120, 80], [60, 60], [100, 100]], float)
    ellipse = ellipse_from_recist(recist, SHAPE)
    assert ellipse.sum() == pytest.approx(np.pi * 40 * 20, rel=0.01)
    assert ellipse[80, 41]
    assert ellipse[80, 119]
    assert not ellipse[80, 38]
    assert ellipse[61, 61]
    assert ellipse[99, 99]


@pytest.mark.parametrize("angle", range(0, 180, 25))
def test_quadrilateral_has_half_the_product_of_its_diagonals(angle):
    recist = axes((80, 80), 60, 40, angle)
    quadrilateral = quadrilateral_from_recist(recist, SHAPE)
    assert quadrilateral.sum() == pytest.approx(60 * 40 / 2, rel=0.03)
    assert not (quadrilateral & ~drawn_ellipse((80, 80), 62, 42, angle)).any()


def test_quadrilateral_does_not_mind_the_order_of_end_points():
    recist = axes((80, 80), 60, 40, 20)
    swapped = recist[[1, 0, 3, 2]]
    np.testing.assert_array_equal(
        quadrilateral_from_recist(recist, SHAPE), quadrilateral_from_recist(swapped, SHAPE)
    )


def test_shapes_without_width_are_lines_and_points():
    line = axes((80, 80), 20, 0)
    assert 19 <= quadrilateral_from_recist(line, SHAPE).sum() <= 22
    assert 19 <= ellipse_from_recist(line, SHAPE).sum() <= 22
    point = axes((80, 80), 0, 0)
    assert quadrilateral_from_recist(point, SHAPE).sum() == 1
    assert ellipse_from_recist(point, SHAPE)[80, 80]


# Diameters of a contour


def convex_polygon(rng, corners):
    """Corners on a turned ellipse, so that no one is inside the others' hull."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    a, b, turn = rng.uniform(5, 40), rng.uniform(1, 40), rng.uniform(0, np.pi)
    points = np.stack([a * np.cos(angles), b * np.sin(angles)], axis=1)
    return points @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]] + 100


def star_polygon(rng, corners):
    """Corners at every angle in turn, as far out as they like."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = rng.uniform(2, 40, corners)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1) + 100


def brute_force_recist(contour):
    """The definition in plain loops, with lines so near one another that none is missed by much."""
    pairs = [(np.hypot(*(q - p)), tuple(p), tuple(q)) for p in contour for q in contour]
    length, start, end = max(pairs)
    start, direction = np.array(start), (np.array(end) - start) / length
    normal = np.array([-direction[1], direction[0]])
    widest = 0.0
    for place in np.linspace(0, length, 4001):
        crossings = []
        for p, q in zip(contour, np.roll(contour, -1, axis=0)):
            t, u = (p - start) @ direction, (q - start) @ direction
            if (t - place) * (u - place) <= 0 and t != u:
                fraction = (place - t) / (u - t)
                crossings.append((p + fraction * (q - p) - start) @ normal)
        if crossings:
            widest = max(widest, max(crossings) - min(crossings))
    return length, widest


def lengths(recist):
    return np.linalg.norm(recist[1::2] - recist[::2], axis=1)


@pytest.mark.parametrize("draw", [convex_polygon, star_polygon])
@pytest.mark.parametrize("seed", range(6))
def test_contour_measures_as_by_brute_force(draw, seed):
    rng = np.random.default_rng(seed)
    contour = draw(rng, int(rng.integers(3, 14)))
    long, short = brute_force_recist(contour)
    measured = lengths(recist_from_contour(contour))
    assert measured[0] == pytest.approx(long, rel=1e-6)
    # The loop looks at lines a four-thousandth of the long axis apart: on a steep edge it may stop
    # just short of the corner, never beyond it.
    assert short - 1e-6 <= measured[1] <= short + 0.05


@given(st.lists(st.tuples(st.integers(-12, 12), st.integers(-12, 12)), min_size=1, max_size=30))
def test_the_long_axis_joins_the_farthest_pair(points):
    """Small whole numbers: many parallel edges, corners in line, points twice, all in one place."""
    points = np.array(points, float) / 2
    recist = recist_from_contour(points)
    farthest = np.linalg.norm(points[:, None] - points, axis=2).max()
    assert lengths(recist)[0] == pytest.approx(farthest, abs=1e-9)
    if farthest > 0:
        for end in recist[:2]:
            assert (points == end).all(axis=1).any()
        assert lengths(recist)[1] <= farthest + 1e-9


def test_the_long_axis_among_parallel_edges_that_rounding_turns():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        points = rng.integers(-5, 6, (rng.integers(2, 10), 2)) * (1, rng.integers(2))
        angle = rng.uniform(0, np.pi)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        points = np.concatenate([points, -points]) @ turn + rng.uniform(0, 100, 2)
        farthest = np.linalg.norm(points[:, None] - points, axis=2).max()
        assert lengths(recist_from_contour(points))[0] == pytest.approx(farthest, abs=1e-5)


@pytest.mark.parametrize("angle", range(0, 180, 15))
def test_polygons_of_known_diameters(angle):
    turn = np.deg2rad(angle)
    turn = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    diagonal = np.hypot(40, 20)
    kite = [[0, 0], [12, 9], [40, 0], [12, -7]]
    rectangle = [[0, 0], [40, 0], [40, 20], [0, 20]]
    # A wedge cut out from above to below the middle: the chord through it spans the gap.
    notched = [[0, 0], [20, 10], [30, -2], [40, 10], [60, 0], [30, -12]]
    for polygon, long, short in (
        (kite, 40, 16),
        (rectangle, diagonal, 20 * diagonal / 40),
        (notched, 60, 10 + 8),
    ):
        for corners in (polygon, polygon[::-1]):
            measured = lengths(recist_from_contour(np.array(corners) @ turn + (7, -3)))
            np.testing.assert_allclose(measured, [long, short], rtol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_measures_the_same_turned_mirrored_moved_and_grown(seed):
    rng = np.random.default_rng(seed)
    contour = star_polygon(rng, 12)
    expected = lengths(recist_from_contour(contour))
    turn = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    for changed, factor in (
        (contour @ turn, 1),
        (contour * (-1, 1), 1),
        (contour + (31.7, -12.2), 1),
        (contour * 2.5, 2.5),
        (np.roll(contour, 5, axis=0), 1),
        (contour[::-1], 1),
    ):
        measured = lengths(recist_from_contour(changed))
        np.testing.assert_allclose(measured, factor * expected, rtol=1e-5)


# Diameters of a mask


@pytest.mark.parametrize("angle", range(0, 180, 7))
@pytest.mark.parametrize(("long", "short"), [(80, 80), (90, 50), (61, 12), (20, 14), (9, 6)])
def test_ellipse_measures_its_diameters_at_any_angle(long, short, angle):
    measured = recist_from_mask(drawn_ellipse((80.2, 79.9), long, short, angle), 0.8)
    np.testing.assert_allclose(measured.lengths_px, (long, short), atol=1)
    np.testing.assert_allclose(measured.lengths_mm, measured.lengths_px * 0.8)


def test_ellipses_measure_their_diameters_on_average():
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(200):
        long = rng.uniform(8, 40)
        short = rng.uniform(0.4, 0.9) * long
        drawn = drawn_ellipse(rng.uniform(39, 41, 2), long, short, rng.uniform(0, 180), (80, 80))
        errors.append(recist_from_mask(drawn, 1.0).lengths_px - (long, short))
    # The longest of many diameters of a jagged outline is a little long.
    assert (np.mean(errors, axis=0) < 0.6).all()
    assert (np.mean(errors, axis=0) > 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_mask_measures_as_the_outline_of_its_pixels_by_brute_force(seed):
    """Half-way between in and out: the hull of points half a pixel off in the four directions."""
    rng = np.random.default_rng(seed)
    mask = drawn_ellipse((8, 8), *rng.uniform(3, 14, 2), rng.uniform(0, 180), (17, 17))
    mask &= rng.uniform(size=mask.shape) < 0.9
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    mask = labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])
    half = np.array([(0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)])
    points = (np.argwhere(mask)[:, None, ::-1] + half).reshape(-1, 2)
    farthest = max(np.hypot(*(p - q)) for p in points for q in points)
    assert recist_from_mask(mask, 1.0).lengths_px[0] == pytest.approx(farthest)


@pytest.mark.parametrize("seed", range(20))
def test_axes_are_at_right_angles_and_as_long_as_told(seed):
    rng = np.random.default_rng(seed)
    lesion = np.zeros((90, 90), bool)
    for _ in range(4):
        lesion |= drawn_ellipse(
            rng.uniform(30, 60, 2), *rng.uniform(5, 40, 2), rng.uniform(0, 180), (90, 90)
        )
    measured = recist_from_mask(lesion, 0.7)
    long, short = measured.recist[1] - measured.recist[0], measured.recist[3] - measured.recist[2]
    np.testing.assert_allclose(np.hypot(*long), measured.lengths_px[0])
    np.testing.assert_allclose(np.hypot(*short), measured.lengths_px[1])
    assert abs(long @ short) < 1e-9 * np.hypot(*long) * np.hypot(*short)
    assert measured.lengths_px[1] <= measured.lengths_px[0] + 1e-9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spacing", [(1.5, 0.5), (0.4, 1.1), (0.7, 0.75)])
def test_non_square_pixels_are_measured_in_mm_by_brute_force(seed, spacing):
    rng = np.random.default_rng(seed)
    mask = drawn_ellipse((8, 8), *rng.uniform(5, 14, 2), rng.uniform(0, 180), (17, 17))
    in_mm = np.array([spacing[1], spacing[0]])
    outline = mask_outline(mask) * in_mm
    farthest = max(np.hypot(*(p - q)) for p in outline for q in outline)
    measured = recist_from_mask(mask, spacing)
    assert measured.lengths_mm[0] == pytest.approx(farthest)
    long, short = (measured.recist[1::2] - measured.recist[::2]) * in_mm
    np.testing.assert_allclose([np.hypot(*long), np.hypot(*short)], measured.lengths_mm)
    assert abs(long @ short) < 1e-9 * np.hypot(*long) * np.hypot(*short)
    pixels = np.linalg.norm(measured.recist[1::2] - measured.recist[::2], axis=1)
    np.testing.assert_allclose(pixels, measured.lengths_px)

    # The longest perpendicular: of lines across at every place along, the outermost crossings.
    along = long / np.hypot(*long)
    places = (outline - outline[0]) @ along
    heights = (outline - outline[0]) @ (-along[1], along[0])
    widest = 0
    for place in np.linspace(places.min(), places.max(), 801)[1:-1]:
        crossings = [
            a_h + (place - a) / (b - a) * (b_h - a_h)
            for a, a_h, b, b_h in zip(places, heights, np.roll(places, -1), np.roll(heights, -1))
            if min(a, b) <= place <= max(a, b) and a != b
        ]
        widest = max(widest, max(crossings) - min(crossings))
    assert widest - 1e-9 <= measured.lengths_mm[1] <= widest + 0.1


def test_the_long_axis_in_mm_is_not_that_in_pixels():
    mask = np.zeros((20, 20), bool)
    mask[5:9, 3:15] = True
    measured = recist_from_mask(mask, (5.0, 0.5))
    # Corners are cut by half a pixel: from (3, 4.5) to (14, 8.5).
    np.testing.assert_allclose(measured.lengths_mm[0], np.hypot(11 * 0.5, 4 * 5.0))
    upright = recist_from_mask(mask[:, 6:8], (5.0, 0.5))
    np.testing.assert_allclose(upright.lengths_mm, [np.hypot(20, 0.5), 1], atol=0.1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spacing", [1.0, 0.7, 0.8203125])
def test_two_equal_spacings_are_one_to_the_bit(seed, spacing):
    rng = np.random.default_rng(seed)
    mask = drawn_ellipse((30, 28), *rng.uniform(5, 40, 2), rng.uniform(0, 180), (60, 60))
    one, two = recist_from_mask(mask, spacing), recist_from_mask(mask, (spacing, spacing))
    for name in ("recist", "lengths_px", "lengths_mm"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_line_and_pixel():
    mask = np.zeros((30, 30), bool)
    mask[12, 4:15] = True
    np.testing.assert_allclose(recist_from_mask(mask, 2.0).lengths_mm, [22, 2])
    mask[:] = False
    mask[7, 9] = True
    measured = recist_from_mask(mask, 2.0)
    np.testing.assert_allclose(measured.lengths_mm, [2, 2])
    np.testing.assert_allclose(measured.recist.mean(axis=0), [9, 7])


def test_diagonal_line():
    measured = recist_from_mask(np.eye(12, dtype=bool), 1.0)
    # From outline to outline of the end pixels, which reach half a pixel along the axes.
    assert measured.lengths_px[0] == pytest.approx(np.hypot(12, 11))
    assert measured.lengths_px[1] < 1


def test_largest_piece_is_measured_and_holes_do_not_matter():
    mask = np.zeros(SHAPE, bool)
    mask[60:90, 40:100] = True
    expected = recist_from_mask(mask, 1.0)
    mask[70:75, 50:55] = False
    # Beside it a smaller piece with more corners, and one that is longer.
    mask |= drawn_ellipse((20, 140), 18, 14)
    mask[3, 50:155] = True
    np.testing.assert_array_equal(recist_from_mask(mask, 1.0).recist, expected.recist)


@pytest.mark.parametrize("corner", [(0, 0), (0, 150), (153, 0), (153, 150)])
def test_mask_at_the_image_border_measures_as_in_the_middle(corner):
    blob = drawn_ellipse((3.2, 4.9), 9, 7, 20, (7, 10))
    measured = []
    for y, x in (corner, (60, 70)):
        mask = np.zeros(SHAPE, np.uint8)
        mask[y : y + 7, x : x + 10] = blob
        measured.append(recist_from_mask(mask, 1.0).recist - (x, y))
    np.testing.assert_allclose(*measured)


def test_phantom_masks_measure_their_true_diameters(phantom):
    """The phantom knows the diameters of the shapes from which it draws its masks."""
    truth = json.loads((phantom / "phantom_truth/truth.json").read_text())
    spacing = read_dl_info(phantom / "DL_info.csv").groupby("file_name").spacing_mm.first()
    errors = []
    for file_name, findings in truth.items():
        name = phantom / "phantom_truth/masks" / file_name.replace("/", "_")
        labels = cv2.imread(str(name), cv2.IMREAD_UNCHANGED)
        for label, lesion in enumerate(findings["lesions"], start=1):
            measured = recist_from_mask(labels == label, spacing[file_name]).lengths_mm
            errors.append((measured - lesion["diameters_mm"]) / spacing[file_name])
    assert (abs(np.mean(errors, axis=0)) < 0.6).all()  # pixels
    assert (np.mean(np.abs(errors), axis=0) < 1).all()


@pytest.mark.parametrize("angle", range(0, 180, 25))
def test_round_trip_mask_to_measurement_to_ellipse(angle):
    mask = drawn_ellipse((80.2, 79.9), 60, 36, angle)
    measured = recist_from_mask(mask, 1.0)
    assert iou(ellipse_from_recist(measured.recist, SHAPE), mask) > 0.9


@pytest.mark.parametrize(
    ("mask", "spacing", "message"),
    [
        (np.zeros((5, 5), bool), 1.0, "at least one pixel"),
        (np.ones((2, 5, 5), bool), 1.0, "mask must be"),
        (np.ones((5, 5), bool), 0.0, "spacing_mm"),
        (np.ones((5, 5), bool), np.nan, "spacing_mm"),
        (np.ones((5, 5), bool), (1.0, 0.0), "spacing_mm"),
        (np.ones((5, 5), bool), (1.0, 1.0, 1.0), "spacing_mm"),
    ],
)
def test_bad_mask_or_spacing_is_refused(mask, spacing, message):
    with pytest.raises(ValueError, match=message):
        recist_from_mask(mask, spacing)
