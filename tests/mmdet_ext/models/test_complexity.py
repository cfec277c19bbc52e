"""Operations counted against formulas, and against Table 1 of the A3D paper."""

import functools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.engine.run import load_config
from mmdet_ext.models.complexity import (
    Complexity,
    count,
    detector_complexity,
    format_complexity,
    input_shape,
)
from mmdet_ext.ops import OPERATORS, SliceConv, build_conv3d
from tools import complexity as complexity_command

# A3D (MICCAI 2021), Table 1, "GFLOPs (3)" and "GFLOPs (7)".
TABLE_1 = {
    "nofusion": {3: "40.64", 7: "94.83"},
    "i3d": {3: "78.69", 7: "183.61"},
    "p3d": {3: "67.79", 7: "158.18"},
    "acs": {3: "40.64", 7: "94.83"},
    "tsm": {3: "40.64", 7: "94.83"},
    "alignshift": {3: "40.64", 7: "94.83"},
    "a3d": {3: "40.64", 7: "94.83"},
}


@pytest.fixture(scope="module")
def operators_page(repository):
    return (repository / "docs/operators.md").read_text()


def rows(page):
    table = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]


@pytest.fixture(scope="module")
def backbones(operators_page, repository):
    """GFLOPs and million parameters of every operator of the page, as printed."""
    printed = {}
    for row in rows(operators_page):
        for slices in (3, 7):
            name = row[1].strip("`")
            config = read_experiment(repository / f"configs/{name}_{slices}slice.py")
            text = format_complexity({"backbone": detector_complexity(config)["backbone"]})
            printed[name, slices] = re.match(PRINTED, text).groups()
    return printed


PRINTED = r"backbone +(\S+) GFLOPs \(paper\).*? (\S+) M parameters\n"


@pytest.mark.parametrize("slices", [3, 7])
def test_table_1_of_the_a3d_paper(slices, backbones):
    counted = {name: backbones[name, slices][0] for name in TABLE_1}
    assert counted == {name: row[slices] for name, row in TABLE_1.items()}


def test_the_operators_page_has_what_is_counted(operators_page, backbones):
    for row in rows(operators_page):
        three, seven = (backbones[row[1].strip("`"), slices] for slices in (3, 7))
        assert row[5:7] == [three[0], seven[0]]
        assert set(re.findall(r"\d+\.\d\d", row[4])) == {three[1], seven[1]}, row[0]


def test_the_command_prints_what_the_operators_page_shows(operators_page, repository):
    paths = ["configs/alignshift_3slice.py", "configs/p3d_3slice.py"]
    run = subprocess.run(
        [sys.executable, "tools/complexity.py", *paths],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = re.search(r"^\$ python tools/complexity.py .*?\n(.*?)^```", operators_page, re.M | re.S)
    assert run.stdout.startswith(shown[1])
    assert run.stdout.count("one more BatchNorm and ReLU") == 1, "P3D's figure is explained"
    assert run.stdout.index("one more") > run.stdout.index("p3d_3slice")


def test_a_size_of_nothing_is_refused(repository, monkeypatch):
    config = str(repository / "configs/nofusion_3slice.py")
    monkeypatch.setattr(sys, "argv", ["complexity", config, "--size", "0"])
    with pytest.raises(SystemExit, match="complexity: size must be a positive multiple of 32 px"):
        complexity_command.main()


def densenet_by_hand(slices, size, growth=32, blocks=(6, 12, 24)):
    """Multiply-adds and parameters of the backbone without fusion, layer by layer."""
    pixels = slices * (size // 2) ** 2
    macs, parameters = 49 * 64 * pixels, 49 * 64 + 2 * 64
    pixels //= 4
    channels = 64
    for block, layers in enumerate(blocks):
        if block:
            macs += channels * channels // 2 * pixels
            parameters += channels * channels // 2 + 2 * channels
            channels //= 2
            pixels //= 4
        for _ in range(layers):
            macs += (channels * 4 * growth + 4 * growth * growth * 9) * pixels
            parameters += channels * 4 * growth + 4 * growth * growth * 9
            parameters += 2 * channels + 2 * 4 * growth
            channels += growth
    return macs, parameters


def test_backbone_neck_and_heads_by_hand(repository):
    config = read_experiment(repository / "configs/nofusion_3slice.py")
    parts = detector_complexity(config, 256)
    macs, parameters = densenet_by_hand(3, 256)
    assert (parts["backbone"].multiply_adds, parts["backbone"].parameters) == (macs, parameters)
    squeezed = [(c, (256 // s) ** 2) for c, s in ((256, 4), (512, 8), (1024, 16))]
    assert parts["neck"].multiply_adds == sum(p * c * (3 * c + 512) for c, p in squeezed)
    assert parts["neck"].parameters == sum(c * (3 * c + 512) + 512 for c, _ in squeezed)
    anchors = 18
    assert parts["rpn_head"].multiply_adds == 64**2 * 512 * (9 * 512 + anchors + 4 * anchors)
    assert parts["bbox_head"].multiply_adds == 300 * 2048 * (512 * 49 + 2048 + 2 + 4)
    mask = 14**2 * 256 * 9 * (512 + 3 * 256) + 14**2 * 256 * 256 * 4 + 28**2 * 256
    assert parts["mask_head"].multiply_adds == 50 * mask


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_by_formula(name):
    """Overheads over no fusion of A3D, Table 1, and of ACS, Table III."""
    own = dict(num_slices=3) if "A3D" in name else {}
    conv = build_conv3d(dict(type=name, **own), 16, 24, 3, padding=1, bias=False)
    result, out = count(conv.to("meta"), *meta(2, 16, 3, 8, 8), torch.ones(2, device="meta"))
    assert out.shape == (2, 24, 3, 8, 8)
    weights, pixels = 24 * 16 * 9, 2 * 3 * 8 * 8
    parameters = {
        "I3DConv": 3 * weights,
        "P3DConv": weights + 24 * 24 * 3,
        "A3DConv": weights + 9 * 16,
        "AlignA3DConv": weights + 9 * 16,
        "SoftACSConv": weights + 24 * 3,
    }
    flops = {
        "I3DConv": 3 * weights * pixels,
        "P3DConv": (weights + 24 * 24 * 3) * pixels,
        # 9 taps axially, 9 in each of the other views: three convolutions instead of one
        "MeanACSConv": (weights + 2 * weights) * pixels,
        "SoftACSConv": (weights + 2 * weights) * pixels,
    }
    assert result.parameters == parameters.get(name, weights)
    assert result.paper_flops == flops.get(name, weights * pixels)
    mixing = {
        "A3DConv": 9 * 16 * 2 * 64,
        # 2 + 2 of 16 channels, and the align factor of both volumes
        "AlignShiftConv": 4 * pixels + 2,
        # as A3D, with a matrix blended for each volume
        "AlignA3DConv": 9 * 16 * 2 * 64 + 9 * 16 * 2 + 2,
        # 8 + 8 of 24 channels: two taps' shares of the slice itself, and of 2 of 3 neighbours
        "AlignACSConv": 2 * 8 * 2 * (pixels + pixels * 2 // 3) + 2 * 4 * 2 + 2,
    }
    if "Mean" not in name and "Soft" not in name:  # these also scale their kernels
        assert result.multiply_adds == flops.get(name, weights * pixels) + mixing.get(name, 0)


class EinsumMix(SliceConv):
    """Every slice a weighted sum of all."""

    def fuse(self, x, thickness):
        return torch.einsum("bcdhw,kd->bckhw", x, x.new_empty(x.shape[2], x.shape[2]))


class MatmulMix(EinsumMix):
    def fuse(self, x, thickness):
        weight = x.new_empty(x.shape[2], x.shape[2])
        return (weight @ x.flatten(3)).view(x.shape)


class BroadcastMix(EinsumMix):
    def fuse(self, x, thickness):
        weight = x.new_empty(x.shape[2], x.shape[2], 1, 1)
        return (weight * x.unsqueeze(2)).sum(3)


@pytest.mark.parametrize("operator", [EinsumMix, MatmulMix, BroadcastMix])
@pytest.mark.parametrize("inplace", [False, True])
def test_mixing_of_slices_is_not_in_the_papers_figures_however_it_is_written(operator, inplace):
    conv = nn.Sequential(operator(4, 6, 3, padding=1, bias=False)).to("meta")
    conv[0].forward = functools.partial(conv[0].forward, inplace=inplace)
    result, out = count(conv, *meta(2, 4, 3, 8, 8))
    macs, mixing = 2 * 3 * 64 * 6 * 4 * 9, 2 * 4 * 64 * 3 * 3
    assert out.shape == (2, 6, 3, 8, 8)
    assert (result.paper_flops, result.multiply_adds) == (macs, macs + mixing)
    again, _ = count(conv, *meta(2, 4, 3, 8, 8))
    assert again == result


MMDETECTION = Path(mmdet.__file__).parent / ".mim/configs"
# Convolutions of ResNet-50 on a 224 x 224 image, without the classifier: torchvision, 4.09 G.
RESNET50_MACS = 4_087_136_256
RESNET50_PARAMETERS = 25_557_032 - (2048 * 1000 + 1000)


def fpn_by_hand(cells, channels=(256, 512, 1024, 2048)):
    """Multiply-adds: a 1 x 1 and a 3 x 3 convolution to 256 channels a level."""
    return sum(n * 256 * (c + 9 * 256) for n, c in zip(cells, channels, strict=True))


def test_a_2d_two_stage_detector_without_masks():
    config = Config.fromfile(MMDETECTION / "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py")
    assert input_shape(config) == (3, 800, 800)
    parts = detector_complexity(config, 224)
    assert list(parts) == ["backbone", "neck", "rpn_head", "bbox_head"]
    assert parts["backbone"].multiply_adds == RESNET50_MACS
    assert parts["backbone"].parameters == RESNET50_PARAMETERS
    cells = [56**2, 28**2, 14**2, 7**2]
    assert parts["neck"].multiply_adds == fpn_by_hand(cells)
    cells.append(4**2)
    assert parts["rpn_head"].multiply_adds == sum(cells) * 256 * (9 * 256 + 3 + 12)
    box = 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 320)
    assert parts["bbox_head"].multiply_adds == 1000 * box


def test_a_2d_single_stage_detector():
    config = Config.fromfile(MMDETECTION / "retinanet/retinanet_r50_fpn_1x_coco.py")
    parts = detector_complexity(config, 256)
    assert list(parts) == ["backbone", "neck", "bbox_head"]
    assert parts["backbone"].multiply_adds * 49 == RESNET50_MACS * 64
    cells = [32**2, 16**2, 8**2]
    extra = 9 * 256 * (2048 * 4**2 + 256 * 2**2)
    assert parts["neck"].multiply_adds == fpn_by_hand(cells, (512, 1024, 2048)) + extra
    towers = 256 * 9 * (8 * 256 + 9 * 80 + 9 * 4)
    assert parts["bbox_head"].multiply_adds == (sum(cells) + 4**2 + 2**2) * towers


@pytest.mark.parametrize(
    "path, names",
    [
        ("cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py", "neck rpn_head bbox_head mask_head"),
        ("faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py", "rpn_head shared_head bbox_head"),
        ("swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "neck rpn_head bbox_head mask_head"),
    ],
)
def test_every_parameter_is_in_one_part(path, names):
    parts = detector_complexity(Config.fromfile(MMDETECTION / path), 64)
    assert list(parts) == ["backbone", *names.split()]


@pytest.mark.parametrize(
    "path, message",
    [
        ("detr/detr_r50_8xb2-150e_coco.py", "DETR is neither"),
        ("grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco.py", "parameters outside its backbone"),
        ("double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py", "model.roi_head.bbox_head: Double"),
    ],
)
def test_a_detector_that_cannot_be_counted_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        detector_complexity(Config.fromfile(MMDETECTION / path), 64)


def attention_complexity(repository, name, size=96, **overrides):
    path = str(repository / f"configs/volumetric_attention/{name}.py")
    return detector_complexity(load_config(path, overrides), size)


def test_a_deformable_convolution_is_a_plain_one_and_that_of_its_offsets(repository):
    plain = attention_complexity(repository, "faster_rcnn_r50")
    deformable = attention_complexity(repository, "deformable_faster_rcnn_r50")
    macs = parameters = 0
    for blocks, width, side in ((4, 128, 12), (6, 256, 6), (3, 512, 3)):
        parameters += blocks * (width * 9 + 1) * 18
        macs += blocks * width * 9 * 18 * side**2
    difference = deformable["backbone"].multiply_adds - plain["backbone"].multiply_adds
    assert difference == macs
    assert deformable["backbone"].parameters - plain["backbone"].parameters == parameters
    assert {k: v for k, v in deformable.items() if k != "backbone"} == {
        k: v for k, v in plain.items() if k != "backbone"
    }


def attention_by_hand(sides, bags=1, images=3, channels=256):
    """Multiply-adds of both attentions on maps of these sides: embeddings, the products with the
    target's, the weighted sums, last convolutions and gates."""
    hidden, total = channels // 16, 0
    for side in sides:
        places = side**2
        embeddings = (images + 1) * 2 * channels * hidden
        channel = embeddings + 2 * images * channels + channels**2 + channels * places
        spatial = (images + 1) * 2 * 49 * places + 2 * images * places + places + channels * places
        total += bags * (channel + spatial)
    return total


@pytest.mark.parametrize("name", ["faster_rcnn_r50_va", "mask_rcnn_r50_va"])
def test_volumetric_attention_is_counted_by_its_images(repository, name):
    plain = attention_complexity(repository, "faster_rcnn_r50")
    before = attention_complexity(repository, name)
    after = attention_complexity(repository, name, **{"model.attention_location": "rcnn"})
    for part in ("backbone", "neck"):
        assert before[part] == after[part]
        assert before[part].multiply_adds == 3 * plain[part].multiply_adds
        assert before[part].parameters == plain[part].parameters
    assert before["rpn_head"] == after["rpn_head"] == plain["rpn_head"]
    assert before["bbox_head"] == after["bbox_head"] == plain["bbox_head"]
    assert before["attention"].multiply_adds == attention_by_hand((24, 12, 6, 3, 2))
    assert before["attention"].parameters == 371_785
    regions, heads = attention_by_hand([7], 1000), 1
    if "mask" in name:
        regions, heads = regions + attention_by_hand([14], 100), 2
    assert after["attention"].multiply_adds == regions
    assert after["attention"].parameters == heads * 371_785 // 5


@pytest.fixture
def command(repository, monkeypatch):
    """Runs tools/complexity.py in this process."""

    def run(*arguments):
        monkeypatch.chdir(repository)
        monkeypatch.setattr(sys, "argv", ["tools/complexity.py", *map(str, arguments)])
        runpy.run_path("tools/complexity.py")["main"]()

    return run


def test_the_command_prints_a_2d_detector(command, capsys):
    command(MMDETECTION / "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "--size", 64)
    printed = capsys.readouterr().out
    assert "FasterRCNN, 3 x 64 x 64" in printed and "mask_head" not in printed


def test_the_number_of_slices_is_read_from_the_stack():
    dataset = dict(pipeline=[dict(type="RandomAffineResize", size=64)], stack=dict(num_slices=5))
    assert input_shape(Config(dict(test_dataloader=dict(dataset=dataset)))) == (5, 64, 64)


def test_images_that_are_not_square(repository, command, capsys):
    """All that depends on the size does so by its pixels. Failed before."""
    path = str(repository / "configs/nofusion_3slice.py")
    wide = detector_complexity(load_config(path, {"resize.size": [32, 96]}))
    square = detector_complexity(load_config(path, {"resize.size": 32}))
    for part in ("backbone", "neck", "rpn_head"):
        assert wide[part].multiply_adds == 3 * square[part].multiply_adds
    command(path, "--cfg-options", "resize.size=[32,96]")
    assert "SliceConv, 3 x 32 x 96\n" in capsys.readouterr().out


def meta(*shape):
    return (torch.empty(shape, device="meta"),)


@pytest.mark.parametrize(
    "layer, shape, macs, paper",
    [
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (1, 4, 9, 9), 6 * 16 * 2 * 9, 6 * 16 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 4, 4 * 25 * 6 * 4),
        (nn.Linear(10, 7), (3, 10), 210, 210),
        (nn.Linear(10, 7, bias=False), (3, 10), 210, 210),
        (nn.BatchNorm2d(4).eval(), (1, 4, 5, 5), 0, 200),
        (nn.ReLU(), (1, 4, 5, 5), 0, 100),
        (nn.ReLU(inplace=True), (1, 4, 5, 5), 0, 100),
        (nn.MaxPool2d(2), (1, 4, 6, 6), 0, 144),
        (nn.AvgPool2d(2), (1, 4, 6, 6), 0, 144),
    ],
)
def test_layers_by_the_convention(layer, shape, macs, paper):
    result, _ = count(layer.to("meta"), *meta(*shape))
    assert (result.multiply_adds, result.paper_flops) == (macs, paper)


def test_total_adds_the_parts():
    text = format_complexity(
        {"a": Complexity(1_500_000, 2_250_000_000, 1_000_000_000), "b": Complexity(0, 0, 10**10)}
    )
    line = " ".join(text.splitlines()[-1].split())
    assert line == "total 11.00 GFLOPs (paper) 2.25 G multiply-adds 1.50 M parameters"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "100"], "multiple of 32 px, got 100"),
        (["--size", "-32"], "multiple of 32 px, got -32"),
        (["configs/none.py", "--size", "32"], "configs/none.py"),
    ],
)
def test_bad_arguments_are_named(arguments, message, command):
    with pytest.raises(SystemExit, match=f"^complexity: .*{message}"):
        command("configs/acs_3slice.py", *arguments)
