"""The NumPy half of an exported detector against MMDetection's own heads, and plain loops."""

import numpy as np
import pytest
import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmengine.config import ConfigDict

from ct_volumes import two_stage
from ct_volumes.nms import first_kept
from ct_volumes.roi_align import roi_align
from mmdet_ext.released.geometry import WholePixelBoxCoder

SHAPE = (61, 90)  # of an image that is padded to 64 x 96
CODER = dict(means=[0.0] * 4, stds=[1.0] * 4, ratio_clip=16 / 1000, clip="edges")


def box_coder(**options):
    return dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, **options)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("bins, ratio", [(7, 2), (3, 1), (4, 0)])
def test_regions_are_pooled_as_mmcv_pools_them(bins, ratio, aligned):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 12, 20)).astype(np.float32)
    boxes = np.float32(
        [
            [8, 16, 24, 40],
            [0, 0, 80, 48],  # the whole map
            [10.3, 10.3, 10.3, 30],  # no width
            [5, 5, 5, 5],
            [20, 20, 20.5, 20.25],
            [-30, -20, 20, 30],  # partly out of the map
            [300, 300, 340, 340],  # out of it
            [-300, -200, 400, 300],
            [-4, -4, 4, 4],  # samples on and beyond the last that count
        ]
    )
    rois = torch.from_numpy(np.insert(boxes, 0, 0, axis=1))
    expected = RoIAlign(bins, 0.25, ratio, aligned=aligned)(torch.from_numpy(x[None]), rois)
    found = roi_align(x.transpose(1, 2, 0), boxes, bins, 0.25, ratio, aligned)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)
    assert roi_align(x.transpose(1, 2, 0), boxes[:0], bins, 0.25, ratio, aligned).shape == (
        0, 5, bins, bins,
    )  # fmt: skip


@pytest.mark.parametrize("min_size", [None, 0, 6])
@pytest.mark.parametrize("nms_pre", [50, 100_000])
def test_proposals_are_the_rpns(min_size, nms_pre):
    torch.manual_seed(1)
    head = RPNHead(
        in_channels=4, feat_channels=4,
        anchor_generator=dict(
            type="AnchorGenerator", strides=[4], scales=[2, 6], ratios=[0.5, 1.0, 2.0]
        ),
        bbox_coder=box_coder(target_stds=[1.0] * 4),
    )  # fmt: skip
    logits, deltas = torch.randn(1, 6, 16, 24), torch.randn(1, 24, 16, 24)
    limits = dict(nms_pre=nms_pre, max_per_img=40)
    cfg = ConfigDict(
        nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=-1 if min_size is None else min_size,
        **limits,
    )  # fmt: skip
    (expected,) = head.predict_by_feat(
        [logits], [deltas], batch_img_metas=[dict(img_shape=SHAPE)], cfg=cfg
    )
    anchors = head.prior_generator.base_anchors[0].tolist()
    options = dict(
        CODER, stride=4, base_anchors=anchors, iou_threshold=0.7, min_size=min_size, **limits
    )
    last = (x[0].permute(1, 2, 0).numpy() for x in (logits, deltas))
    found = two_stage.proposals(*last, SHAPE, options)
    assert len(found) == len(expected) > 20
    np.testing.assert_allclose(found, expected.bboxes.numpy(), atol=1e-4)


@pytest.mark.parametrize("classes, agnostic", [(1, False), (3, False), (3, True)])
def test_boxes_are_the_box_heads(classes, agnostic):
    rng = np.random.default_rng(2)
    stds = [0.1, 0.1, 0.2, 0.2]
    head = Shared2FCBBoxHead(
        in_channels=4, fc_out_channels=8, num_classes=classes, reg_class_agnostic=agnostic,
        bbox_coder=box_coder(target_stds=stds),
    )  # fmt: skip
    corner = rng.uniform(-5, 60, (80, 2))
    regions = np.hstack([corner, corner + rng.uniform(1, 40, (80, 2))]).astype(np.float32)
    logits = rng.normal(0, 2, (80, classes + 1)).astype(np.float32)
    deltas = rng.normal(0, 2, (80, 4 if agnostic else 4 * classes)).astype(np.float32)
    cfg = ConfigDict(score_thr=0.3, nms=dict(type="nms", iou_threshold=0.5), max_per_img=30)
    (expected,) = head.predict_by_feat(
        [torch.from_numpy(np.insert(regions, 0, 0, axis=1))],
        [torch.from_numpy(logits)],
        [torch.from_numpy(deltas)],
        [dict(img_shape=SHAPE)],
        cfg,
    )
    options = dict(CODER, stds=stds, iou_threshold=0.5, max_per_img=30)
    boxes, scores, labels = two_stage.best_boxes(regions, logits, deltas, SHAPE, options, 0.3)
    assert len(scores) == (30 if classes == 3 else len(expected.scores)) > 5
    np.testing.assert_allclose(boxes, expected.bboxes.numpy(), atol=1e-4)
    np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-6)
    assert labels.tolist() == expected.labels.tolist()
    nothing = two_stage.best_boxes(regions, logits, deltas, SHAPE, options, 1.0)
    assert [len(each) for each in nothing] == [0, 0, 0]


def test_the_clipping_of_mmdet_1_leaves_the_pixels_at_the_border():
    rng = np.random.default_rng(3)
    corner = rng.uniform(-60, 120, (50, 2))
    boxes = np.hstack([corner, corner + rng.uniform(0, 40, (50, 2))]).astype(np.float32)
    deltas = rng.normal(0, 1, (50, 4)).astype(np.float32)
    expected = WholePixelBoxCoder([0.0] * 4, [1.0] * 4).decode(
        torch.from_numpy(boxes), torch.from_numpy(deltas), SHAPE
    )
    found = two_stage.decoded(boxes, deltas, SHAPE, dict(CODER, clip="pixels"))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_masks_are_pasted_as_mmdet_pastes_them():
    rng = np.random.default_rng(4)
    corner = rng.uniform(0, 50, (20, 2))
    boxes = np.hstack([corner, corner + rng.uniform(0.3, 35, (20, 2))]).astype(np.float32)
    boxes = np.concatenate(
        [boxes, np.float32([[7, 9, 7, 20], [70, 50, 90, 61]])]
    )  # one of no width
    masks = rng.random((len(boxes), 28, 28)).astype(np.float32)
    masks[0] = 0  # nothing of it is left
    for mask, box in zip(masks, boxes):
        values, where = _do_paste_mask(
            torch.from_numpy(mask[None, None]), torch.from_numpy(box[None]), *SHAPE
        )
        expected = np.zeros(SHAPE, np.float32)
        expected[where] = values[0].numpy()
        for shape in (SHAPE, (40, 30)):  # a slice to which air was added
            patch = two_stage.pasted(mask, box, SHAPE, shape, 0.5)
            found = np.zeros(shape, bool)
            patch.paint(found)
            sure = np.abs(expected - 0.5)[: shape[0], : shape[1]] > 1e-5
            assert sure.mean() > 0.99
            whole = (expected >= 0.5)[: shape[0], : shape[1]]
            assert np.array_equal(found[sure], whole[sure])


def by_loop(boxes, threshold):
    """Greedy suppression, one pair at a time."""
    kept = []
    for n, (x1, y1, x2, y2) in enumerate(boxes.astype(float)):
        for a1, b1, a2, b2 in boxes[kept].astype(float):
            common = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common
            if union > 0 and common / union > threshold:
                break
        else:
            kept.append(n)
    return kept


def test_suppression_keeps_what_a_loop_keeps():
    rng = np.random.default_rng(5)
    corner = rng.uniform(0, 30, (200, 2))
    boxes = np.hstack([corner, corner + rng.uniform(0, 20, (200, 2))]).astype(np.float32)
    kept = by_loop(boxes, 0.4)
    assert 20 < len(kept) < 180
    assert first_kept(boxes, 0.4, 1000).tolist() == kept
    assert first_kept(boxes, 0.4, 7).tolist() == kept[:7]
    assert first_kept(boxes[:0], 0.4, 7).shape == (0,)


def test_the_highest_scores_of_equal_ones_the_first():
    scores = np.float32([0.2, 0.9, 0.5, 0.9, 0.5, 0.5, 0.1])
    assert two_stage.falling(scores, 3).tolist() == [1, 3, 2]
    assert two_stage.falling(scores, 0).tolist() == [1, 3, 2, 4, 5, 0, 6]
    assert two_stage.falling(scores, 100).tolist() == [1, 3, 2, 4, 5, 0, 6]
