"""Detectors on regrouped slices against loops image by image, and against mmdet's own."""

import copy

import pytest
import torch
from mmdet.models.detectors import FasterRCNN
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from torch.testing import assert_close

from mmdet_ext.engine.run import load_config
from mmdet_ext.models.slice_groups import BagRoIExtractor, PyramidAttention

SIZE = 64
CHANNELS = 16
# Of a quick detector: 1/8 of ResNet-18's width.
SMALL = {
    "model.backbone.depth": 18,
    "model.backbone.base_channels": 8,
    "model.backbone.frozen_stages": -1,
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": [8, 16, 32, 64],
    "model.neck.out_channels": CHANNELS,
    "model.rpn_head.in_channels": CHANNELS,
    "model.rpn_head.feat_channels": CHANNELS,
    "model.roi_head.bbox_roi_extractor.out_channels": CHANNELS,
    "model.roi_head.bbox_head.in_channels": CHANNELS,
    "model.roi_head.bbox_head.fc_out_channels": 32,
    "model.test_cfg.rpn.max_per_img": 20,
    "model.test_cfg.rcnn.score_thr": 0.0,
}
MASK = {
    "model.roi_head.mask_roi_extractor.out_channels": CHANNELS,
    "model.roi_head.mask_head.in_channels": CHANNELS,
    "model.roi_head.mask_head.conv_out_channels": CHANNELS,
}
VA = "volumetric_attention/faster_rcnn_r50_va"
PARAMETERS = {
    "faster_rcnn_r50": 41_348_181,
    "faster_rcnn_r101": 60_340_309,
    "faster_rcnn_r152": 75_983_957,
    "deformable_faster_rcnn_r50": 41_929_023,
    "faster_rcnn_r50_va": 41_348_181 + 371_785,
    "faster_rcnn_r101_va": 60_340_309 + 371_785,
    "faster_rcnn_r152_va": 75_983_957 + 371_785,
    "deformable_faster_rcnn_r50_va": 41_929_023 + 371_785,
    "deformable_faster_rcnn_r50_vca": 41_929_023 + 5 * 74_256,
    "deformable_faster_rcnn_r50_vsa": 41_929_023 + 5 * 101,
}


@pytest.fixture(autouse=True)
def _scope():
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")


def model_config(repository, name=VA, mask=False, **overrides):
    options = {**SMALL, **(MASK if mask else {}), **overrides}
    name = "volumetric_attention/mask_rcnn_r50_va" if mask else name
    return load_config(str(repository / f"configs/{name}.py"), options).model


def detector(repository, *args, seed=0, dtype=torch.float64, **overrides):
    config = model_config(repository, *args, **overrides)
    torch.manual_seed(seed)
    model = MODELS.build(config)
    model.init_weights()
    with torch.no_grad():  # statistics and gates of a network that has learnt something
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
    return model.to(dtype).eval()


def volumes(batch=2, slices=9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, slices, SIZE, SIZE, generator=generator, dtype=dtype)


def samples(batch=2, masks=False):
    found = []
    for i in range(batch):
        metainfo = dict(
            img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), batch_input_shape=(SIZE, SIZE),
            pad_shape=(SIZE, SIZE), scale_factor=(1.0, 1.0),
        )  # fmt: skip
        sample = DetDataSample(metainfo=metainfo)
        boxes = torch.tensor([[8.0 + i, 10, 30, 34], [40, 36 - i, 54, 52]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(2, dtype=torch.long))
        if masks:
            area = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
            area[:, 12:50, 12:50] = 1
            sample.gt_instances.masks = BitmapMasks(area.numpy(), SIZE, SIZE)
        found.append(sample)
    return found


def pyramids(model, stack):
    """Of one stack (9, H, W), image by image: a list of the levels' (C, h, w)."""
    images = [stack[3 * n : 3 * n + 3][None] for n in range(len(stack) // 3)]
    return [[level[0] for level in model.neck(model.backbone(image))] for image in images]


@pytest.mark.parametrize("slices", [9, 15])
def test_features_are_those_of_a_loop_over_samples_images_and_levels(repository, slices):
    model = detector(repository, **{"stack.num_slices": slices})
    batch = volumes(slices=slices)
    with torch.no_grad():
        maps = model.extract_feat((batch, torch.ones(2)))
        assert [tuple(m.shape) for m in maps] == [(2, CHANNELS, s, s) for s in (16, 8, 4, 2, 1)]
        for b in range(2):
            images = pyramids(model, batch[b, 0])
            for i, level in enumerate(model.attention.levels):
                bag = torch.stack([image[i] for image in images])
                assert_close(maps[i][b], level(bag[None])[0], rtol=1e-9, atol=1e-9)


def test_without_attention_it_is_mmdets_own_detector(repository):
    config = model_config(repository, "volumetric_attention/faster_rcnn_r50")
    model = detector(repository, "volumetric_attention/faster_rcnn_r50", dtype=torch.float32)
    own = {k: v for k, v in copy.deepcopy(config).items() if k != "num_slices"}
    plain = MODELS.build(dict(own, type="FasterRCNN"))
    assert type(plain) is FasterRCNN
    plain.load_state_dict(model.state_dict())
    plain.eval()
    batch, thickness = volumes(slices=3, dtype=torch.float32), torch.ones(2)
    with torch.no_grad():
        found = model.predict((batch, thickness), samples())
        expected = plain.predict(batch[:, 0], samples())
    for one, other in zip(found, expected):
        assert len(one.pred_instances) > 0
        assert_close(one.pred_instances.bboxes, other.pred_instances.bboxes)
        assert_close(one.pred_instances.scores, other.pred_instances.scores)
    torch.manual_seed(3)
    losses = model.loss((batch, thickness), samples())
    torch.manual_seed(3)
    expected = plain.loss(batch[:, 0], samples())
    assert losses.keys() == expected.keys()
    values, expected = (model.parse_losses(each)[1] for each in (losses, expected))
    for name in values:
        assert_close(values[name], expected[name])


def test_context_images_have_no_order_but_the_target_has_a_place(repository):
    model, batch = detector(repository), volumes()
    swapped = batch[:, :, [6, 7, 8, 3, 4, 5, 0, 1, 2]]
    shifted = batch[:, :, [3, 4, 5, 0, 1, 2, 6, 7, 8]]
    with torch.no_grad():
        maps, of_swapped, of_shifted = (
            model.extract_feat((each, torch.ones(2))) for each in (batch, swapped, shifted)
        )
    for one, same, other in zip(maps, of_swapped, of_shifted):
        assert_close(one, same, rtol=1e-9, atol=1e-9)
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("location", ["rpn", "rcnn"])
def test_gradients_reach_every_slice_of_every_image(repository, location, detach):
    options = {"model.attention_location": location, "model.attention.detach_context": detach}
    model = detector(repository, **options)
    batch = volumes().requires_grad_()
    maps = model.extract_feat((batch, torch.ones(2)))
    if location == "rcnn":
        rois = bbox2roi([s.gt_instances.bboxes.double() for s in samples()])
        maps = [model.roi_head.bbox_roi_extractor(maps[:4], rois)]
    sum((m**2).sum() for m in maps).backward()
    reached = batch.grad.abs().amax((3, 4))[:, 0] > 0  # (2, 9)
    expected = torch.ones(2, 9, dtype=torch.bool)
    expected[:, [0, 1, 2, 6, 7, 8]] = not detach
    assert torch.equal(reached, expected)


# Attention on RoI features


def test_roi_features_are_those_of_a_loop_over_images_and_regions(repository):
    model = detector(repository, **{"model.attention_location": "rcnn"})
    extractor, batch = model.roi_head.bbox_roi_extractor, volumes()
    assert isinstance(extractor, BagRoIExtractor)
    rois = bbox2roi([s.gt_instances.bboxes.double() for s in samples()])
    plain = SingleRoIExtractor(
        dict(type="RoIAlign", output_size=7, sampling_ratio=2), CHANNELS, [4, 8, 16, 32]
    )
    with torch.no_grad():
        maps = model.extract_feat((batch, torch.ones(2)))
        found = extractor(maps[:4], rois)
        assert found.shape == (4, CHANNELS, 7, 7)
        for roi, region in zip(rois, found):
            images = pyramids(model, batch[int(roi[0]), 0])
            here = torch.cat([roi.new_zeros(1), roi[1:]])[None]
            bag = [plain([level[None] for level in image[:4]], here)[0] for image in images]
            assert_close(region, extractor.attention(torch.stack(bag)[None])[0])


def test_with_attention_on_rois_the_rpn_sees_the_target_alone(repository):
    model = detector(repository, **{"model.attention_location": "rcnn"})
    batch = volumes()
    others = batch.clone()
    others[:, :, [0, 1, 2, 6, 7, 8]] += 1
    with torch.no_grad():
        one, other = (
            model.rpn_head(model.extract_feat((each, torch.ones(2)))) for each in (batch, others)
        )
        for first, second in zip([*one[0], *one[1]], [*other[0], *other[1]]):
            assert torch.equal(first, second)
        for b in range(2):
            target = pyramids(model, batch[b, 0])[1]
            scores, _ = super(type(model.rpn_head), model.rpn_head).forward(
                [level[None] for level in target]
            )
            for found, expected in zip(one[0], scores):
                assert_close(found[b], expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("location", ["rpn", "rcnn"])
def test_mask_rcnn_has_an_attention_for_boxes_and_one_for_masks(repository, location):
    options = {"model.attention_location": location}
    model = detector(repository, mask=True, dtype=torch.float32, **options).train()
    batch = volumes(dtype=torch.float32), torch.ones(2)
    losses = model.loss(batch, samples(masks=True))
    total, values = model.parse_losses(losses)
    levels = ["P2", "P3", "P4", "P5", "P6"] if location == "rpn" else ["bbox", "mask"]
    names = {f"entropy_{level}_{kind}" for level in levels for kind in ("channel", "spatial")}
    assert {name for name in losses if name.startswith("entropy")} == names
    assert all(0 <= losses[name] < 1 + 1e-6 and not losses[name].requires_grad for name in names)
    added = sum(float(values[name]) for name in values if name.startswith("loss_"))
    assert float(total) == pytest.approx(added, rel=1e-5), "entropies are not losses"
    total.backward()
    attentions = [m for n, m in model.named_modules() if n.endswith("attention")]
    assert len(attentions) == (1 if location == "rpn" else 2)
    for parameter in (p for m in attentions for p in m.parameters()):
        assert parameter.grad is not None
    (first, _) = model.eval().predict(batch, samples())
    assert first.pred_instances.masks.shape[1:] == (SIZE, SIZE)


def test_entropies_are_of_the_attention_that_was_paid():
    torch.manual_seed(0)
    module = PyramidAttention(1, dict(type="VolumetricAttention", channels=8, reduction=2))
    image = torch.randn(2, 1, 8, 6, 6)
    module([image.expand(-1, 3, -1, -1, -1)])
    assert module.entropies[0]["channel"] == pytest.approx(1, abs=1e-6), "identical images"
    module.eval()([torch.randn(2, 3, 8, 6, 6)])
    assert module.entropies[0]["channel"] == pytest.approx(1, abs=1e-6), "of training alone"
    module.levels[0].spatial.scale = "none"
    module.train()([100 * torch.randn(2, 3, 8, 6, 6)])
    assert module.entropies[0]["spatial"] == pytest.approx(0, abs=1e-6), "one-hot"


def test_no_regions_give_no_entropy():
    attention = dict(type="VolumetricAttention", channels=4, reduction=2)
    layer = dict(type="RoIAlign", output_size=7, sampling_ratio=2)
    extractor = BagRoIExtractor(4, 3, attention, roi_layer=layer, featmap_strides=[4, 8])
    maps = torch.randn(2, 12, 16, 16), torch.randn(2, 12, 8, 8)
    assert extractor(maps, torch.zeros(0, 5)).shape == (0, 4, 7, 7)
    assert extractor.entropies == {}
    extractor(maps, torch.tensor([[1.0, 4, 4, 20, 20]]))
    assert set(extractor.entropies) == {"channel", "spatial"}


# A whole volume


@pytest.mark.parametrize("location", ["rpn", "rcnn"])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_features_of_a_volume_are_those_of_its_stacks(repository, step, location):
    model = detector(repository, **{"model.attention_location": location})
    volume = volumes(1, 14, seed=5)[0, 0]
    seen = []
    model.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    with torch.no_grad():
        found = list(model.volume_features(volume, step))
    assert [slice_ for slice_, _ in found] == list(range(0, 14, step))
    centres = {slice_ + offset for slice_ in range(0, 14, step) for offset in (-3, 0, 3)}
    # Beyond the scan the end slice is repeated: there several images are one.
    needed = {tuple(min(max(c + i, 0), 13) for i in (-1, 0, 1)) for c in centres}
    assert sum(seen) == len(needed), "each image once"
    for slice_, maps in found:
        around = [min(max(slice_ + offset, 0), 13) for offset in range(-4, 5)]
        stack = volume[around][None, None]
        with torch.no_grad():
            expected = model.extract_feat((stack, torch.ones(1)))
        for one, other in zip(maps, expected):
            assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_predictions_from_features_are_predictions(repository):
    model = detector(repository, dtype=torch.float32)
    batch = volumes(dtype=torch.float32), torch.ones(2)
    with torch.no_grad():
        expected = model.predict(batch, samples())
        found = model.predict_features(model.extract_feat(batch), samples())
    for one, other in zip(found, expected):
        assert len(one.pred_instances) > 0
        assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)
        assert torch.equal(one.pred_instances.scores, other.pred_instances.scores)


@pytest.mark.parametrize("location", ["rpn", "rcnn"])
def test_attention_weights_are_those_of_a_loop(repository, location):
    model = detector(repository, **{"model.attention_location": location})
    batch = volumes()
    boxes = [torch.tensor([[8.0, 10, 30, 34]]), torch.tensor([[2.0, 4, 60, 50], [40, 36, 54, 52]])]
    boxes = [each.double() for each in boxes]
    with torch.no_grad():
        found = model.attention_weights((batch, torch.ones(2)), boxes)
        bags = [list(zip(*pyramids(model, batch[b, 0]))) for b in range(2)]
        expected = {}
        if location == "rpn":
            for i, level in enumerate(model.attention.levels):
                expected[f"P{i + 2}"] = [level.attend(torch.stack(bag[i])[None])[1] for bag in bags]
        else:
            extractor = model.roi_head.bbox_roi_extractor
            plain = SingleRoIExtractor(
                roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2),
                out_channels=CHANNELS,
                featmap_strides=[4, 8, 16, 32],
            )
            rois, expected["bbox"] = bbox2roi(boxes), []
            for roi in rois:
                levels = bags[int(roi[0])][:4]
                here = torch.cat([roi.new_zeros(1), roi[1:]])[None]
                bag = [plain([lv[n][None] for lv in levels], here)[0] for n in range(3)]
                expected["bbox"].append(extractor.attention.attend(torch.stack(bag)[None])[1])
    assert list(found) == list(expected)
    for level, rows in expected.items():
        for part in ("channel", "spatial"):
            assert_close(found[level][part], torch.cat([row[part] for row in rows]))
            assert_close(found[level][part].sum(1), torch.ones(len(rows)).double())


def test_without_attention_there_are_no_weights(repository):
    model = detector(repository, "volumetric_attention/faster_rcnn_r50")
    with torch.no_grad():
        assert (
            model.attention_weights((volumes(slices=3), torch.ones(2)), [torch.zeros(0, 4)]) == {}
        )


# What is built, and what is refused


@pytest.mark.parametrize("name", PARAMETERS)
def test_numbers_of_parameters(repository, name):
    path = str(repository / f"configs/volumetric_attention/{name}.py")
    config = load_config(path, {"model.backbone.init_cfg": None})
    with torch.device("meta"):
        model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_the_number_of_parameters_of_mask_rcnn_with_two_classes(repository):
    path = str(repository / "configs/volumetric_attention/mask_rcnn_r50_va.py")
    classes = {f"model.roi_head.{head}_head.num_classes": 2 for head in ("bbox", "mask")}
    config = load_config(path, {"model.backbone.init_cfg": None, **classes})
    with torch.device("meta"):
        model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) == 43_976_540 + 371_785
    assert sum(p.numel() for p in model.attention.parameters()) == 371_785


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stack.num_slices": 7}, "num_slices=7: images of 3 slices .*=3, 9, 15"),
        ({"stack.num_slices": 6}, "num_slices=6: images of 3 slices"),
        ({"model.attention": None}, "num_slices=9 makes 3 images.*set model.attention, or"),
        (
            {"model.attention": None, "model.attention_location": "rcnn", "stack.num_slices": 3},
            "attention_location='rcnn' without attention: set model.attention",
        ),
        ({"model.attention.channels": 8}, "attention.channels=8, .* needs 16"),
        ({"model.attention_location": "fpn"}, "attention_location must be one of .*'fpn'"),
        ({"model.attention.channel": False, "model.attention.spatial": False}, "channel=True or"),
    ],
)
def test_what_does_not_fit_is_refused(repository, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(model_config(repository, **options))


def test_parts_that_take_no_bag_are_refused(repository):
    for part, expected, other in (
        ("rpn_head", "RPNHead", "GARPNHead"),
        ("roi_head.bbox_roi_extractor", "SingleRoIExtractor", "GenericRoIExtractor"),
    ):
        config = model_config(repository, **{"model.attention_location": "rcnn"})
        holder = config
        for name in part.split("."):
            holder = holder[name]
        holder["type"] = other
        with pytest.raises(ValueError, match=f"{part}.type={other}: .* it must be {expected}"):
            MODELS.build(config)


def test_another_number_of_slices_is_refused(repository):
    model = detector(repository)
    for wrong in (volumes(slices=3), volumes()[:, [0, 0]]):
        with pytest.raises(ValueError, match="num_slices=9, the volume has"):
            model.extract_feat((wrong, torch.ones(2)))
    config = model_config(repository)
    del config["num_slices"]
    with pytest.raises(ValueError, match="read_experiment"):
        MODELS.build(config)
