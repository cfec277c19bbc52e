"""The preprocessor, and every experiment of the repository built and run."""

import copy
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.ops import RoIAlign
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from mmengine.utils import import_modules_from_strings

from mmdet_ext.config.check import ConfigError, refused_by_parts
from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.engine.run import load_config
from mmdet_ext.models.densenet import TruncatedDenseNet3D
from mmdet_ext.models.neck import KeySliceFPN
from mmdet_ext.models.preprocessor import CTDataPreprocessor
from mmdet_ext.ops import OPERATORS

from ..small_detector import config_of

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("configs/*.py"))
ATTENTION = sorted(
    p.relative_to(ROOT).as_posix() for p in ROOT.glob("configs/volumetric_attention/*.py")
)
LITS = [path for path in ATTENTION if "/lits_" in path]
# Two-stage detectors; the other networks of configs/demo have tests of their own.
DEMOS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in ROOT.glob("configs/demo/*.py")
    if p.stem not in ("dino_3slice", "lits_volumes")
)


def sample(height=64, width=64, slices=3, thickness=2.0, lesions=1, seed=0):
    """A packed sample: a bright square on noise."""
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randint(-1100, 2200, (1, slices, height, width), generator=generator)
    mask = np.zeros((lesions, height, width), np.uint8)
    mask[:, 20:44, 16:40] = 1
    data = DetDataSample(
        metainfo=dict(
            img_path="a/001.png",
            img_shape=(height, width),
            ori_shape=(height, width),
            scale_factor=(1.0, 1.0),
            thickness_mm=thickness,
        )
    )
    data.gt_instances = InstanceData(
        bboxes=torch.tensor([[16.0, 20, 40, 44]] * lesions).reshape(-1, 4),
        labels=torch.zeros(lesions, dtype=torch.long),
        masks=BitmapMasks(mask, height, width),
    )
    return volume.to(torch.int16), data


def collate(*samples):
    return {"inputs": [s[0] for s in samples], "data_samples": [s[1] for s in samples]}


@pytest.mark.parametrize("low, high", [(-1024, 2050), (-175, 275), (-2000, 2001)])
def test_a_window_is_mapped_to_what_the_papers_feed_their_networks(low, high):
    volume, data = sample()
    before = volume.clone()
    images, thickness = CTDataPreprocessor(low, high)(collate((volume, data)))["inputs"]
    expected = 255 * (before.double().clamp(low, high) - low) / (high - low) - 50
    np.testing.assert_allclose(images[0], expected, atol=1e-4)
    assert images.shape == (1, 1, 3, 64, 64) and images.dtype == torch.float32
    assert thickness.tolist() == [2.0]
    assert volume.equal(before)


def test_the_usual_window_clips_all_that_int16_holds():
    volume, data = sample(32, 32)
    volume[..., 0, :5] = torch.tensor([-32768, -1024, 513, 2050, 32767], dtype=torch.int16)
    images, _ = CTDataPreprocessor()(collate((volume, data)))["inputs"]
    assert images[0, 0, 0, 0, :5].tolist() == pytest.approx([-50, -50, 77.5, 205, 205])


def test_sizes_are_padded_with_air_to_a_common_multiple_of_32():
    small, large = sample(40, 64), sample(64, 70, thickness=float("inf"))
    out = CTDataPreprocessor()(collate(small, large), training=True)
    images, thickness = out["inputs"]
    assert images.shape == (2, 1, 3, 64, 96)
    assert (images[0, :, :, 40:] == -50).all() and (images[1, :, :, :, 70:] == -50).all()
    assert thickness.tolist() == [2.0, float("inf")]
    for data in out["data_samples"]:
        assert data.batch_input_shape == (64, 96)
        assert data.gt_instances.masks.masks.shape == (1, 64, 96)
        assert data.gt_instances.masks.masks[0, 20:40, 16:40].all()


def test_a_divisor_divides_what_the_window_gives():
    volume, data = sample()
    own = dict(low=-1024, high=3071, shift=114.5)
    images = CTDataPreprocessor(**own)(collate((volume, data)))["inputs"][0]
    divided = CTDataPreprocessor(**own, divisor=57.6)(collate((volume, data)))["inputs"][0]
    expected = (volume.double().clamp(-1024, 3071) + 1024) / 4095 * 255 - 114.5
    torch.testing.assert_close(images, expected.float()[None], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(divided, images / 57.6)
    with pytest.raises(ValueError, match="divisor must be > 0, got 0"):
        CTDataPreprocessor(divisor=0)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_bad_thickness_is_named(bad):
    with pytest.raises(ValueError, match=r"a/001.png.*thickness_mm"):
        CTDataPreprocessor()(collate(sample(thickness=bad)))


def test_unequal_depth_is_refused():
    with pytest.raises(ValueError, match="equal depth"):
        CTDataPreprocessor()(collate(sample(slices=3), sample(slices=7)))


def test_window_must_be_ordered():
    with pytest.raises(ValueError, match="low < high"):
        CTDataPreprocessor(low=100, high=100)


def build(path):
    config = read_experiment(ROOT / path)
    import_modules_from_strings(**config.custom_imports)
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")
    backbone = config.model.backbone
    backbone.init_cfg = None
    # Fewer RoIs than the recipe: its mask head alone would take most of the test's time.
    config.model.train_cfg.rcnn.sampler.num = 8
    config.model.test_cfg.rcnn.max_per_img = 3
    config.model.test_cfg.rpn.max_per_img = 100
    # Of 2048 outputs, 50 million weights, which take long to draw.
    config.model.roi_head.bbox_head.fc_out_channels = 64
    if "base_channels" not in backbone and backbone.type == "TorchvisionResNet":
        # A narrow network; depth and parts are the config's.
        backbone.base_channels = 8
        config.model.neck.in_channels = [c // 8 for c in config.model.neck.in_channels]
    return MODELS.build(config.model), config


def slow_but_one(path):
    """Of the experiments on 7 slices, which take long, one is run always."""
    long = path.endswith("_7slice.py") and path != "configs/alignshift_7slice.py"
    return pytest.param(path, marks=pytest.mark.slow) if long else path


@pytest.mark.parametrize("path", [slow_but_one(path) for path in CONFIGS + DEMOS + ATTENTION])
def test_every_config_runs_forward_and_backward(path):
    torch.manual_seed(0)
    model, config = build(path)
    slices, masks = config.model.num_slices, "mask_head" in config.model.roi_head
    # A deformable convolution's map must not be smaller than its kernel, nor have mmdet's RPN a
    # level of one anchor.
    size = 96 if config.model.backbone.get("dcn") or path in DEMOS else 64
    batch = collate(
        sample(size, size, slices, thickness=1.0),
        sample(size, size, slices, thickness=float("inf"), lesions=0),
    )
    model.train()
    data = model.data_preprocessor(batch, training=True)
    losses = model(**data, mode="loss")
    total, values = model.parse_losses(losses)
    assert all(torch.isfinite(v).all() for v in values.values())
    assert values["loss_mask"] > 0 if masks else "loss_mask" not in values
    total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient reaches {without}"

    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(batch), mode="predict")
    assert len(results) == 2
    for result in results:
        found = result.pred_instances
        assert len(found) <= 3
        assert not masks or found.masks.shape[1:] == (size, size)


def check_two_stages(model):
    """The network's section of the AlignShift and A3D papers and of their released code."""
    rpn, head, mask = model.rpn_head, model.roi_head.bbox_head, model.roi_head.mask_head
    generator = rpn.anchor_generator
    assert [s * generator.strides[0] for s in generator.scales] == [16, 24, 32, 48, 96, 192]
    assert generator.strides == [4] and generator.ratios == [0.5, 1, 2]
    assert (rpn.in_channels, rpn.feat_channels) == (512, 512)
    losses = rpn.loss_bbox, head.loss_bbox
    assert [(loss.type, loss.beta) for loss in losses] == [
        ("SmoothL1Loss", pytest.approx(1 / 9)), ("SmoothL1Loss", 1),
    ]  # fmt: skip
    losses = rpn.loss_cls, head.loss_cls
    assert [(loss.type, loss.use_sigmoid) for loss in losses] == [
        ("CrossEntropyLoss", True), ("CrossEntropyLoss", False),
    ]  # fmt: skip
    assert mask.loss_mask.type == "SoftDiceMaskLoss"
    weights = [part.loss_weight for part in (*losses, rpn.loss_bbox, head.loss_bbox)]
    assert [*weights, mask.loss_mask.loss_weight] == [1] * 5
    assert head.type == "Shared2FCBBoxHead" and head.fc_out_channels == 2048
    assert rpn.bbox_coder.target_stds == [1, 1, 1, 1]
    assert head.bbox_coder.target_stds == [0.1, 0.1, 0.2, 0.2]
    assert (mask.num_convs, mask.conv_out_channels) == (4, 256)
    extractors = model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor
    layers = [part.roi_layer for part in extractors]
    assert [(e.output_size, e.sampling_ratio) for e in layers] == [(7, 2), (14, 2)]

    train, test = model.train_cfg, model.test_cfg
    names = ("pos_iou_thr", "neg_iou_thr", "min_pos_iou", "match_low_quality")
    assigned = [[part.assigner[name] for name in names] for part in (train.rpn, train.rcnn)]
    assert assigned == [[0.7, 0.3, 0.3, True], [0.5, 0.5, 0.5, False]]
    names = ("type", "num", "pos_fraction", "add_gt_as_proposals")
    sampled = [[part.sampler[name] for name in names] for part in (train.rpn, train.rcnn)]
    assert sampled == [["RandomSampler", 32, 0.5, False], ["RandomSampler", 64, 0.25, True]]
    assert (train.rpn.allowed_border, train.rcnn.mask_size) == (0, 28)
    names = ("nms_pre", "max_per_img", "nms")
    proposals = [[part[name] for name in names] for part in (train.rpn_proposal, test.rpn)]
    suppression = dict(type="nms", iou_threshold=0.7)
    assert proposals == [[12000, 2000, suppression], [6000, 300, suppression]]
    assert (test.rcnn.score_thr, test.rcnn.max_per_img) == (0.001, 50)
    assert test.rcnn.nms == dict(type="nms", iou_threshold=0.5)


@pytest.mark.parametrize("path", CONFIGS)
def test_configs_hold_the_recipe_of_the_papers(path):
    config = read_experiment(ROOT / path)
    slices = int(path.split("_")[-1][0])
    policy = "keep_thick" if "align" in path else "normalize"
    for split in ("train", "val", "test"):
        dataset = config[f"{split}_dataloader"].dataset
        assert dataset.stack == dict(
            num_slices=slices, policy=policy, target_mm=2.0, interpolation="exact"
        )
        assert dataset.pipeline[-2].size == 512
    assert config.model.num_slices == slices
    window = {k: v for k, v in config.model.data_preprocessor.items() if k != "type"}
    edges = CTDataPreprocessor(**window).window(torch.tensor([-2000.0, -1024, 513, 2050, 3000]))
    assert edges.tolist() == pytest.approx([-50, -50, 77.5, 205, 205], abs=1e-4)
    backbone = config.model.backbone
    assert backbone.stem == ("tile" if "25d" in path else "middle")
    assert backbone.get("slices_as_channels", False) == ("25d" in path)
    assert backbone.init_cfg.checkpoint.endswith("/densenet121-a639ec97.pth")
    check_two_stages(config.model)
    assert config.train_dataloader.batch_size == config.auto_scale_lr.base_batch_size == 8
    optimizer, clip = config.optim_wrapper.optimizer, config.optim_wrapper.clip_grad
    assert optimizer.type == "SGD"
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.02, 0.9, 1e-4)
    assert (clip.max_norm, clip.norm_type) == (35, 2)
    assert config.train_cfg.max_epochs == 20
    warm_up, drops = config.param_scheduler
    assert (warm_up.start_factor, warm_up.begin, warm_up.end) == (0.01, 0, 500)
    assert warm_up.type == "LinearLR" and not warm_up.by_epoch
    assert drops.milestones == ([10, 13] if "acs" in path else [9, 16])
    assert drops.gamma == 0.1 and drops.by_epoch


@pytest.mark.parametrize("path", [path for path in ATTENTION if path not in LITS])
def test_configs_hold_the_recipe_of_volumetric_attention(path):
    config = read_experiment(ROOT / path)
    attention = config.model.get("attention")
    slices = 9 if attention else 3
    name = path.split("/")[-1].removesuffix(".py")
    assert bool(attention) == name.endswith(("_va", "_vca", "_vsa"))
    if attention:
        kept = attention.get("channel", True), attention.get("spatial", True)
        assert kept == (not name.endswith("_vsa"), not name.endswith("_vca"))
    for split in ("train", "test"):
        dataset = config[f"{split}_dataloader"].dataset
        assert dataset.stack == dict(
            num_slices=slices, policy="normalize", target_mm=2.0, interpolation="exact"
        )
        assert dataset.pipeline[-2].size == 512
    assert config.train_dataloader.dataset.pipeline[2].prob == 0
    files = config.train_dataloader.dataset.ann_file
    assert files == ["annotations/train.json", "annotations/val.json"]
    assert config.test_dataloader.dataset.ann_file == "annotations/test.json"
    assert config.val_dataloader is None and config.val_evaluator is None
    backbone = config.model.backbone
    assert f"_r{backbone.depth}" in name and f"resnet{backbone.depth}-" in str(backbone.init_cfg)
    assert ("deformable" in name) == (backbone.get("stage_with_dcn") == (False, True, True, True))
    assert config.model.rpn_head.anchor_generator.scales == [4]
    sampled = [config.model.train_cfg[part].sampler.num for part in ("rpn", "rcnn")]
    assert sampled == [256, 512] and config.model.test_cfg.rcnn.score_thr == 0.05
    optimizer, clip = config.optim_wrapper.optimizer, config.optim_wrapper.clip_grad
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.02, 0.9, 1e-4)
    assert clip.max_norm == 35
    assert config.train_dataloader.batch_size == config.auto_scale_lr.base_batch_size == 16
    assert config.train_cfg.max_epochs == 12
    warm_up, drops = config.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (1 / 3, 500) and drops.milestones == [8, 11]


@pytest.mark.parametrize("path", LITS)
def test_configs_hold_the_recipe_of_volumetric_attention_on_lits(path):
    config = read_experiment(ROOT / path)
    with_attention = path.endswith("_va.py")
    assert bool(config.model.get("attention")) == with_attention
    for split, steps in (("train", 4), ("test", 1)):
        dataset = config[f"{split}_dataloader"].dataset
        slices = 27 if with_attention else 3
        assert dataset.stack == dict(num_slices=slices, policy="normalize", target_mm=1.5)
        assert dataset.pipeline[-2].size == 1024
        assert dataset.get("background_step", 1) == steps
    preprocessor = dict(config.model.data_preprocessor)
    low, mean, high = torch.tensor([[-200.0], [50.0], [400.0]])
    window = CTDataPreprocessor(**{k: v for k, v in preprocessor.items() if k != "type"}).window
    # [0, 1], less ImageNet's mean and over its deviation.
    expected = [(x - 0.449) / 0.2259 for x in (0, 0.5, 1)]
    assert [float(window(hu)) for hu in (low, mean, high)] == pytest.approx(expected, abs=2e-3)
    heads = config.model.roi_head.bbox_head, config.model.roi_head.mask_head
    assert [head.num_classes for head in heads] == [2, 2]
    assert config.model.rpn_head.anchor_generator.scales == [8]
    assert config.train_dataloader.dataset.ann_file == "annotations/train.json"
    assert config.test_dataloader.dataset.ann_file == "annotations/val.json"
    assert config.test_evaluator.type == "DiceMetric" and config.val_dataloader is None
    assert config.train_dataloader.batch_size == config.auto_scale_lr.base_batch_size == 16


def test_there_is_an_experiment_for_every_operator_and_depth():
    operators = defaultdict(set)
    for path in CONFIGS:
        config = read_experiment(ROOT / path)
        operators[config.stack.num_slices].add(config.model.backbone.fusion.type)
    assert operators == {3: set(OPERATORS), 7: set(OPERATORS)}


@pytest.mark.parametrize("name", ["a3d", "25d", "alignshift"])
def test_the_number_of_slices_is_changed_in_one_place(name):
    path = str(ROOT / f"configs/{name}_3slice.py")
    config = load_config(path, {"stack.num_slices": 5, "model.backbone.init_cfg": None})
    stacks = [config[f"{s}_dataloader"].dataset.stack for s in ("train", "val", "test")]
    assert [stack.num_slices for stack in stacks] == [5, 5, 5]
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(config.model)
        maps = model.extract_feat((torch.empty(2, 1, 5, 64, 64), torch.empty(2)))
    assert maps[0].shape == (2, 512, 16, 16)


def test_a_part_with_another_number_of_slices_is_refused():
    path = str(ROOT / "configs/a3d_3slice.py")
    for override in ("model.neck.num_slices", "model.backbone.fusion.num_slices"):
        config = load_config(path, {override: 5, "model.backbone.init_cfg": None})
        init_default_scope("mmdet")
        with pytest.raises(ValueError, match=f"{override[6:]}=5, but .* needs 3"):
            MODELS.build(config.model)
    for override in (
        "model.num_slices",
        "test_dataloader.dataset.stack",
        "train_dataloader.dataset.pipeline.2.size",
    ):
        value = dict(num_slices=7) if override.endswith("stack") else 7
        with pytest.raises(ConfigError, match=r"is 7, but .* set (stack|resize)\."):
            load_config(path, {override: value})


def test_a_backbone_that_lacks_its_operator_is_refused_by_itself():
    """Failed before: a KeyError of the detector."""
    config = load_config(str(ROOT / "configs/a3d_3slice.py"), {"model.backbone.init_cfg": None})
    del config.model.backbone["fusion"]
    init_default_scope("mmdet")
    with pytest.raises(ConfigError, match=r"^TruncatedDenseNet3D: .*'fusion'"), refused_by_parts():
        MODELS.build(config.model)


@pytest.mark.parametrize(
    "options",
    [{"model.neck.in_channels": (36, 30)}, {"model.backbone.block_config": (1, 1)}],
)
def test_a_neck_for_other_maps_than_the_backbones_is_refused(options):
    init_default_scope("mmdet")
    with pytest.raises(ValueError, match=r"neck\.in_channels=.*the backbone's maps have"):
        MODELS.build(config_of(**options).model)


def test_roi_align_of_the_detector_changes_no_result_and_no_config():
    """The detector hands its channels-last map on; RoIAlign must read it as what it is."""
    config = read_experiment(ROOT / "configs/demo/alignshift_3slice.py")
    import_modules_from_strings(**config.custom_imports)
    heads = config.model.roi_head
    before = copy.deepcopy([heads.bbox_roi_extractor, heads.mask_roi_extractor])
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config.model).eval()
    assert [heads.bbox_roi_extractor, heads.mask_roi_extractor] == before
    rois = torch.tensor([[0, 8.0, 16.0, 24.0, 40.0], [0, 0.0, 0.0, 64.0, 64.0]])
    inputs = model.data_preprocessor(collate(sample()))["inputs"]
    with torch.no_grad():
        (x,) = model.extract_feat(inputs)
    assert not x.is_contiguous()
    (recorded,) = model.extract_feat(inputs)
    assert recorded.is_contiguous()
    heads = model.roi_head
    for part, size in ((heads.bbox_roi_extractor, 7), (heads.mask_roi_extractor, 14)):
        ratio = part.roi_layers[0].sampling_ratio
        expected = RoIAlign(size, 0.25, ratio)(recorded, rois)
        with torch.no_grad():
            found = part([x], rois)
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


class DoubledMaps(TruncatedDenseNet3D):
    def forward(self, images, thickness=None):
        return tuple(2 * x for x in super().forward(images, thickness))


class BareBackbone(torch.nn.Module):
    """Any registered one: it has a `forward` and no `maps`."""

    def __init__(self, backbone):
        super().__init__()
        self.inner = backbone

    def forward(self, images, thickness):
        return self.inner(images, thickness)


class IndexingNeck(KeySliceFPN):
    def forward(self, features):
        return super().forward([features[level] for level in range(len(features))])


def double(module, inputs, outputs):
    return tuple(2 * x for x in outputs)


def indexed(module, inputs):
    return ([inputs[0][level] for level in range(3)],)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.backbone, "__class__", DoubledMaps),
        lambda model: setattr(model, "backbone", BareBackbone(model.backbone)),
        lambda model: model.backbone.register_forward_hook(double),
        lambda model: setattr(model.neck, "__class__", IndexingNeck),
        lambda model: model.neck.register_forward_pre_hook(indexed),
    ],
    ids=["forward", "no maps", "hook", "neck", "hook of the neck"],
)
def test_parts_of_the_users_are_called_at_inference_as_in_training(change):
    """Failed before: a CPU took the backbone's `maps`, and handed them over one by one."""
    model, _ = build("configs/demo/alignshift_3slice.py")
    model.eval()
    change(model)
    images, thickness = model.data_preprocessor(collate(sample(), sample(seed=1)))["inputs"]
    (expected,) = model.extract_feat((images, thickness))
    slices = images.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        (found,) = model.extract_feat((images, thickness))
        (shared,) = model.extract_feat(
            model.inputs_of(slices, torch.arange(6).reshape(2, 3), thickness)
        )
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    torch.testing.assert_close(shared, expected, rtol=0, atol=atol)
