"""The operators: each against its formula on 5-D tensors, and in the backbone against no fusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import plain, train_step, twins
from benchmarks.measure import Case
from mmdet_ext.ops import OPERATORS, build_conv3d

# In and out channels and kernel of a dense layer's two convolutions, second block.
LAYERS = ((304, 128, 1), (128, 32, 3))


def cases(
    num_slices: int = 7,
    size: int = 64,
    image_size: int = 256,
    names: Sequence[str] = tuple(sorted(OPERATORS)),
) -> list[Case]:
    """`size`: of the maps; `image_size`: of the backbone's volumes. At inference, but for the last
    cases: a training step of 3 slices. The baseline of a backbone is the one of `SliceConv`."""
    fused = [name for name in names if name != "SliceConv"]
    return [
        *(_alone(name, *layer, num_slices, size) for layer in LAYERS for name in names),
        *(_in_backbone(name, num_slices, image_size) for name in fused),
        *(_in_training(name, 3, image_size) for name in fused),
    ]


def _alone(
    name: str, channels: int, out_channels: int, kernel: int, slices: int, size: int
) -> Case:
    torch.manual_seed(0)
    options = twins.config(name, slices)
    conv = build_conv3d(options, channels, out_channels, kernel, padding=kernel // 2, bias=False)
    conv = conv.to(plain.DEVICE)
    x = torch.randn(1, channels, slices, size, size, device=plain.DEVICE)
    thickness = torch.tensor([5.0], device=plain.DEVICE)
    ours = x.contiguous(memory_format=torch.channels_last_3d)
    return Case(
        f"{name} {kernel} x {kernel}, {channels} -> {out_channels}",
        plain.at_inference(lambda: conv(ours, thickness)),
        plain.at_inference(lambda: twins.plain(conv, x, thickness)),
        plain.close,
        memory=True,
    )


def _in_backbone(name: str, slices: int, size: int) -> Case:
    def run(operator: str):
        backbone, neck = plain.build(operator, slices)
        backbone.eval(), neck.eval()
        images, thickness = plain.volumes(1, slices, size)
        return plain.at_inference(lambda: neck(backbone.maps(images, thickness))[0])

    return Case(f"{name} backbone, to SliceConv's", run(name), run("SliceConv"), same_shape)


def _in_training(name: str, slices: int, size: int) -> Case:
    def run(operator: str):
        parts, inputs = plain.build(operator, slices), plain.volumes(1, slices, size)
        return lambda: train_step.step(train_step.network, parts, inputs)[0]

    return Case(f"{name} training, to SliceConv's", run(name), run("SliceConv"), same_shape)


def same_shape(ours: Tensor, baseline: Tensor) -> None:
    """Different operators have different results."""
    assert ours.shape == baseline.shape and ours.isfinite().all() and baseline.isfinite().all()
