"""KeySliceFPN: squeezes the depth of every backbone map, then a 2D feature pyramid to stride 4.
KeySliceNeck is the squeezing, which necks for other heads share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_ext.models.slice_attention import SliceAttention

FINEST_STRIDE = 4  # of the backbone's first map; each further one has twice as many

MODELS.register_module(module=SliceAttention)


def one_by_one(forward: Callable) -> Callable:
    """Marks the `forward` of a neck that goes through its maps once, finest first: they may come
    from a generator, which makes each when the one before is done with."""
    forward.one_by_one = True
    return forward


class DepthReduction(nn.Module):
    """A D x 1 x 1 convolution without bias: (B, C, D, H, W) -> (B, C, H, W).

    It is the sum over slices d of x[:, :, d] times the matrix weight[:, :, d].
    """

    def __init__(self, channels: int, num_slices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, num_slices, 1, 1))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        # In place: a convolution does not need its output for its gradient.
        return reduce(operator.iadd, map(F.conv2d, x.unbind(2), self.weight.unbind(2)))


class KeySliceNeck(BaseModule):
    """Squeezes the depth of maps by a D x 1 x 1 convolution C -> C without bias each.

    Maps of one slice (2.5D) have no depth to squeeze: with `num_slices=1` there is no such
    convolution.

    Args:
        in_channels: channels of the maps, finest first.
        num_slices: D.
        strides: image pixels a cell of each map.
        attention: `dict(type='SliceAttention')` with its options: a slice attention a map, whose
            result is added to the squeezed one. None: there is none.

    Attributes:
        in_channels: channels of all maps that `forward` takes.

    Raises:
        ValueError: in `reduce`, a map of another depth than `num_slices`; in `of_each`, another
            number of maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_slices: int,
        strides: Sequence[int],
        attention: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.in_channels = tuple(in_channels)
        self.num_slices = num_slices
        self.reductions = nn.ModuleList(
            DepthReduction(c, num_slices) if num_slices > 1 else nn.Flatten(1, 2)
            for c in in_channels
        )
        self.attentions = None
        if attention is not None:
            self.attentions = nn.ModuleList(
                MODELS.build({**attention, "channels": c, "num_slices": num_slices, "stride": s})
                for c, s in zip(in_channels, strides, strict=True)
            )

    def of_each(self, function: Callable[[int, Tensor], object], features: Iterable) -> list:
        """function(level, map) of the maps that `forward` is given, one after the other."""
        levels, features = range(len(self.in_channels)), iter(features)
        # Unlike a loop, `map` lets go of each map before it asks for the next.
        results = list(map(function, levels, features))
        if len(results) < len(levels) or next(features, None) is not None:
            given = "fewer" if len(results) < len(levels) else "more"
            raise ValueError(
                f"{type(self).__name__} was built for {len(levels)} maps, of "
                f"in_channels={self.in_channels} channels, and is given {given}"
            )
        return results

    def reduce(self, x: Tensor, level: int) -> Tensor:
        """(B, C_i, D, H_i, W_i) of a level -> (B, C_i, H_i, W_i)."""
        if x.shape[2] != self.num_slices:
            raise ValueError(
                f"{type(self).__name__} was built for num_slices={self.num_slices}, the volume has "
                f"{x.shape[2]} slices"
            )
        y = self.reductions[level](x)
        return y if self.attentions is None else y + self.attentions[level](x)


@MODELS.register_module()
class KeySliceFPN(KeySliceNeck):
    """3D-to-2D neck (AlignShift, section 2.3; A3D, section 2.3).

    Per backbone map a D x 1 x 1 convolution C -> C without bias, a 1x1 lateral convolution to
    `out_channels`, and from the coarsest down nearest-neighbour 2x upsampling and addition.

    Weights start as those of the papers' released code do: N(0, 2 / (C D)) along depth, so that the
    maps keep their size (He et al., ICCV 2015), uniform laterals of variance 1 / C, biases 0.
    PyTorch's own default along depth is 2.4 times smaller, and the heads would start on faint maps.

    Args:
        in_channels, num_slices, attention: of `KeySliceNeck`.
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
        attention: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        strides = [FINEST_STRIDE << level for level in range(len(in_channels))]
        super().__init__(in_channels, num_slices, strides, attention, init_cfg)
        # Whether the heads take maps of any memory layout at inference. mmcv's own RoIAlign reads
        # memory in NCHW order whatever the strides say: from channels-last features it would pool
        # scrambled ones, without an error. A detector whose RoIAlign is another sets this.
        self.any_layout = False
        self.laterals = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.norms = nn.ModuleList(
            build_norm_layer(norm_cfg, out_channels)[1] if norm_cfg else nn.Identity()
            for _ in in_channels
        )
        for lateral in self.laterals:
            nn.init.kaiming_uniform_(lateral.weight, a=1)
            nn.init.zeros_(lateral.bias)

    @one_by_one
    def forward(self, features: Iterable[Tensor]) -> tuple[Tensor]:
        """(B, C_i, D, H_i, W_i) maps, finest first -> ((B, out_channels, H_0, W_0),).

        Raises ValueError for another number of maps, and maps of another depth than `num_slices`.
        """
        maps = self.of_each(self.squeeze, features)
        y = maps.pop()
        for finer in reversed(maps):
            y = finer + F.interpolate(y, scale_factor=2, mode="nearest")
        return (y if self.any_layout and not torch.is_grad_enabled() else y.contiguous(),)

    def squeeze(self, level: int, x: Tensor) -> Tensor:
        """(B, C_i, D, H_i, W_i) -> (B, out_channels, H_i, W_i)."""
        return self.norms[level](self.laterals[level](self.reduce(x, level)))
