"""The network as the papers write it down, on 5-D tensors: what speed is measured against, and an
oracle of the backbone and the neck.

Every function walks over one of our modules and uses its weights: `F.conv3d` with (1, K, K)
kernels on (B, C, D, H, W) tensors in PyTorch's default memory, slice copies for the shifts, an
einsum for A3D, `torch.cat` in dense blocks, norms as layers of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_ext.models.densenet import DenseLayer, TruncatedDenseNet3D
from mmdet_ext.models.neck import KeySliceFPN
from mmdet_ext.ops import SliceConv
from mmdet_ext.ops.a3d import A3DConv
from mmdet_ext.ops.acs import ACSConv, MeanACSConv, SoftACSConv
from mmdet_ext.ops.alignshift import AlignShiftConv
from mmdet_ext.ops.i3d import I3DConv
from mmdet_ext.ops.p3d import P3DConv
from mmdet_ext.ops.tsm import TSMConv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network(
    backbone: TruncatedDenseNet3D, neck: KeySliceFPN, images: Tensor, thickness: Tensor
) -> Tensor:
    """(B, C, D, H, W) volumes and (B,) mm -> (B, out_channels, H / 4, W / 4)."""
    x = F.relu(backbone.norm0(operator(backbone.conv0, images)), inplace=True)
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    maps = []
    for i in range(1, len(backbone.out_channels) + 1):
        if i > 1:
            transition = getattr(backbone, f"transition{i - 1}")
            x = operator(transition.conv, F.relu(transition.norm(x), inplace=True))
            x = F.avg_pool3d(x, (1, 2, 2))
        for layer in getattr(backbone, f"denseblock{i}").children():
            x = torch.cat([x, dense_layer(layer, x, thickness)], dim=1)
        maps.append(x)

    y = None
    for x, reduction, lateral, norm in reversed(
        list(zip(maps, neck.reductions, neck.laterals, neck.norms, strict=True))
    ):
        x = F.conv3d(x, reduction.weight).flatten(1, 2) if neck.num_slices > 1 else x.flatten(1, 2)
        x = norm(lateral(x))
        y = x if y is None else x + F.interpolate(y, scale_factor=2, mode="nearest")
    return y


def dense_layer(layer: DenseLayer, x: Tensor, thickness: Tensor) -> Tensor:
    y = operator(layer.conv1, F.relu(layer.norm1(x), inplace=True), thickness)
    return operator(layer.conv2, F.relu(layer.norm2(y), inplace=True), thickness)


def operator(conv: SliceConv, x: Tensor, thickness: Tensor | None = None) -> Tensor:
    """What `conv` computes: (B, C, D, H, W) and (B,) mm -> (B, C', D, H', W'); K odd."""
    if isinstance(conv, AlignShiftConv):
        return conv3d(conv, align_shift(conv, x, thickness), conv.weight)
    if isinstance(conv, TSMConv):
        return conv3d(conv, shift(conv, x, zero_padding=True), conv.weight)
    if isinstance(conv, A3DConv):
        x = torch.einsum("bcdhw,dkc->bckhw", x, conv.fusion_weight)
        return conv3d(conv, x, conv.weight)
    if isinstance(conv, I3DConv):
        return conv3d(conv, x, conv.weight)
    if isinstance(conv, P3DConv):
        taps = conv.depth_weight.shape[2]
        y = conv3d(conv, x, conv.weight)
        return F.conv3d(y, conv.depth_weight, padding=(taps // 2, 0, 0), groups=conv.groups)
    if isinstance(conv, (ACSConv, MeanACSConv)) and conv.kernel_size != (1, 1):
        return three_views(conv, x)
    if conv.convolve.__func__ in (SliceConv.convolve, ACSConv.convolve, MeanACSConv.convolve):
        return conv3d(conv, conv.fuse(x, thickness), conv.weight)
    raise ValueError(
        f"give {type(conv).__name__}, which has a convolution of its own, a plain form"
    )


def conv3d(conv: SliceConv, x: Tensor, weight: Tensor, view: int = 2, bias: bool = True) -> Tensor:
    """`F.conv3d` with a 4-D `weight` unsqueezed at `view`, or with a 5-D one."""
    weight = weight.unsqueeze(view) if weight.ndim == 4 else weight
    stride, dilation = (1, *conv.stride), (1, *conv.dilation)
    padding = tuple(
        (size - 1) * gap // 2 for size, gap in zip(weight.shape[2:], dilation, strict=True)
    )
    return F.conv3d(x, weight, conv.bias if bias else None, stride, padding, dilation, conv.groups)


def shift(conv: TSMConv, x: Tensor, zero_padding: bool) -> Tensor:
    part = conv.in_channels // conv.n_fold
    out = torch.zeros_like(x) if zero_padding else x.clone()
    out[:, :part, :-1] = x[:, :part, 1:]
    out[:, part : 2 * part, 1:] = x[:, part : 2 * part, :-1]
    out[:, 2 * part :] = x[:, 2 * part :]
    return out


def align_shift(conv: AlignShiftConv, x: Tensor, thickness: Tensor) -> Tensor:
    alpha = (conv.ref_thickness / thickness).clamp(0, 1).view(-1, 1, 1, 1, 1)
    return alpha * shift(conv, x, conv.zero_padding) + (1 - alpha) * x


def three_views(conv: SliceConv, x: Tensor) -> Tensor:
    if isinstance(conv, ACSConv):
        share = [(conv.out_channels * part + 2) // 3 for part in range(4)]
        parts = [conv.weight[share[i] : share[i + 1]] for i in range(3)]
        out = torch.cat([conv3d(conv, x, w, 2 + i, bias=False) for i, w in enumerate(parts)], 1)
    else:
        out = sum(
            weight.view(-1, 1, 1, 1) * conv3d(conv, x, conv.weight, 2 + i, bias=False)
            for i, weight in enumerate(view_weights(conv))
        )
    return out if conv.bias is None else out + conv.bias.view(-1, 1, 1, 1)


def view_weights(conv: MeanACSConv) -> Tensor:
    """(3, C') weights of the axial, coronal and sagittal view."""
    if isinstance(conv, SoftACSConv):
        return F.softmax(conv.view_weight, dim=1).T
    return conv.weight.new_full((3, conv.out_channels), 1 / 3)


def build(fusion: str, num_slices: int, **options) -> tuple[TruncatedDenseNet3D, KeySliceFPN]:
    """A DenseNet-121 backbone and its neck from random weights, on the device of `DEVICE`."""
    torch.manual_seed(0)
    backbone = TruncatedDenseNet3D(operator_config(fusion, num_slices), **options)
    return backbone.to(DEVICE), KeySliceFPN(num_slices=num_slices).to(DEVICE)


def operator_config(name: str, num_slices: int) -> dict:
    return dict(type=name, **({"num_slices": num_slices} if name == "A3DConv" else {}))


def volumes(batch: int, num_slices: int, size: int) -> tuple[Tensor, Tensor]:
    """(B, 1, D, H, W) like windowed CT, and (B,) mm: half of them thin."""
    images = 60 * torch.randn(batch, 1, num_slices, size, size, device=DEVICE)
    return images, torch.tensor([1.0, 5.0] * batch, device=DEVICE)[-batch:]


def at_inference(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`function` at inference, which returns when the result is there."""

    @torch.no_grad()
    def run() -> Tensor:
        return finished(function())

    return run


def finished(result: Tensor) -> Tensor:
    """`result`, once it is there: a GPU works on after the call."""
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


def close(ours: Tensor, baseline: Tensor) -> None:
    """Equal to 1e-4 of the largest value."""
    torch.testing.assert_close(ours, baseline, rtol=0, atol=1e-4 * baseline.abs().max().item())
