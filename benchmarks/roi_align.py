"""RoIAlign on a CPU where autograd does not record: ours on the channels-last map that the neck
makes there, against mmcv's on the same map in NCHW memory."""

from __future__ import annotations

import math

import torch
from mmcv.ops import RoIAlign
from torch import Tensor

from benchmarks import plain
from benchmarks.measure import Case
from mmdet_ext.models.roi_align import InferenceRoIAlign

# Of the detector of the papers: proposals to the box head, detections to the mask head.
SIZES = ((300, 7, 2), (50, 14, 2), (10, 14, 2), (300, 7, 0))


def cases(size: int = 512, channels: int = 512) -> list[Case]:
    found = []
    for number, bins, ratio in SIZES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, channels, size // 4, size // 4, generator=generator)
        rois = of_sides(anchor_sides(number, generator), size, generator)
        name = f"{number} RoIs, {bins} x {bins}, sampling_ratio={ratio}"
        found.append(case(name, x, rois, bins, ratio))
    return found


def case(name: str, x: Tensor, rois: Tensor, bins: int, ratio: int) -> Case:
    last = x.contiguous(memory_format=torch.channels_last)
    options = dict(output_size=bins, spatial_scale=0.25, sampling_ratio=ratio)
    ours, mmcvs = InferenceRoIAlign(**options), RoIAlign(**options)
    return Case(
        name,
        plain.at_inference(lambda: ours(last, rois)),
        plain.at_inference(lambda: mmcvs(x, rois)),
        close,
    )


def anchor_sides(number: int, generator: torch.Generator) -> Tensor:
    """(N, 2) from 16 to 192 px, as the anchors have, as many in each octave."""
    return 16 * torch.exp(math.log(12) * torch.rand(number, 2, generator=generator))


def of_sides(sides: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(N, 5) regions of (N, 2) sides, anywhere in an image."""
    centres = size * torch.rand(len(sides), 2, generator=generator)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1).clamp(0, size)
    return torch.cat([torch.zeros(len(sides), 1), boxes], dim=1)


def close(ours: Tensor, baseline: Tensor) -> None:
    """Equal to 1e-5 of the largest value."""
    torch.testing.assert_close(ours, baseline, rtol=0, atol=1e-5 * baseline.abs().max().item())
