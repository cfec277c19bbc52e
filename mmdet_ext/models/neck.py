"""KeySliceFPN: squeezes the depth of every backbone map, then a 2D feature pyramid to stride 4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn


class DepthReduction(nn.Module):
    """A D x 1 x 1 convolution without bias: (B, C, D, H, W) -> (B, C, H, W).

    It is the sum over slices d of x[:, :, d] times the matrix weight[:, :, d].
    """

    def __init__(self, channels: int, num_slices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, num_slices, 1, 1))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return sum(map(F.conv2d, x.unbind(2), self.weight.unbind(2)))


@MODELS.register_module()
class KeySliceFPN(BaseModule):
    """3D-to-2D neck (AlignShift, section 2.3; A3D, section 2.3).

    Per backbone map a D x 1 x 1 convolution C -> C without bias, a 1x1 lateral convolution to
    `out_channels`, and from the coarsest down nearest-neighbour 2x upsampling and addition. Maps of
    one slice (2.5D) have no depth to squeeze: with `num_slices=1` there is no such convolution.

    Weights start as those of the papers' released code do: N(0, 2 / (C D)) along depth, so that the
    maps keep their size (He et al., ICCV 2015), uniform laterals of variance 1 / C, biases 0.
    PyTorch's own default along depth is 2.4 times smaller, and the heads would start on faint maps.

    Args:
        in_channels: channels of the maps, finest first.
        num_slices: D.
        out_channels: channels of the one output map.
        norm_cfg: normalisation after each lateral convolution, e.g. `dict(type='BN')`. The papers
            have none; without pretrained weights training needs it, as the backbone's outputs are
            not normalised either.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (256, 512, 1024),
        num_slices: int = 3,
        out_channels: int = 512,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_slices = num_slices
        # Whether the heads take maps of any memory layout at inference. mmcv's own RoIAlign reads
        # memory in NCHW order whatever the strides say: from channels-last features it would pool
        # scrambled ones, without an error. A detector whose RoIAlign is another sets this.
        self.any_layout = False
        self.reductions = nn.ModuleList(
            DepthReduction(c, num_slices) if num_slices > 1 else nn.Flatten(1, 2)
            for c in in_channels
        )
        self.laterals = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.norms = nn.ModuleList(
            build_norm_layer(norm_cfg, out_channels)[1] if norm_cfg else nn.Identity()
            for _ in in_channels
        )
        for lateral in self.laterals:
            nn.init.kaiming_uniform_(lateral.weight, a=1)
            nn.init.zeros_(lateral.bias)

    def forward(self, features: Iterable[Tensor]) -> tuple[Tensor]:
        """(B, C_i, D, H_i, W_i) maps, finest first -> ((B, out_channels, H_0, W_0),).

        Raises ValueError for maps of another depth than `num_slices`.
        """
        # Unlike a loop, `map` lets go of each map before it asks for the next.
        maps = list(map(self.squeeze, features, self.reductions, self.laterals, self.norms))
        y = maps.pop()
        for finer in reversed(maps):
            y = finer + F.interpolate(y, scale_factor=2, mode="nearest")
        return (y if self.any_layout and not torch.is_grad_enabled() else y.contiguous(),)

    def squeeze(self, x: Tensor, reduce: nn.Module, lateral: nn.Module, norm: nn.Module) -> Tensor:
        """(B, C_i, D, H_i, W_i) -> (B, out_channels, H_i, W_i)."""
        if x.shape[2] != self.num_slices:
            raise ValueError(
                f"KeySliceFPN was built for num_slices={self.num_slices}, the volume has "
                f"{x.shape[2]} slices"
            )
        return norm(lateral(reduce(x)))
