"""Operations counted against formulas, and against Table 1 of the A3D paper."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.models.complexity import Complexity, count, detector_complexity, format_complexity
from mmdet_ext.ops import OPERATORS, build_conv3d

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


@pytest.mark.parametrize("slices", [3, 7])
def test_table_1_of_the_a3d_paper(slices, repository):
    paths = [f"configs/{name}_{slices}slice.py" for name in TABLE_1]
    run = subprocess.run(
        [sys.executable, "tools/complexity.py", *paths],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    backbones = re.findall(r"^backbone +(\S+) GFLOPs \(paper\)", run.stdout, re.M)
    assert dict(zip(TABLE_1, backbones)) == {name: row[slices] for name, row in TABLE_1.items()}
    for part in ("neck", "rpn_head", "bbox_head", "mask_head", "total"):
        assert len(re.findall(rf"^{part} ", run.stdout, re.M)) == len(paths)
    assert run.stdout.count("one more BatchNorm and ReLU") == 1, "P3D's figure is explained"


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
    own = dict(num_slices=3) if name == "A3DConv" else {}
    conv = build_conv3d(dict(type=name, **own), 16, 24, 3, padding=1, bias=False)
    result, out = count(conv.to("meta"), *meta(2, 16, 3, 8, 8), torch.ones(2, device="meta"))
    assert out.shape == (2, 24, 3, 8, 8)
    weights, pixels = 24 * 16 * 9, 2 * 3 * 8 * 8
    parameters = {
        "I3DConv": 3 * weights,
        "P3DConv": weights + 24 * 24 * 3,
        "A3DConv": weights + 9 * 16,
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
    # AlignShift: 2 + 2 of 16 channels, and the align factor of both volumes.
    mixing = {"A3DConv": 9 * 16 * 2 * 64, "AlignShiftConv": 4 * pixels + 2}
    if "Mean" not in name and "Soft" not in name:  # these also scale their kernels
        assert result.multiply_adds == flops.get(name, weights * pixels) + mixing.get(name, 0)


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


@pytest.mark.parametrize("arguments", [["--size", "100"], ["--size", "-32"], ["configs/none.py"]])
def test_bad_arguments_are_named(arguments, repository):
    run = subprocess.run(
        [sys.executable, "tools/complexity.py", "configs/acs_3slice.py", *arguments],
        cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "multiple of 32" in run.stderr or "configs/none.py" in run.stderr
