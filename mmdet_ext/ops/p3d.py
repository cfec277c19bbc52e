"""P3D: a per-slice convolution followed by one along depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conv_depth import conv_depth
from .registry import register_operator
from .slice_conv import SliceConv, square_kernel


@register_operator
class P3DConv(SliceConv):
    """Pseudo 3D convolution (Qiu et al., ICCV 2017; A3D, MICCAI 2021, 2.1 (c)).

        y[:, d]   = conv2d(x[:, d], weight) + bias
        out[:, d] = sum_j depth_weight[:, :, j] @ y[:, d + j - (T - 1) // 2]

    with zeros for slices that do not exist and T = K taps, 3 for a 1 x 1 kernel. As initialised
    the second step picks the centre: no fusion.

    Attributes:
        depth_weight: (out_channels, out_channels / groups, T, 1, 1).

    Raises:
        ValueError: a kernel that is not square.
    """

    # Not `linear`: `depth_weight` mixes the channels of the first convolution.
    pixelwise = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        size = square_kernel(self, "K is the depth of the second kernel")
        taps = 3 if size == 1 else size
        width = self.out_channels // self.groups
        self.depth_weight = nn.Parameter(torch.empty(self.out_channels, width, taps, 1, 1))
        self.reset_fusion()

    @torch.no_grad()
    def reset_fusion(self) -> None:
        """No fusion: the centre tap is the identity, the others are 0."""
        width, taps = self.depth_weight.shape[1:3]
        identity = torch.eye(width).repeat(self.groups, 1)
        self.depth_weight.zero_()
        self.depth_weight[:, :, (taps - 1) // 2, 0, 0] = identity.to(self.depth_weight)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # In-plane geometry alone: all slices are kept for the second step.
        sides, (*_, height, width) = self.sides[:4], self.stride
        kernel = weight.unsqueeze(2)
        y = conv_depth(x, kernel, bias, (height, width), sides, self.dilation[-2:], self.groups)
        if self.depth == "keep":
            return conv_depth(y, self.depth_weight, groups=self.groups)
        # The middle taps lie where those of K taps do.
        rate, taps, size = self.dilation[0], self.depth_weight.shape[2], self.kernel_size[0]
        more = (taps - 1) // 2 - (size - 1) // 2
        front, back = self.sides[4] + rate * more, self.sides[5] + rate * (taps - size - more)
        return conv_depth(
            y, self.depth_weight, None, (self.stride[0], 1, 1), (0, 0, 0, 0, front, back),
            (rate, 1, 1), self.groups,
        )  # fmt: skip
