"""Slices in several HU windows, as channels of the network's input."""

import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from mmdet_ext.checkpoint import load_checkpoint_file
from mmdet_ext.config.check import ConfigError, refused_by_parts
from mmdet_ext.config.network import differences, network_of
from mmdet_ext.models.complexity import detector_complexity
from mmdet_ext.models.densenet import TruncatedDenseNet3D
from mmdet_ext.models.detectors import takes_num_slices
from mmdet_ext.models.preprocessor import CTDataPreprocessor
from mmdet_ext.ops import OPERATORS

from ..small_detector import ROOT, body_of, config_of, load_config, write_checkpoint
from .test_detectors import collate, sample

TINY = dict(growth=4, bn_size=2, block_config=(1, 1, 1), stem_channels=8)
WIDE, SOFT = (-1024, 2050), (-160, 240)


def test_one_window_is_low_and_high_bit_for_bit():
    batch = collate(sample(40, 64), sample(64, 70, seed=1))
    before = CTDataPreprocessor(low=-250, high=350)(batch)["inputs"][0]
    now = CTDataPreprocessor(windows=[(-250, 350)])(batch)["inputs"][0]
    assert now.shape == (2, 1, 3, 64, 96) and torch.equal(now, before)


def test_each_window_is_a_channel_of_its_own():
    batch = collate(sample(40, 64), sample(64, 70, seed=1))
    options = dict(shift=114.5, divisor=57.6)
    both = CTDataPreprocessor(windows=[WIDE, SOFT], **options)(batch)["inputs"][0]
    assert both.shape == (2, 2, 3, 64, 96)
    for channel, (low, high) in enumerate((WIDE, SOFT)):
        alone = CTDataPreprocessor(low, high, **options)(batch)["inputs"][0]
        assert torch.equal(both[:, channel], alone[:, 0])
    # What is added beside a smaller slice is air in every window.
    assert torch.allclose(both[0, :, :, 40:], torch.tensor(-114.5 / 57.6))


def test_windows_take_float_slices_and_leave_them_alone():
    hu = torch.tensor([-2000.0, -160, 40, 3000]).reshape(1, 1, 1, 1, 4)
    windows = CTDataPreprocessor(windows=[SOFT, WIDE], shift=0).window(hu)
    assert windows[0, 0].flatten().tolist() == pytest.approx([0, 0, 127.5, 255])
    assert windows[0, 1, 0, 0, 3] == pytest.approx(255) and hu[..., 0] == -2000


@pytest.mark.parametrize(
    "windows, message",
    [
        ([], "pairs"),
        ((-160, 240), "pairs"),
        ("wide", "pairs"),
        ([(-160, 240, 0)], "pairs"),
        ([WIDE, (240, 240)], r"low < high in HU, got \(240, 240\)"),
        ([("a", "b")], "low < high"),
        ([(0, float("nan"))], "low < high"),
    ],
)
def test_what_is_no_window_is_refused(windows, message):
    with pytest.raises(ValueError, match=message):
        CTDataPreprocessor(windows=windows)


def imagenet(network, channels=3):
    """Pretrained weights of random numbers, as torchvision's file has them."""
    weights = {k: torch.randn_like(v) * 0.1 for k, v in network.state_dict().items()
               if v.is_floating_point()}  # fmt: skip
    weights = {k: v.abs() + 0.5 if "running_var" in k else v for k, v in weights.items()}
    return {**weights, "conv0.weight": torch.randn(8, channels, 7, 7)}


@pytest.mark.parametrize("stem", ["middle", "sum"])
@pytest.mark.parametrize("windows", [2, 3])
@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_equal_windows_are_one_window_by_shared_out_kernels(operator, windows, stem):
    torch.manual_seed(0)
    fusion = dict(type=operator)
    if takes_num_slices(fusion):
        fusion["num_slices"] = 3
    one = TruncatedDenseNet3D(fusion, stem=stem, **TINY)
    several = TruncatedDenseNet3D(fusion, stem=stem, windows=windows, **TINY)
    weights = imagenet(TruncatedDenseNet3D(dict(type="SliceConv"), **TINY))
    for network in (one, several):
        network.load_imagenet(weights)
    own = {k: v for k, v in one.state_dict().items() if k != "conv0.weight"}
    several.load_state_dict(own, strict=False)  # parameters that are the operator's own
    x, thickness = torch.randn(2, 1, 3, 32, 32), torch.tensor([1.0, 5.0])
    for network in (one.eval(), several.eval()):
        network.requires_grad_(False)
    for a, b in zip(one(x, thickness), several(x.expand(-1, windows, -1, -1, -1), thickness)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_slices_as_channels_come_one_after_the_other_each_in_its_windows():
    torch.manual_seed(0)
    options = dict(fusion=dict(type="SliceConv"), in_channels=5, slices_as_channels=True, **TINY)
    network = TruncatedDenseNet3D(windows=2, stem="tile", **options)
    plain = TruncatedDenseNet3D(stem="tile", **options)
    weights = imagenet(plain)
    plain.load_imagenet(weights)
    network.load_imagenet(weights)
    for slice_ in range(5):
        for window in range(2):
            expected = plain.conv0.weight[:, slice_] / 2
            assert torch.equal(network.conv0.weight[:, 2 * slice_ + window], expected)
    x = torch.randn(2, 2, 5, 32, 32)
    found = network.eval().conv0(
        torch.stack([x[:, w, d] for d in range(5) for w in range(2)], dim=1)[:, :, None]
    )
    x_in = []
    network.conv0.register_forward_pre_hook(lambda _, args: x_in.append(args[0]))
    network(x)
    assert torch.equal(network.conv0(x_in[0]), found)
    with pytest.raises(ValueError, match=r"expected a volume of shape \(B, 2, 5, H, W\)"):
        network(x[:, :1])


def test_the_detector_gets_its_channels_from_the_windows(tmp_path):
    config, one = (
        config_of(**{"model.data_preprocessor.windows": [SOFT] * number}) for number in (2, 1)
    )
    weights = load_checkpoint_file(write_checkpoint(one, tmp_path / "one.pth"))["state_dict"]
    body = torch.from_numpy(body_of(3)[None, :, 16:112, 16:112])
    found = []
    for number, each in enumerate((one, config), 1):
        stem = weights["backbone.conv0.weight"]
        model = MODELS.build(each.model).eval()
        shared = {"backbone.conv0.weight": stem.repeat(1, number, 1, 1) / number}
        model.load_state_dict({**weights, **shared})
        with torch.no_grad():
            found.append(model.test_step(collate((body, sample(96, 96)[1])))[0].pred_instances)
    assert len(found[0]) > 0
    torch.testing.assert_close(found[1].bboxes, found[0].bboxes, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(found[1].scores, found[0].scores, atol=1e-4, rtol=1e-3)
    whole, plain = (detector_complexity(c)["backbone"] for c in (config, config_of()))
    stem = 24 * 7 * 7
    assert whole.parameters - plain.parameters == stem
    assert whole.multiply_adds - plain.multiply_adds == stem * 3 * 48 * 48


@pytest.mark.parametrize("slices", [3, 7])
def test_the_experiments_have_three_windows(slices):
    config = load_config(f"several_windows/a3d_{slices}slice")
    init_default_scope("mmdet")
    model = MODELS.build(config.model)
    assert model.backbone.conv0.weight.shape == (64, 3, 7, 7)
    volume, data = sample(slices=slices)
    inputs = model.data_preprocessor(collate((volume, data)))["inputs"][0]
    assert inputs.shape[:3] == (1, 3, slices)
    low, high = (
        torch.tensor(side).view(3, 1, 1, 1) for side in ((-1024, -160, -1350), (2050, 240, 150))
    )
    hu = volume.clamp(low, high).float()
    expected = (hu - low) / (high - low) * 255 - 50
    torch.testing.assert_close(inputs[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("windows, backbone", [([WIDE, SOFT], 3), ([WIDE], 2)])
def test_another_number_in_the_backbone_is_refused(windows, backbone):
    config = config_of(
        **{"model.data_preprocessor.windows": windows, "model.backbone.windows": backbone}
    )
    init_default_scope("mmdet")
    message = (
        f"backbone.windows={backbone}, but the detector's data_preprocessor.windows needs "
        f"{len(windows)}"
    )
    with pytest.raises(ConfigError, match=message), refused_by_parts():
        MODELS.build(config.model)


def test_low_and_high_are_nothing_beside_windows():
    """In a network as in the record of what it was trained as; who asks for one is told."""
    config = load_config("several_windows/a3d_3slice")
    other = copy.deepcopy(config)
    other.model.data_preprocessor.update(low=-200, high=300)
    assert differences(network_of(config), network_of(other)) == []
    other.model.data_preprocessor.windows = [WIDE, SOFT]
    (difference,) = differences(network_of(config), network_of(other))
    assert difference.path == "model.data_preprocessor.windows"
    path = "model.data_preprocessor.low"
    with pytest.raises(ConfigError, match=r"preprocessor\.windows is set, and takes the place"):
        load_config("several_windows/a3d_3slice", {path: -200})
    with pytest.raises(ConfigError, match=path):
        load_config("a3d_3slice", {path: -200, "model.data_preprocessor.windows": [WIDE, SOFT]})
    without = {path: -200, "model.data_preprocessor.windows": None}
    assert load_config("several_windows/a3d_3slice", without).model.data_preprocessor.low == -200


def test_volumetric_attention_takes_one_window():
    path = "configs/demo/volumetric_attention.py"
    config = load_config(str(ROOT / path), {"model.data_preprocessor.windows": [WIDE, SOFT]})
    init_default_scope("mmdet")
    with pytest.raises(ConfigError, match="windows must be one"), refused_by_parts():
        MODELS.build(config.model)
