"""TSM: a shift of channels along depth, then a per-slice convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register_operator
from .slice_conv import SliceConv, shift_depth


@register_operator
class TSMConv(SliceConv):
    """Temporal shift module (Lin et al., ICCV 2019) along depth (A3D, MICCAI 2021, 2.1 (e)).

    With fold = C // n_fold channels

        out[:fold, d]       = x[:fold, d+1]
        out[fold:2fold, d]  = x[fold:2fold, d-1]
        out[2fold:, d]      = x[2fold:, d]

    with 0 for slices that do not exist, followed by a 1 x K x K convolution. The thickness plays
    no part.

    Args:
        n_fold: one part in `n_fold` of the channels is shifted up, one down.

    Raises:
        ValueError: n_fold < 2.
    """

    def __init__(self, *args, n_fold: int = 8, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if n_fold < 2:
            raise ValueError(f"n_fold must be at least 2, got {n_fold}")
        self.n_fold = n_fold

    def fuse(self, x: Tensor, thickness: Tensor | None) -> Tensor:
        up, down, rest = self.split(x)
        return torch.cat([shift_depth(up, 1), shift_depth(down, -1), rest], dim=1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The channels that look at slice d+1, those that look at d-1, and the others."""
        fold = self.in_channels // self.n_fold
        return x.split([fold, fold, self.in_channels - 2 * fold], dim=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_fold={self.n_fold}"
