"""The geometry of released detectors: against mmdet 1.x's definitions, in its own coordinates.

There a box (x1, y1, x2, y2) names its first and last pixel and is x2 - x1 + 1 wide.
"""

import copy
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmdet.models.detectors import MaskRCNN
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, LegacyAnchorGenerator
from mmdet.models.task_modules.coders.legacy_delta_xywh_bbox_coder import (
    LegacyDeltaXYWHBBoxCoder,
    legacy_bbox2delta,
)
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.evaluation.froc import box_iou
from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.evaluation.froc_metric import FROCMetric
from mmdet_ext.released.geometry import WholePixelAnchorGenerator

from ..released_network import linear_map, tiny_detector

SIZE = 64
SCORE_THR, MAX_PER_IMG = 0.2, 50


def old_anchors(size, stride=4):
    """Anchors of mmdet 1.x with `ctr=[0, 0]`, in its order: cell by cell, ratios, then scales."""
    anchors = []
    centre = 0.0
    for row in range(size):
        for column in range(size):
            for ratio in (0.5, 1.0, 2.0):
                for scale in (4, 6, 8, 12, 24, 48):
                    width = stride * scale / math.sqrt(ratio)
                    height = stride * scale * math.sqrt(ratio)
                    box = np.float32(
                        [
                            centre - 0.5 * (width - 1),
                            centre - 0.5 * (height - 1),
                            centre + 0.5 * (width - 1),
                            centre + 0.5 * (height - 1),
                        ]
                    )
                    shift = np.float32([column, row, column, row]) * stride
                    anchors.append(np.round(box) + shift)
    return np.stack(anchors)


def old_decode(boxes, deltas, stds, size):
    deltas = deltas * np.float32(stds)
    widths = boxes[:, 2:] - boxes[:, :2] + 1
    centres = (boxes[:, :2] + boxes[:, 2:]) * 0.5 + widths * deltas[:, :2]
    limit = abs(math.log(16 / 1000))
    widths = widths * np.exp(deltas[:, 2:].clip(-limit, limit))
    corners = [centres - widths * 0.5 + 0.5, centres + widths * 0.5 - 0.5]
    return np.concatenate(corners, 1).clip(0, size - 1)


def old_nms(boxes, scores, threshold):
    keep = []
    x1, y1, x2, y2 = boxes.T
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    order = np.argsort(-scores, kind="stable")
    while len(order):
        best, rest = order[0], order[1:]
        keep.append(best)
        width = np.minimum(x2[best], x2[rest]) - np.maximum(x1[best], x1[rest]) + 1
        height = np.minimum(y2[best], y2[rest]) - np.maximum(y1[best], y1[rest]) + 1
        common = width.clip(0) * height.clip(0)
        order = rest[common / (areas[best] + areas[rest] - common) <= threshold]
    return np.array(keep)


def old_roi_align(feature, box, bins, scale=0.25, samples=2):
    """(C, H, W) and one box -> (C, bins, bins)."""
    height, width = feature.shape[1:]

    def weights(start, end, length):
        """(bins, length): mean of the samples of each bin, linearly interpolated."""
        matrix = np.zeros((bins, length))
        # mmdet 1.x has 0 here. Of boxes below 4 px mmcv pools a whole cell: the known difference.
        step = max(end - start, 1) / bins
        for i in range(bins):
            for j in range(samples):
                at = start + (i + (j + 0.5) / samples) * step
                if not -1 <= at <= length:
                    continue
                at = min(max(at, 0), length - 1)
                low = min(int(at), length - 1)
                high = min(low + 1, length - 1)
                matrix[i, low] += (1 - (at - low)) / samples
                matrix[i, high] += (at - low) / samples
        return matrix

    rows = weights(box[1] * scale, (box[3] + 1) * scale, height)
    columns = weights(box[0] * scale, (box[2] + 1) * scale, width)
    return np.einsum("ih,chw,jw->cij", rows, feature, columns)


def old_paste(mask, box, size):
    """(28, 28) probabilities -> (size, size) bool."""
    x1, y1, x2, y2 = box.astype(np.int32)
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    canvas = np.zeros((size, size), bool)
    canvas[y1 : y1 + height, x1 : x1 + width] = cv2.resize(mask, (int(width), int(height))) > 0.5
    return canvas


@torch.no_grad()
def old_detections(weights, model, feature, size):
    """The second half of a released detector: (1, C, h, w) -> boxes, scores, masks."""
    hidden = F.conv2d(
        feature, weights["rpn_head.rpn_conv.weight"], weights["rpn_head.rpn_conv.bias"], padding=1
    ).relu()
    scores = linear_map(weights, "rpn_head.rpn_cls", hidden)[0].sigmoid()
    deltas = linear_map(weights, "rpn_head.rpn_reg", hidden)[0]
    scores = scores.permute(1, 2, 0).flatten().numpy()
    deltas = deltas.permute(1, 2, 0).reshape(-1, 4).numpy()
    order = np.argsort(-scores, kind="stable")[:6000]
    boxes = old_decode(old_anchors(feature.shape[-1])[order], deltas[order], [1] * 4, size)
    boxes = boxes[old_nms(boxes, scores[order], 0.7)[:300]]

    def pool(boxes, bins):
        pooled = [old_roi_align(feature[0].numpy(), box, bins) for box in boxes]
        return torch.tensor(np.stack(pooled), dtype=torch.float32)

    logits, deltas = model.roi_head.bbox_head(pool(boxes, 7))
    scores = logits.softmax(1)[:, 0].numpy()
    boxes = old_decode(boxes, deltas.numpy(), [0.1, 0.1, 0.2, 0.2], size)
    boxes, scores = boxes[scores > SCORE_THR], scores[scores > SCORE_THR]
    keep = old_nms(boxes, scores, 0.5)[:MAX_PER_IMG]
    boxes, scores = boxes[keep], scores[keep]
    masks = model.roi_head.mask_head(pool(boxes, 14)).sigmoid()[:, 0].numpy()
    return boxes, scores, [old_paste(m, box, size) for m, box in zip(masks, boxes, strict=True)]


@pytest.fixture(scope="module")
def detector(repository):
    weights, model = tiny_detector("alignshift", 3, repository)
    # Scores that differ, and boxes not far from their anchors.
    quieter = {"rpn_cls": 0.02, "rpn_reg": 0.02, "fc_cls": 0.1, "fc_reg": 0.15}
    with torch.no_grad():
        for state in (weights, model.state_dict()):
            for name, value in state.items():
                for part, factor in quieter.items():
                    if f".{part}." in name:
                        value *= factor
    model.test_cfg.rcnn.update(score_thr=SCORE_THR, max_per_img=MAX_PER_IMG)
    model.roi_head.test_cfg.update(score_thr=SCORE_THR, max_per_img=MAX_PER_IMG)
    return weights, model


def sample(size=SIZE):
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (size, size))
    meta = dict(shapes, scale_factor=(1.0, 1.0))
    return DetDataSample(metainfo=meta)


@torch.no_grad()
def test_detections_are_those_of_mmdet_1(detector):
    weights, model = detector
    volume = torch.randn(1, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    inputs = volume, torch.tensor([2.0])
    boxes, scores, masks = old_detections(weights, model, model.extract_feat(inputs)[0], SIZE)
    assert len(boxes) > 10 and any(m.any() for m in masks)
    found = model.predict(inputs, [sample()])[0].pred_instances
    assert len(found) == len(boxes)
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=1e-5)
    # What evaluation gets, in the coordinates of the annotations: pixel centres.
    meta = dict(
        file_name="a", patient="1", study="1", series="1", slice_range=(1, 3), spacing_mm=1.0,
        file_thickness_mm=2.0, lesions=[], ori_shape=(SIZE, SIZE),
    )  # fmt: skip
    metric = FROCMetric()
    metric.process({}, [dict(meta, pred_instances=found)])
    # mmdet 1.x turns a box of less than a pixel inside out; evaluation gets its centre.
    corners = boxes.reshape(-1, 2, 2)
    inside_out = corners[:, :1] > corners[:, 1:]
    corners = np.where(inside_out, corners.mean(1, keepdims=True), corners)
    assert inside_out.any(axis=(1, 2)).mean() < 0.2
    np.testing.assert_allclose(metric.results[0]["boxes"], corners.reshape(-1, 4), atol=2e-3)
    ious = [(a & b).sum() / max((a | b).sum(), 1) for a, b in zip(found.masks.numpy(), masks)]
    assert np.mean(ious) > 0.99


def test_anchors_are_those_of_mmdet_1_by_their_edges():
    generator = WholePixelAnchorGenerator(
        strides=[4], scales=[4, 6, 8, 12, 24, 48], ratios=[0.5, 1.0, 2.0]
    )
    (anchors,) = generator.grid_priors([(5, 5)], device="cpu")
    np.testing.assert_array_equal(anchors.numpy(), old_anchors(5) + [0, 0, 1, 1])
    # By hand, at scale 16: half of 16 sqrt(2) by 16 / sqrt(2) px, and a square on pixels -8 to 8.
    assert anchors[0].tolist() == [-11, -5, 12, 6]
    assert anchors[6].tolist() == [-8, -8, 9, 9]


def test_the_border_keeps_anchors_that_end_with_the_last_pixel(repository):
    """The numbers of 512 px: of mmdet 1.x's 223,944 anchors inside, 0 would lose 1,016 by edges."""
    model = read_experiment(repository / "configs/released/a3d_3slice.py").model
    options = dict(model.rpn_head.anchor_generator)
    assert options.pop("type") == "WholePixelAnchorGenerator"
    (anchors,) = WholePixelAnchorGenerator(**options).grid_priors([(128, 128)], device="cpu")
    first, last = (anchors - torch.tensor([0, 0, 1, 1])).split(2, dim=1)
    inside = (first >= 0).all(1) & (last < 512).all(1)
    valid = torch.ones(len(anchors), dtype=torch.bool)
    kept, strict = (
        anchor_inside_flags(anchors, valid, (512, 512), border)
        for border in (model.train_cfg.rpn.allowed_border, 0)
    )
    assert torch.equal(kept, inside)
    assert int(inside.sum()) == 223_944 and int((inside & ~strict).sum()) == 1_016


def test_the_box_coder_by_edges_is_that_of_mmdet_1(detector):
    _, model = detector
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 40, (2, 50, 2)), rng.uniform(1, 40, (2, 50, 2))
    anchors, lesions = torch.tensor(np.concatenate([corner, corner + size], 2)).float()
    edges = torch.tensor([0.0, 0, 1, 1])
    for coder in (model.rpn_head.bbox_coder, model.roi_head.bbox_head.bbox_coder):
        deltas = coder.encode(anchors + edges, lesions + edges)
        expected = legacy_bbox2delta(anchors, lesions, coder.means, coder.stds)
        torch.testing.assert_close(deltas, expected, rtol=1e-4, atol=1e-5)
        decoded = coder.decode(anchors + edges, deltas, max_shape=(100, 100)) - edges
        torch.testing.assert_close(decoded, lesions, rtol=1e-4, atol=1e-3)


def test_ground_truth_is_given_by_its_edges_and_the_callers_stays(detector, monkeypatch):
    _, model = detector
    seen = []
    monkeypatch.setattr(
        MaskRCNN, "loss", lambda self, inputs, samples: seen.extend(samples) or {"loss": 0}
    )
    data = sample()
    # Pixels 10 to 20 of the file; its pixel centres are at 10.5 and 20.5 by edges.
    data.gt_instances = InstanceData(bboxes=torch.tensor([[10.5, 10.5, 20.5, 30.5]]))
    model.loss((None, None), [data])
    assert seen[0].gt_instances.bboxes.tolist() == [[10, 10, 21, 31]]
    assert data.gt_instances.bboxes.tolist() == [[10.5, 10.5, 20.5, 30.5]]
    assert seen[0].img_shape == data.img_shape


def test_training_takes_the_anchors_inside_the_image_and_has_finite_losses(detector):
    _, model = detector
    model = copy.deepcopy(model).train()
    (anchors,) = model.rpn_head.prior_generator.grid_priors([(16, 16)], device="cpu")
    border = model.rpn_head.train_cfg.allowed_border
    taken = anchor_inside_flags(anchors, torch.ones(len(anchors)) > 0, (SIZE, SIZE), border)
    x1, y1, x2, y2 = old_anchors(16).T  # first and last pixel
    inside = (x1 >= 0) & (y1 >= 0) & (x2 < SIZE) & (y2 < SIZE)
    np.testing.assert_array_equal(taken.numpy(), inside)

    mask = np.zeros((1, SIZE, SIZE), np.uint8)
    mask[:, 10:38, 10:24] = 1
    data = sample()
    data.gt_instances = InstanceData(
        bboxes=torch.tensor([[10.5, 10.5, 23.5, 37.5]]),
        labels=torch.tensor([0]),
        masks=BitmapMasks(mask, SIZE, SIZE),
    )
    losses = model.loss((torch.randn(1, 1, 3, SIZE, SIZE), torch.tensor([2.0])), [data])
    total, values = model.parse_losses(losses)
    assert all(torch.isfinite(value) for value in values.values()) and values["loss_mask"] > 0
    total.backward()


def test_predictions_are_given_by_the_centres_of_their_pixels_whatever_the_scale(
    detector, monkeypatch
):
    _, model = detector
    boxes = torch.tensor([[10.0, 10, 21, 31], [5, 5, 5.2, 9]])

    def predict(self, inputs, samples, rescale=True):
        scale = torch.tensor(samples[0].scale_factor).repeat(2) if rescale else 1
        samples[0].pred_instances = InstanceData(bboxes=boxes / scale)
        return samples

    monkeypatch.setattr(MaskRCNN, "predict", predict)
    expected = np.array([[10.5, 10.5, 20.5, 30.5], [5.1, 5.5, 5.1, 8.5]])
    data = sample()
    data.set_metainfo(dict(scale_factor=(2.0, 4.0)))
    for rescale, scale in ((False, [1] * 4), (True, [2, 4, 2, 4])):
        found = model.predict(None, [data], rescale)[0].pred_instances.bboxes
        np.testing.assert_allclose(found.numpy(), expected / scale, rtol=1e-6)


def test_masks_are_pasted_on_the_same_pixels(detector):
    _, model = detector
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(-2, 60, (100, 2)), rng.uniform(5, 60, (100, 2))
    boxes = np.concatenate([corner, corner + size], 1).clip(0, SIZE - 1).astype(np.float32)
    x, y = np.meshgrid(*[np.linspace(-1, 1, 28, dtype=np.float32)] * 2)
    radii, turn = rng.uniform(0.5, 0.9, (100, 2, 1, 1)), rng.uniform(0, np.pi, (100, 1, 1))
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    logits = 6 * (1 - np.hypot(u / radii[:, 0], v / radii[:, 1])).astype(np.float32)
    found = model.roi_head.mask_head._predict_by_feat_single(
        torch.tensor(logits)[:, None],
        torch.tensor(boxes + np.float32([0, 0, 1, 1])),
        torch.zeros(100, dtype=torch.long),
        dict(scale_factor=(1.0, 1.0), ori_shape=(SIZE, SIZE)),
        model.roi_head.test_cfg,
        rescale=True,
    )
    probabilities = 1 / (1 + np.exp(-logits))
    expected = [old_paste(p, box, SIZE) for p, box in zip(probabilities, boxes, strict=True)]
    assert (found.numpy() != np.stack(expected)).sum() <= 5  # of 64 x 64 x 100, at exactly 0.5


def test_mask_targets_are_cut_at_whole_pixels(detector):
    _, model = detector
    model = copy.deepcopy(model.roi_head.mask_head)
    mask = np.zeros((1, SIZE, SIZE), np.uint8)
    mask[:, 10:38, 10:24] = 1

    class Sampled:
        pos_priors = torch.tensor([[10.7, 10.9, 38.2, 38.6]])
        pos_assigned_gt_inds = torch.tensor([0])

    instances = InstanceData(masks=BitmapMasks(mask, SIZE, SIZE))
    targets = model.get_targets([Sampled], [instances], ConfigDict(mask_size=28))
    expected = torch.zeros(28, 28)
    expected[:, :14] = 1
    assert torch.equal(targets[0], expected)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).resolve().parents[3].glob("configs/released/*.py")), ids=str
)
def test_released_options(path):
    config = read_experiment(path)
    kind, slices = path.stem.split("_")
    for split in ("train", "val", "test"):
        dataset = config[f"{split}_dataloader"].dataset
        stack, affine = dataset.stack, dataset.pipeline[-2]
        assert stack.num_slices == int(slices[0]) and stack.interpolation == "released"
        assert stack.policy == ("keep_thick" if kind == "alignshift" else "normalize")
        assert (affine.size, affine.interpolation) == (512, "cubic")
        assert affine.box_from == "corners"
    train, *others = (config[f"{split}_dataloader"] for split in ("train", "val", "test"))
    assert train.dataset.ann_file == "annotations_released/train.json"
    assert [c.dataset.ann_file for c in others] == ["annotations/val.json", "annotations/test.json"]
    batch = {"alignshift": 2 * 4, "tsm": 2 * 4, "a3d": 1 * 4, "25d": 16 * 4}[kind]
    assert train.batch_size == config.auto_scale_lr.base_batch_size == batch
    assert config.model_wrapper_cfg.sync_bn == (kind != "25d")
    optimizer, (warm_up, steps) = config.optim_wrapper.optimizer, config.param_scheduler
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.02, 0.9, 1e-4)
    assert (warm_up.end, steps.milestones, steps.end) == (500, [9, 16], 20)
    thresholds = {"alignshift": 1e-3, "tsm": 5e-5, "a3d": 5e-5, "25d": 5e-3}
    assert config.model.test_cfg.rcnn.score_thr == thresholds[kind]
    heads = config.model.roi_head
    for extractor in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        assert extractor.roi_layer.aligned is False and extractor.roi_layer.sampling_ratio == 2
    fusion = config.model.backbone.fusion
    if kind == "alignshift":
        assert (fusion.type, fusion.n_fold, fusion.zero_padding) == ("AlignShiftConv", 8, False)


@pytest.mark.parametrize(
    "size, today, mmdet3", [(12, 0.57, 0.86), (20, 0.70, 0.91), (40, 0.83, 0.95)]
)
def test_the_figures_of_the_page(size, today, mmdet3, repository):
    """What docs/converting.md says other geometries would cost, on a lesion found perfectly."""
    # Today's RoIAlign looks where the old one looked for a box 2 px to the upper left ...
    feature = torch.rand(1, 3, 40, 40)
    box = torch.tensor([[0.0, 60, 60, 60 + size + 1, 60 + size + 1]])
    old = RoIAlign(7, 0.25, 2, aligned=False)(feature, box)
    new = RoIAlign(7, 0.25, 2, aligned=True)(feature, box + torch.tensor([[0, 2, 2, 2, 2]]))
    torch.testing.assert_close(old, new)
    # ... so the box comes out 2 px to the lower right, and as pixel edges.
    lesion = np.array([[60, 60, 60 + size, 60 + size]], np.float64)
    found = lesion + [2, 2, 3, 3] - PIXEL_CENTRE
    assert box_iou(lesion, found)[0] == pytest.approx(today, abs=0.005)
    # mmdet 3's own coder for old models: the same deltas, the box half a pixel larger all round.
    boxes = torch.tensor(lesion).float()
    decoded = LegacyDeltaXYWHBBoxCoder().decode(boxes, torch.zeros(1, 4)).numpy()
    np.testing.assert_allclose(decoded, lesion + [-0.5, -0.5, 0.5, 0.5])
    found = decoded - PIXEL_CENTRE
    assert box_iou(lesion, found)[0] == pytest.approx(mmdet3, abs=0.005)
    page = (repository / "docs/converting.md").read_text()
    assert f"| {size} px | {today:.2f} | {mmdet3:.2f} |" in page


@pytest.mark.parametrize(
    "size, today, stock", [(12, 0.85, 0.64), (20, 0.90, 0.76), (40, 0.95, 0.87)]
)
def test_the_figures_of_proposals_on_the_page(size, today, stock, repository):
    """IoU of a proposal whose deltas, from the released anchors, lead to the lesion exactly: from
    other anchors they lead elsewhere. Mean over the 16 places of a lesion in a cell."""
    options = dict(strides=[4], scales=[4, 6, 8, 12, 24, 48], ratios=[0.5, 1.0, 2.0])
    edges = torch.tensor([0, 0, 1, 1])
    released = torch.from_numpy(old_anchors(40)).float() + edges
    lesions = torch.tensor(
        [[60 + x, 60 + y, 61 + x + size, 61 + y + size] for x in range(4) for y in range(4)]
    ).float()
    best = bbox_overlaps(lesions, released).argmax(1)
    coder = DeltaXYWHBBoxCoder()
    deltas = coder.encode(released[best], lesions)

    def iou(generator, edges):
        anchors = generator.grid_priors([(40, 40)], device="cpu")[0] + edges
        proposals = coder.decode(anchors[best], deltas)
        return bbox_overlaps(lesions, proposals, is_aligned=True).mean().item()

    assert iou(WholePixelAnchorGenerator(**options), 0) == pytest.approx(1, abs=1e-5)
    assert iou(AnchorGenerator(**options), 0) == pytest.approx(today, abs=0.005)
    of_mmdet_1 = LegacyAnchorGenerator(**options, center_offset=0.5)
    assert iou(of_mmdet_1, edges) == pytest.approx(stock, abs=0.005)
    page = (repository / "docs/converting.md").read_text()
    assert f"| {size} px | {today:.2f} | {stock:.2f} |" in page
