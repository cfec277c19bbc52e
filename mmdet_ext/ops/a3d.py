"""A3D: dense, per-channel mixing of all slices, then a per-slice convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .registry import register_operator
from .slice_conv import SliceConv


@register_operator
class A3DConv(SliceConv):
    """Asymmetric 3D context fusion (A3D, MICCAI 2021, Eq. 1 and Algorithm 1).

        out[c, k] = sum_d x[c, d] * fusion_weight[d, k, c]

    followed by a 1 x K x K convolution. Every output slice has weights of its own, so there is no
    padding, and D is fixed.

    Args:
        num_slices: D.

    Attributes:
        fusion_weight: (D, D, in_channels), (input slice, output slice, channel); the identity plus
            noise from U(-0.1, 0.1).

    Raises:
        ValueError: num_slices < 1; in `forward`, a volume of another depth.
    """

    pixelwise = keeps_depth = True

    def __init__(self, *args, num_slices: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if num_slices < 1:
            raise ValueError(f"num_slices must be at least 1, got {num_slices}")
        self.num_slices = num_slices
        self.fusion_weight = nn.Parameter(torch.empty(num_slices, num_slices, self.in_channels))
        self.reset_fusion()

    @torch.no_grad()
    def reset_fusion(self) -> None:
        """Nearly no fusion (A3D, section 2.2)."""
        nn.init.uniform_(self.fusion_weight, -0.1, 0.1)
        self.fusion_weight.diagonal().add_(1)

    def fuse(self, x: Tensor, thickness: Tensor | None) -> Tensor:
        if x.shape[2] != self.num_slices:
            raise ValueError(
                f"{type(self).__name__} was built for num_slices={self.num_slices}, the volume has "
                f"{x.shape[2]} slices"
            )
        return SliceMix.apply(x, self.mixing(thickness, len(x)).to(x.dtype))

    def mixing(self, thickness: Tensor | None, batch: int) -> Tensor:
        """Every slice's share in every other: (D, D, C), or (B, D, D, C) of each volume. It knows
        nothing of the pixels, so that a subclass stays pixel-wise."""
        return self.fusion_weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_slices={self.num_slices}"


class SliceMix(torch.autograd.Function):
    """out[:, c, k] = sum_d x[:, c, d] * weight[d, k, c], slice by slice of the input. The weight
    is (D, D, C), or (B, D, D, C) with matrices of its own for each volume.

    Unlike an einsum it stays in the memory format of `x` and makes no copies, forward or in the
    gradient of `x`, which is the same with the transposed matrices.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # D of (C, D, 1, 1) or (B, C, D, 1, 1): per input slice what broadcasts over the output's.
        first, *others = weight.mT[..., None, None].unbind(-5)
        out = x[:, :, :1] * first
        for d, of_slice in enumerate(others, 1):
            out.addcmul_(x[:, :, d : d + 1], of_slice)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = SliceMix.apply(gradient, weight.transpose(-3, -2))
        if ctx.needs_input_grad[1] and weight.ndim == 3:
            of_weight = sum_of_products(x, gradient)
        elif ctx.needs_input_grad[1]:
            pairs = zip(x.split(1), gradient.split(1), strict=True)
            of_weight = torch.stack([sum_of_products(*pair) for pair in pairs])
        return of_x, of_weight


def sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """out[d, k, c] = sum over b, h, w of x[b, c, d, h, w] * y[b, c, k, h, w]; (D, D, C)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.einsum("bcdhw,bckhw->dkc", x, y)
    # Row by row, so that the D x D sums stay in the cache; the einsum transposes both first.
    depth = x.shape[2]
    sums = x.new_zeros(depth, depth, x.shape[4], x.shape[1])
    for volumes in zip(x, y, strict=True):
        # Rows of (D, W, C).
        for x_row, y_row in zip(*(v.permute(2, 1, 3, 0) for v in volumes), strict=True):
            sums.addcmul_(x_row[:, None], y_row[None])
    return sums.sum(2)
