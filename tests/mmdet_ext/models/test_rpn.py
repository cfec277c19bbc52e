"""The RPN at inference: proposals as mmdet's own head gives them, and NMS as mmcv's whole one."""

import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.models.dense_heads import RPNHead
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from mmdet_ext.models import rpn
from mmdet_ext.models.rpn import InferenceRPNHead, faster_rpn, first_kept
from mmdet_ext.models.winograd import InferenceConv2d

from ..small_detector import ROOT, config_of


def boxes_of(kind, number, generator):
    """Boxes alone, in heaps, on a grid of whole pixels with ties, equal, without area."""
    spread = dict(alone=3000.0, heaps=40.0, grid=12.0, equal=0.0, flat=60.0)[kind]
    corner = torch.rand(number, 2, generator=generator) * spread
    side = 16 * torch.exp(0.5 * torch.randn(number, 2, generator=generator))
    boxes = torch.cat([corner, corner + side], 1)
    if kind == "grid":
        return boxes.round()
    if kind == "equal":
        return boxes[:1].expand(number, 4).contiguous()
    if kind == "flat":
        boxes[::3, 2] = boxes[::3, 0]
    return boxes


@pytest.mark.parametrize("kind", ["alone", "heaps", "grid", "equal", "flat"])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_the_first_kept_are_those_of_mmcv(kind, threshold):
    generator = torch.Generator().manual_seed(0)
    for number in (0, 1, 2, 400):
        boxes = boxes_of(kind, number, generator)
        scores = torch.rand(number, generator=generator)
        if number == 400:
            scores = scores.mul(50).round() / 50  # ties
        ids = torch.zeros(number, dtype=torch.long)
        if number:
            _, expected = batched_nms(boxes, scores, ids, dict(type="nms", iou_threshold=threshold))
        else:
            expected = ids
        for most in (1, 7, 300, 1000):
            assert torch.equal(first_kept(boxes, scores, threshold, most), expected[:most])


def heads(**options):
    """mmdet's and ours with the same weights."""
    init_default_scope("mmdet")
    config = config_of(path=ROOT / "configs/demo/alignshift_3slice.py")
    config = {**config.model.rpn_head, "test_cfg": config.model.test_cfg.rpn, **options}
    torch.manual_seed(0)
    plain = MODELS.build(config)
    ours = MODELS.build(faster_rpn(config))
    assert type(plain) is RPNHead and type(ours) is InferenceRPNHead
    ours.load_state_dict(plain.state_dict())
    return plain.eval(), ours.eval()


METAS = [dict(img_shape=(128, 128), scale_factor=(1.0, 1.0))] * 2


@pytest.mark.parametrize(
    "options, ends_early",
    [
        (dict(nms_pre=900, max_per_img=40), True),
        (dict(nms_pre=900, max_per_img=40, min_bbox_size=18), True),
        (dict(nms_pre=900, max_per_img=5000), True),
        (dict(nms_pre=900, min_bbox_size=500), True),
        (dict(nms=dict(type="soft_nms", iou_threshold=0.7)), False),
        (dict(nms=dict(type="nms", iou_threshold=0.7, max_num=20)), False),
    ],
)
def test_proposals_are_those_of_mmdet(options, ends_early, monkeypatch):
    plain, ours = heads()
    for head in (plain, ours):
        head.test_cfg = type(head.test_cfg)({**head.test_cfg, **options})
    calls = []
    monkeypatch.setattr(rpn, "first_kept", lambda *a: calls.append(a) or first_kept(*a))
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, plain.in_channels, 32, 32, generator=generator) * 40
    with torch.no_grad():
        found = ours.predict_by_feat(*plain((maps,)), batch_img_metas=METAS)
        expected = plain.predict_by_feat(*plain((maps,)), batch_img_metas=METAS)
    assert len(calls) == (2 if ends_early else 0)
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        assert (len(one) > 5) == (options.get("min_bbox_size") != 500)
        assert set(one.keys()) == set(other.keys())
        for name in ("bboxes", "scores", "labels"):
            assert torch.equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype or not len(one)


def test_levels_training_and_rescaled_boxes_go_through_mmdet(monkeypatch):
    monkeypatch.setattr(rpn, "first_kept", None)
    levels = dict(
        anchor_generator=dict(type="AnchorGenerator", strides=[4, 8], scales=[4], ratios=[1.0])
    )
    generator = torch.Generator().manual_seed(1)
    plain, ours = heads(**levels)
    maps = [torch.randn(2, plain.in_channels, n, n, generator=generator) * 40 for n in (32, 16)]
    with torch.no_grad():
        found = ours.predict_by_feat(*ours(maps), batch_img_metas=METAS)
        expected = plain.predict_by_feat(*plain(maps), batch_img_metas=METAS)
    for one, other in zip(found, expected):
        assert torch.equal(one.bboxes, other.bboxes) and len(one) > 0
    plain, ours = heads()
    with torch.no_grad():
        scores = ours(maps[:1])
        assert len(ours.predict_by_feat(*scores, batch_img_metas=METAS, rescale=True)[0]) > 0
        assert len(ours.train().predict_by_feat(*scores, batch_img_metas=METAS)[0]) > 0


def test_the_head_is_initialised_and_draws_random_numbers_as_mmdet():
    init_default_scope("mmdet")
    config = dict(config_of().model.rpn_head, in_channels=256, feat_channels=256)
    found = []
    for options in (config, faster_rpn(config)):
        torch.manual_seed(3)
        head = MODELS.build(options)
        head.init_weights()
        found.append((head.state_dict(), torch.rand(1)))
    assert isinstance(head.rpn_conv, InferenceConv2d)
    assert list(found[0][0]) == list(found[1][0]) and found[0][1] == found[1][1]
    for name, weight in found[0][0].items():
        assert torch.equal(weight, found[1][0][name])
    assert np.isclose(head.rpn_conv.weight.std().item(), 0.01, rtol=0.01)


def test_another_head_stays():
    assert faster_rpn(dict(type="GARPNHead")) == dict(type="GARPNHead")
