"""The network as the papers write it down, on 5-D tensors: what speed is measured against, and an
oracle of the backbone and the neck.

Every function walks over one of our modules and uses its weights: operators as in
benchmarks/twins.py on (B, C, D, H, W) tensors in PyTorch's default memory, `torch.cat` in dense
blocks, norms as layers of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import twins
from mmdet_ext.models.densenet import DenseLayer, TruncatedDenseNet3D
from mmdet_ext.models.neck import KeySliceFPN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network(
    backbone: TruncatedDenseNet3D, neck: KeySliceFPN, images: Tensor, thickness: Tensor
) -> Tensor:
    """(B, C, D, H, W) volumes and (B,) mm -> (B, out_channels, H / 4, W / 4)."""
    x = F.relu(backbone.norm0(twins.plain(backbone.conv0, images)), inplace=True)
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    maps = []
    for i in range(1, len(backbone.out_channels) + 1):
        if i > 1:
            transition = getattr(backbone, f"transition{i - 1}")
            x = twins.plain(transition.conv, F.relu(transition.norm(x), inplace=True))
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
    y = twins.plain(layer.conv1, F.relu(layer.norm1(x), inplace=True), thickness)
    return twins.plain(layer.conv2, F.relu(layer.norm2(y), inplace=True), thickness)


def build(fusion: str, num_slices: int, **options) -> tuple[TruncatedDenseNet3D, KeySliceFPN]:
    """A DenseNet-121 backbone and its neck from random weights, on the device of `DEVICE`."""
    torch.manual_seed(0)
    backbone = TruncatedDenseNet3D(twins.config(fusion, num_slices), **options)
    return backbone.to(DEVICE), KeySliceFPN(num_slices=num_slices).to(DEVICE)


def volumes(batch: int, num_slices: int, size: int) -> tuple[Tensor, Tensor]:
    """(B, 1, D, H, W) like windowed CT, and (B,) mm: half of them thin."""
    images = 60 * torch.randn(batch, 1, num_slices, size, size, device=DEVICE)
    return images, torch.tensor([1.0, 5.0] * batch, device=DEVICE)[-batch:]


def at_inference(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`function` where autograd does not record, which returns when the result is there."""

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
