"""TSM: a shift of channels along depth, then a per-slice convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register_operator
from .slice_conv import SliceConv


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
        ValueError: n_fold is no int of at least 2.
    """

    pixelwise = True
    zero_padding = True

    def __init__(self, *args, n_fold: int = 8, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(n_fold, int) or n_fold < 2:
            raise ValueError(f"n_fold must be an int, at least 2, got {n_fold!r}")
        self.n_fold = n_fold

    @property
    def fuses(self) -> bool:
        return self.in_channels >= self.n_fold  # no channel is shifted otherwise

    def alpha(self, thickness: Tensor | None, batch: int) -> Tensor | None:
        """The neighbouring slice's share in a shifted channel, (B,), without a gradient; None is
        1. It knows nothing of the volume, so that a subclass stays pixel-wise."""
        return None

    def shift(self, x: Tensor, thickness: Tensor | None) -> tuple[int, Tensor | None, bool]:
        """What `shift_channels_` is to do with `x`: fold, alpha and zero_padding."""
        alpha = self.alpha(thickness, len(x))
        if alpha is not None:
            if alpha.requires_grad:
                raise TypeError(
                    f"{type(self).__name__}: alpha gets no gradient here; to learn it, derive from "
                    "SliceConv and write fuse with torch's own functions"
                )
            alpha = alpha.to(x.dtype).view(-1, 1, 1, 1, 1)
        return self.in_channels // self.n_fold, alpha, self.zero_padding

    def fuse(self, x: Tensor, thickness: Tensor | None) -> Tensor:
        return ChannelShift.apply(x, *self.shift(x, thickness))

    def fuse_(self, x: Tensor, thickness: Tensor | None) -> Tensor:
        fold, *how = self.shift(x, thickness)
        return shift_channels_(x, x[:, : 2 * fold].clone(), fold, *how)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_fold={self.n_fold}"


def shift_channels_(
    out: Tensor,
    x: Tensor,
    fold: int,
    alpha: Tensor | None,
    zero_padding: bool,
    transposed: bool = False,
) -> Tensor:
    """Mixes into the first `fold` channels of `out` those of slice d+1 of `x`, into the next
    `fold` those of slice d-1: alpha * neighbour + (1 - alpha) * slice.

    Args:
        out: (B, C, D, H, W), overwritten; holds what `x` does.
        x: (B, at least 2 * fold, D, H, W), memory of its own.
        alpha: what broadcasts to `x`; None is 1.
        zero_padding: the neighbour that a border slice lacks is 0; otherwise that slice stays.
        transposed: the transpose of this linear map, for gradients.

    Returns:
        `out`.
    """
    first, last, but_first, but_last = slice(1), slice(-1, None), slice(1, None), slice(-1)
    for start, upward in ((0, not transposed), (fold, transposed)):
        into, of = (a[:, start : start + fold] for a in (out, x))
        border, opposite = (last, first) if upward else (first, last)
        moved, neighbour = (but_last, but_first) if upward else (but_first, but_last)
        if alpha is None:
            into[:, :, moved].copy_(of[:, :, neighbour])
            into[:, :, border].zero_()
            continue
        into[:, :, moved].lerp_(of[:, :, neighbour], alpha)
        if zero_padding or transposed:
            into[:, :, border].mul_(1 - alpha)
        if transposed and not zero_padding:
            into[:, :, opposite].addcmul_(of[:, :, opposite], alpha)
    return out


class ChannelShift(torch.autograd.Function):
    """`shift_channels_` on a copy. One copy forward and one backward are all it costs, and nothing
    is kept for the backward pass; `torch.cat` of shifted parts takes several of both."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        fold: int,
        alpha: Tensor | None,
        zero_padding: bool,
        transposed: bool = False,
    ) -> Tensor:
        ctx.save_for_backward(alpha)
        ctx.fold, ctx.zero_padding, ctx.transposed = fold, zero_padding, transposed
        return shift_channels_(x.clone(), x, fold, alpha, zero_padding, transposed)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (alpha,) = ctx.saved_tensors
        back = (ctx.fold, alpha, ctx.zero_padding, not ctx.transposed)
        return ChannelShift.apply(gradient, *back), None, None, None, None
