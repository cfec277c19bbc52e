"""The pipeline: boxes, masks and RECIST must go where the pixels go."""

import math
import pickle
from multiprocessing.reduction import ForkingPickler

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from mmdet_ext.datasets.sampler import SampleKey
from mmdet_ext.datasets.transforms import (
    LoadCTSlices,
    PackCTInputs,
    RandomAffineResize,
    move,
    warp,
)

SIZE = 96


def ellipse_sample(seed=0, size=SIZE, slices=3):
    """One lesion: a bright ellipse with its exact mask, box (pixel edges) and RECIST."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(0.42, 0.58, 2) * size
    long, short = rng.uniform(14, 18), rng.uniform(8, 12)
    angle = rng.uniform(0, math.pi)
    axis = np.array([math.cos(angle), math.sin(angle)])
    other = np.array([-axis[1], axis[0]])
    y, x = np.mgrid[:size, :size] + 0.5
    offsets = np.stack([x, y], -1) - centre
    mask = (offsets @ axis / long) ** 2 + (offsets @ other / short) ** 2 <= 1
    ends = np.array([centre + long * axis, centre - long * axis])
    ends = np.concatenate([ends, [centre + short * other, centre - short * other]])
    extent = np.sqrt((long * axis) ** 2 + (short * other) ** 2)
    box = np.concatenate([centre - extent, centre + extent])
    image = np.where(mask, 100, -900).astype(np.int16)
    return dict(
        img=np.repeat(image[:, :, None], slices, axis=2),
        height=size,
        width=size,
        gt_bboxes=HorizontalBoxes(torch.tensor(box[None], dtype=torch.float32)),
        gt_bboxes_labels=np.zeros(1, np.int64),
        gt_ignore_flags=np.zeros(1, bool),
        gt_masks=BitmapMasks(mask[None].astype(np.uint8), size, size),
        gt_recist=ends[None],
    )


def turn(degrees, x, y):
    """Matrix that turns around the origin, then shifts."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin, x], [sin, cos, y]])


def mask_box(mask):
    """Rectangle around a mask, in pixel edges."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("size", [SIZE, 2 * SIZE, (64, 128)])
def test_box_mask_recist_and_pixels_stay_together(seed, size):
    """The box of the moved mask, of the moved bright pixels and the moved RECIST agree."""
    transform = RandomAffineResize(size, prob=0.9, box_from="corners")
    sample = ellipse_sample(seed)
    sample["augmentation_key"] = SampleKey(0, 0, seed)
    result = transform(sample)
    mask = result["gt_masks"].masks[0]
    height, width = transform.size
    tolerance = 1.0 + max(width, height) / SIZE / 2
    bright = result["img"][:, :, 0] > -400
    np.testing.assert_allclose(mask_box(mask), mask_box(bright), atol=tolerance)
    overlap = (mask & bright).sum() / (mask | bright).sum()
    assert overlap > 0.85
    ends = result["gt_recist"][0]
    box = mask_box(mask)
    assert (ends >= box[:2] - tolerance).all() and (ends <= box[2:] + tolerance).all()
    outer = result["gt_bboxes"].tensor[0].numpy()
    assert (outer[:2] <= box[:2] + tolerance).all() and (outer[2:] >= box[2:] - tolerance).all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_resize_and_flip_are_exact(flip, scale):
    """Without rotation an upsized mask is the mask with every pixel repeated, mirrored or not."""
    sample = ellipse_sample(1)
    mask, box = sample["gt_masks"].masks[0].copy(), sample["gt_bboxes"].tensor[0].numpy().copy()
    result = RandomAffineResize(SIZE * scale, prob=0, flip_prob=flip, box_from="corners")(sample)
    expected = mask.repeat(scale, 0).repeat(scale, 1)
    expected_box = box * scale
    if flip:
        expected = expected[:, ::-1]
        expected_box[[0, 2]] = SIZE * scale - expected_box[[2, 0]]
    np.testing.assert_array_equal(result["gt_masks"].masks[0], expected)
    np.testing.assert_allclose(result["gt_bboxes"].tensor[0].numpy(), expected_box, rtol=1e-5)
    assert result["scale_factor"] == (scale, scale)


def test_the_margin_around_recist_is_scaled_along_each_axis():
    """5 px of the file, on the axes, three times as wide and half as high. Failed before: one
    number for both."""
    sample = ellipse_sample(4)
    points = sample["gt_recist"][0].copy()
    result = RandomAffineResize((SIZE // 2, 3 * SIZE), prob=0, flip_prob=0)(sample)
    expected = [*(points.min(0) - 5) * (3, 0.5), *(points.max(0) + 5) * (3, 0.5)]
    np.testing.assert_allclose(result["gt_bboxes"].tensor[0].numpy(), expected, rtol=1e-5)


def test_halving_averages_two_by_two_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 1000, (64, 64, 7)).astype(np.int16)
    small = warp(image, np.array([[0.5, 0, 0], [0, 0.5, 0]]), (32, 32), cv2.INTER_LINEAR)
    expected = image.reshape(32, 2, 32, 2, 7).astype(float).mean((1, 3))
    np.testing.assert_allclose(small, expected, atol=0.51)


def test_all_slices_are_warped_alike():
    rng = np.random.default_rng(0)
    stack = rng.integers(-1000, 1000, (64, 64, 7)).astype(np.int16)
    angle = math.radians(10)
    matrix = np.array(
        [[math.cos(angle), -math.sin(angle), 3], [math.sin(angle), math.cos(angle), -2]]
    )
    warped = warp(stack, matrix, (64, 64), cv2.INTER_LINEAR)
    assert warped.dtype == np.int16
    for d in range(7):
        one = warp(np.ascontiguousarray(stack[:, :, d]), matrix, (64, 64), cv2.INTER_LINEAR)
        np.testing.assert_array_equal(warped[:, :, d], one)


def test_bilinear_samples_at_the_inverse_point():
    """Against a plain sampling loop of a smooth image."""
    y, x = np.mgrid[:48, :48] + 0.5
    image = (10 * x + 3 * y).astype(np.int16)  # linear: bilinear sampling is exact up to rounding
    angle = math.radians(12)
    matrix = np.array(
        [[math.cos(angle), -math.sin(angle), 8], [math.sin(angle), math.cos(angle), -3]]
    )
    warped = warp(image, matrix, (48, 48), cv2.INTER_LINEAR)
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    points = move(np.stack([x, y], -1), inverse)
    inside = ((points > 1) & (points < 47)).all(-1)
    expected = 10 * points[..., 0] + 3 * points[..., 1]
    # cv2 interpolates on a grid of 1/32 pixel: up to 13/64 HU, and two roundings.
    assert np.abs(warped - expected)[inside].max() < 1.5
    assert inside.sum() > 1000


def test_recist_boxes_keep_their_margin_under_rotation():
    sample = ellipse_sample(2)
    sample["augmentation_key"] = SampleKey(1, 0, 0)
    transform = RandomAffineResize(SIZE, prob=1.0, flip_prob=0.0)
    result = transform(sample)
    ends = result["gt_recist"][0]
    scale = math.sqrt(np.linalg.det(result["affine"][:, :2]))
    expected = np.concatenate([ends.min(0) - 5 * scale, ends.max(0) + 5 * scale])
    np.testing.assert_allclose(result["gt_bboxes"].tensor[0].numpy(), expected, rtol=1e-5)


def test_corner_boxes_grow_as_much_as_the_square_turned_by_15_degrees():
    """A square's box, turned by 15 degrees: IoU 1 / (cos + sin)^2 = 0.67 with the tight one."""
    sample = ellipse_sample(0)
    sample["gt_bboxes"] = HorizontalBoxes(torch.tensor([[38.0, 38.0, 58.0, 58.0]]))
    transform = RandomAffineResize(SIZE, box_from="corners")
    cos, sin = math.cos(math.radians(15)), math.sin(math.radians(15))
    around_centre = turn(15, 48 - 48 * cos + 48 * sin, 48 - 48 * sin - 48 * cos)
    transform._move_annotations(sample, around_centre)
    x1, y1, x2, y2 = sample["gt_bboxes"].tensor[0].tolist()
    assert 400 / ((x2 - x1) * (y2 - y1)) == pytest.approx(1 / (cos + sin) ** 2, rel=1e-4)
    assert 1 / (cos + sin) ** 2 == pytest.approx(0.67, abs=0.01)


def test_ranges_of_the_drawn_parameters():
    transform = RandomAffineResize(SIZE, prob=1.0, flip_prob=0.5)
    angles, zooms, shifts, flips = [], [], [], []
    for seed in range(2000):
        m = transform.draw(np.random.default_rng(seed), (SIZE, SIZE))
        flips.append(np.linalg.det(m[:, :2]) < 0)
        if flips[-1]:
            m = m * [[-1], [1]] + [[0, 0, SIZE], [0, 0, 0]]
        zooms.append(math.hypot(m[0, 0], m[1, 0]))
        angles.append(math.degrees(math.atan2(m[1, 0], m[0, 0])))
        shifts.append((move(np.array([SIZE / 2, SIZE / 2]), m) - SIZE / 2) / SIZE)
    for values, limit in ((angles, 15), (np.array(zooms) - 1, 0.2), (shifts, 0.04)):
        assert np.abs(values).max() <= limit + 1e-9
        assert np.min(values) < -0.98 * limit and np.max(values) > 0.98 * limit
    assert 0.45 < np.mean(flips) < 0.55


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    transform = RandomAffineResize(SIZE)

    def matrix(key):
        return transform(ellipse_sample() | {"augmentation_key": key})["affine"]

    key = SampleKey(seed=0, epoch=1, index=2)
    first = matrix(key)
    np.testing.assert_array_equal(first, matrix(key))
    for other in (key._replace(seed=1), key._replace(epoch=2), key._replace(index=3)):
        assert not np.array_equal(first, matrix(other))


def test_lesion_that_leaves_the_image_is_dropped_and_the_image_stays():
    sample = ellipse_sample(0)
    transform = RandomAffineResize(SIZE)
    transform._move_annotations(sample, np.array([[1.0, 0, SIZE], [0, 1, 0]]))
    assert len(sample["gt_bboxes"]) == len(sample["gt_masks"]) == len(sample["gt_recist"]) == 0
    assert len(sample["gt_bboxes_labels"]) == len(sample["gt_ignore_flags"]) == 0
    packed = PackCTInputs()(sample | dict(thickness_mm=2.0))
    assert packed["inputs"].shape == (1, 3, SIZE, SIZE)
    assert packed["data_samples"].gt_instances.bboxes.shape[0] == 0


@pytest.mark.parametrize(
    "shift, boxes, kept",
    [  # of a 64 x 80 image; the first one's centre stays inside, the second one's just leaves it
        ((15, 0), [[50, 20, 70, 40], [56, 20, 76, 40]], [65, 20, 80, 40]),
        ((-15, 0), [[10, 20, 30, 40], [4, 20, 24, 40]], [0, 20, 15, 40]),
        ((0, 15), [[30, 30, 50, 60], [30, 35, 50, 65]], [30, 45, 50, 64]),
        ((0, -15), [[30, 5, 50, 35], [30, 0, 50, 28]], [30, 0, 50, 20]),
    ],
    ids=["right", "left", "bottom", "top"],
)
@pytest.mark.parametrize("box_from", ["recist", "corners"])
def test_a_lesion_is_kept_as_long_as_its_centre_is_inside(shift, boxes, kept, box_from):
    masks = np.zeros((2, 64, 80), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = 1
    ends = [  # five pixels inside the box
        [[x1 + 5, y1 + 5], [x2 - 5, y2 - 5], [x1 + 5, y2 - 5], [x2 - 5, y1 + 5]]
        for x1, y1, x2, y2 in boxes
    ]
    sample = dict(
        img=np.zeros((64, 80, 3), np.int16),
        gt_bboxes=HorizontalBoxes(torch.tensor(boxes, dtype=torch.float32)),
        gt_bboxes_labels=np.array([0, 1]),
        gt_masks=BitmapMasks(masks, 64, 80),
        gt_recist=np.array(ends, float),
    )
    transform = RandomAffineResize((64, 80), box_from=box_from)
    transform._move_annotations(sample, np.array([[1.0, 0, shift[0]], [0, 1, shift[1]]]))
    assert sample["gt_bboxes"].tensor.tolist() == [kept]
    assert sample["gt_bboxes_labels"].tolist() == [0]
    (mask,) = sample["gt_masks"].masks
    assert mask_box(mask).tolist() == kept
    assert len(sample["gt_recist"]) == 1


def test_packing_keeps_hounsfield_units_and_order():
    sample = ellipse_sample(slices=3)
    sample["img"][:, :, 2] = 7
    packed = PackCTInputs()(sample | dict(thickness_mm=5.0, file_name="a/001.png"))
    inputs = packed["inputs"]
    assert inputs.dtype == torch.int16 and inputs.shape == (1, 3, SIZE, SIZE)
    assert (inputs[0, 2] == 7).all()
    np.testing.assert_array_equal(inputs[0, 0].numpy(), sample["img"][:, :, 0])
    assert packed["data_samples"].thickness_mm == 5.0
    assert packed["data_samples"].file_name == "a/001.png"


def test_what_was_not_resized_has_the_scale_that_the_heads_divide_by():
    packed = PackCTInputs()(ellipse_sample() | dict(thickness_mm=5.0))
    assert packed["data_samples"].scale_factor == (1.0, 1.0)
    packed = PackCTInputs()(ellipse_sample() | dict(thickness_mm=5.0, scale_factor=(2.0, 3.0)))
    assert packed["data_samples"].scale_factor == (2.0, 3.0)


def test_size_other_than_the_annotation_is_named(phantom):
    import json

    image = json.loads((phantom / "annotations/test.json").read_text())["images"][0]
    results = dict(
        img_prefix=str(phantom / "Images_png"),
        img_path="somewhere/001.png",
        file_name=image["file_name"],
        stack=dict(num_slices=3),
        file_thickness_mm=image["thickness_mm"],
        slice_range=image["slice_range"],
        height=512,
        width=512,
    )
    with pytest.raises(ValueError, match=r"somewhere/001.png.*annotation says"):
        LoadCTSlices()(results)


@pytest.mark.parametrize("option", [dict(box_from="mask"), dict(interpolation="nearest")])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match="must be"):
        RandomAffineResize(SIZE, **option)


@pytest.mark.parametrize("slices", [1, 3, 4, 5, 7, 9, 513, 1025])
@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_CUBIC])
def test_a_stack_is_warped_as_its_slices_are(slices, interpolation):
    """cv2 refuses more than four channels at once with cubics, and more than 512 otherwise."""
    generator = np.random.default_rng(0)
    stack = generator.integers(-1000, 1000, (20, 24, slices)).astype(np.int16)
    matrix = np.array([[1.1, 0.2, 1.5], [-0.2, 0.9, 2.0]])
    whole = warp(stack, matrix, (16, 18), interpolation)
    assert whole.shape == (16, 18, slices) and whole.dtype == np.int16
    for d in range(slices):
        alone = warp(np.ascontiguousarray(stack[:, :, d]), matrix, (16, 18), interpolation)
        np.testing.assert_array_equal(whole[:, :, d], alone)


@pytest.mark.parametrize("lesions", [0, 1, 3])
def test_masks_travel_beside_the_pipe(lesions):
    """From process to process a sample's pixels go in shared memory, masks a bit a pixel; what is
    left for the pipe, which holds 64 kB, are handles."""
    rng = np.random.default_rng(lesions)
    masks = rng.integers(0, 2, (lesions, 300, 301), np.uint8)
    sample = dict(
        img=np.zeros((300, 301, 3), np.int16),
        gt_bboxes=HorizontalBoxes(torch.zeros(lesions, 4)),
        gt_bboxes_labels=np.zeros(lesions, np.int64),
        gt_ignore_flags=np.zeros(lesions, bool),
        gt_masks=BitmapMasks(masks, 300, 301),
    )
    packed = PackCTInputs().transform(sample)
    sent = bytes(ForkingPickler.dumps(packed))
    assert len(sent) < 4000  # with numpy's masks 90 kB more for each lesion
    received = pickle.loads(sent)["data_samples"].gt_instances.masks
    assert isinstance(received, BitmapMasks) and received.masks.dtype == np.uint8
    np.testing.assert_array_equal(received.masks, masks)
    np.testing.assert_array_equal(received.pad((320, 320)).masks[:, :300, :301], masks)
