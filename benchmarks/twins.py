"""Every operator as its formula says, on 5-D tensors with PyTorch's own functions: what the
tests hold it to and its speed is measured against. An operator of this repository has a twin here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_ext.ops import OPERATORS, SliceConv


class Twin(NamedTuple):
    """
    Attributes:
        function: (operator, (B, C, D, H, W), (B,) mm) -> (B, C', D, H', W'), with the operator's
            parameters.
        variants: options of the operator under which the tests compare the two.
    """

    function: Callable[[SliceConv, Tensor, Tensor | None], Tensor]
    variants: tuple[dict, ...]


TWINS: dict[str, Twin] = {}


def twin(operator: str, *variants: dict) -> Callable:
    """Decorator of the twin of `operator`; without variants it is compared without options."""

    def add(function: Callable) -> Callable:
        TWINS[operator] = Twin(function, variants or ({},))
        return function

    return add


def plain(conv: SliceConv, x: Tensor, thickness: Tensor | None = None) -> Tensor:
    """What `conv` computes: (B, C, D, H, W) and (B,) mm -> (B, C', D, H', W')."""
    if type(conv).__name__ not in TWINS:
        raise ValueError(f"{type(conv).__name__} has no twin yet: write it in benchmarks/twins.py")
    return TWINS[type(conv).__name__].function(conv, x, thickness)


def config(operator: str, num_slices: int, options: dict | None = None) -> dict:
    """`operator` as a config has it, with its D if it asks for one."""
    asks = "num_slices" in inspect.signature(OPERATORS[operator]).parameters
    return dict(type=operator, **(options or {}), **({"num_slices": num_slices} if asks else {}))


@twin("SliceConv")
def no_fusion(conv, x, thickness):
    return conv3d(conv, x, conv.weight.unsqueeze(2))


@twin("I3DConv")
def i3d(conv, x, thickness):
    return conv3d(conv, x, conv.weight)


@twin("P3DConv")
def p3d(conv, x, thickness):
    y = conv3d(conv, x, conv.weight.unsqueeze(2))
    before = (conv.depth_weight.shape[2] - 1) // 2
    after = conv.depth_weight.shape[2] - 1 - before
    if before != after:
        y, before = F.pad(y, (0, 0, 0, 0, before, after)), 0
    return F.conv3d(y, conv.depth_weight, padding=(before, 0, 0), groups=conv.groups)


@twin("ACSConv")
def acs(conv, x, thickness):
    def seen(view, x, weight, groups):
        return conv3d(conv, x, in_view(conv, weight, view), bias=False, groups=groups)

    return in_thirds(conv, x, seen)


@twin("AlignACSConv")
def align_acs(conv, x, thickness):
    size = conv.kernel_size[0]

    def seen(view, x, weight, groups):
        kernel = in_view(conv, weight, view)
        if view == 0 or size == 1:
            return conv3d(conv, x, kernel, bias=False, groups=groups)
        return sum(
            conv3d(conv, virtual(conv, x, thickness, tap - (size - 1) // 2),
                   kernel[:, :, tap : tap + 1], bias=False, groups=groups)
            for tap in range(size)
        )  # fmt: skip

    return in_thirds(conv, x, seen)


def virtual(conv: SliceConv, x: Tensor, thickness: Tensor, offset: int) -> Tensor:
    """Instead of each slice what lies `offset` times the reference thickness, but no more than
    `offset` slices, further on: interpolated linearly, zeros beyond the ends."""
    out = torch.zeros_like(x)
    for b, mm in enumerate(thickness.tolist()):
        for d in range(x.shape[2]):
            place = d + offset * min(conv.ref_thickness / mm, 1)
            for e in range(x.shape[2]):
                if abs(place - e) < 1:
                    out[b, :, d] += (1 - abs(place - e)) * x[b, :, e]
    return out


@twin("MeanACSConv")
def mean_acs(conv, x, thickness):
    views = [conv3d(conv, x, in_view(conv, conv.weight, v), bias=False) for v in range(3)]
    return add_bias(conv, sum(views) / 3)


@twin("SoftACSConv")
def soft_acs(conv, x, thickness):
    if conv.view_weight is None:  # a 1 x 1 kernel is the same in all views
        return conv3d(conv, x, conv.weight.unsqueeze(2))
    shares = F.softmax(conv.view_weight, dim=1)
    views = [conv3d(conv, x, in_view(conv, conv.weight, v), bias=False) for v in range(3)]
    return add_bias(conv, sum(shares[:, v].view(-1, 1, 1, 1) * views[v] for v in range(3)))


@twin("TSMConv", dict(n_fold=3))
def tsm(conv, x, thickness):
    return conv3d(conv, shift(conv, x, zero_padding=True), conv.weight.unsqueeze(2))


@twin("AlignShiftConv", dict(n_fold=3), dict(n_fold=3, zero_padding=False))
def align_shift(conv, x, thickness):
    alpha = (conv.ref_thickness / thickness).clamp(0, 1).view(-1, 1, 1, 1, 1)
    mixed = alpha * shift(conv, x, conv.zero_padding) + (1 - alpha) * x
    return conv3d(conv, mixed, conv.weight.unsqueeze(2))


@twin("A3DConv")
def a3d(conv, x, thickness):
    mixed = torch.einsum("bcdhw,dkc->bckhw", x, conv.fusion_weight)
    return conv3d(conv, mixed, conv.weight.unsqueeze(2))


@twin("AlignA3DConv")
def align_a3d(conv, x, thickness):
    alpha = (conv.ref_thickness / thickness).clamp(0, 1).view(-1, 1, 1, 1, 1)
    mixed = torch.einsum("bcdhw,dkc->bckhw", x, conv.fusion_weight)
    return conv3d(conv, alpha * mixed + (1 - alpha) * x, conv.weight.unsqueeze(2))


def in_thirds(conv: SliceConv, x: Tensor, seen: Callable[..., Tensor]) -> Tensor:
    """The output channels in three near-equal parts, axial, coronal and sagittal:
    `seen` of (view, input, weight, groups) for each."""
    share = [(conv.out_channels * part + 2) // 3 for part in range(4)]
    depthwise = conv.groups > 1
    if depthwise:
        x = x.repeat_interleave(conv.out_channels // conv.in_channels, dim=1)
    parts = [
        seen(
            view,
            x[:, start:end] if depthwise else x,
            conv.weight[start:end],
            end - start if depthwise else 1,
        )
        for view, (start, end) in enumerate(pairwise(share))
        if start < end
    ]
    return add_bias(conv, torch.cat(parts, dim=1))


def shift(conv: SliceConv, x: Tensor, zero_padding: bool) -> Tensor:
    """One part in n_fold of the channels from the next slice, one from the slice before."""
    part = conv.in_channels // conv.n_fold
    out = torch.zeros_like(x) if zero_padding else x.clone()
    out[:, :part, :-1] = x[:, :part, 1:]
    out[:, part : 2 * part, 1:] = x[:, part : 2 * part, :-1]
    out[:, 2 * part :] = x[:, 2 * part :]
    return out


def in_view(conv: SliceConv, weight: Tensor, view: int) -> Tensor:
    """2D kernels in the axial (0), coronal (1) or sagittal (2) plane; 1 x 1 ones in the axial."""
    return weight.unsqueeze(2 if conv.kernel_size == (1, 1) else 2 + view)


def conv3d(
    conv: SliceConv, x: Tensor, weight: Tensor, bias: bool = True, groups: int | None = None
) -> Tensor:
    """`F.conv3d` of kernels (C', C / groups, kd, kh, kw) with the geometry of `conv`: an axis of
    one tap has it where the middle one, (K - 1) // 2, of a K x K kernel lies. Along depth the ends
    are padded with zeros, and D is kept.
    """
    left, right, top, bottom = conv.sides
    height, width = conv.dilation
    if weight.shape[3] < conv.kernel_size[0]:
        before = (conv.kernel_size[0] - 1) // 2
        top, bottom = top - height * before, bottom - height * (conv.kernel_size[0] - 1 - before)
    if weight.shape[4] < conv.kernel_size[1]:
        before = (conv.kernel_size[1] - 1) // 2
        left, right = left - width * before, right - width * (conv.kernel_size[1] - 1 - before)
    front = (weight.shape[2] - 1) // 2
    back = weight.shape[2] - 1 - front
    padding = (front, top, left)
    if (front, top, left) != (back, bottom, right) or min(padding) < 0:
        x, padding = F.pad(x, (left, right, top, bottom, front, back)), 0
    return F.conv3d(
        x, weight, conv.bias if bias else None, (1, *conv.stride), padding, (1, height, width),
        groups or conv.groups,
    )  # fmt: skip


def add_bias(conv: SliceConv, y: Tensor) -> Tensor:
    return y if conv.bias is None else y + conv.bias.view(-1, 1, 1, 1)
