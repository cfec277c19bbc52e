"""RECIST masks on drawn lesions whose true outline is known, and diameters of known shapes."""

import cv2
import numpy as np
import pytest

from deeplesion.annotations import read_dl_info
from deeplesion.recist import (
    ellipse_from_recist,
    mask_from_recist,
    quadrilateral_from_recist,
    recist_from_mask,
)
from deeplesion.slices import SliceFolder

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


# Diameters of a mask


def brute_force_long_axis(mask):
    points = np.argwhere(mask)
    return max(np.hypot(*(p - q)) for p in points for q in points)


@pytest.mark.parametrize("seed", range(8))
def test_long_axis_is_the_farthest_pair_of_pixels(seed):
    mask = np.random.default_rng(seed).uniform(size=(12, 15)) < 0.15
    measured = recist_from_mask(mask, 1.0)
    assert measured.lengths_px[0] == pytest.approx(brute_force_long_axis(mask))
    ends = np.round(measured.recist[:2]).astype(int)
    assert mask[ends[:, 1], ends[:, 0]].all()


@pytest.mark.parametrize("angle", range(0, 180, 7))
@pytest.mark.parametrize(("long", "short"), [(80, 80), (90, 50), (61, 12), (20, 14)])
def test_ellipse_measures_its_diameters_at_any_angle(long, short, angle):
    measured = recist_from_mask(drawn_ellipse((80.2, 79.9), long, short, angle), 0.8)
    # Pixel centres lie up to a pixel inside the outline at either end; a chord at right angles to
    # a slightly turned long axis is a little longer than the short diameter.
    assert long - 2 <= measured.lengths_px[0] <= long
    assert short - 2 <= measured.lengths_px[1] <= short + 1
    np.testing.assert_allclose(measured.lengths_mm, measured.lengths_px * 0.8)


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
    assert abs(long @ short) < 1e-9 * max(np.hypot(*long), 1) * max(np.hypot(*short), 1) + 1e-9
    assert measured.lengths_px[1] <= measured.lengths_px[0] + 1e-9


def test_rectangle_in_closed_form():
    # Long axis: the diagonal. Chords at right angles to it are longest through the other corners,
    # where they run from side to side: width * diagonal / length.
    mask = np.zeros((60, 60), bool)
    mask[10:31, 5:46] = True  # pixel centres span 40 x 20
    measured = recist_from_mask(mask, 0.5)
    diagonal = np.hypot(40, 20)
    assert measured.lengths_px[0] == pytest.approx(diagonal)
    assert measured.lengths_px[1] == pytest.approx(20 * diagonal / 40)
    assert measured.lengths_mm[0] == pytest.approx(diagonal / 2)


def test_line_and_pixel():
    mask = np.zeros((30, 30), bool)
    mask[12, 4:15] = True
    measured = recist_from_mask(mask, 2.0)
    np.testing.assert_allclose(measured.lengths_mm, [20, 0])
    mask[:] = False
    mask[7, 9] = True
    measured = recist_from_mask(mask, 2.0)
    np.testing.assert_array_equal(measured.recist, [[9, 7]] * 4)
    np.testing.assert_array_equal(measured.lengths_mm, [0, 0])


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
    ],
)
def test_bad_mask_or_spacing_is_refused(mask, spacing, message):
    with pytest.raises(ValueError, match=message):
        recist_from_mask(mask, spacing)
