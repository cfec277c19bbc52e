"""I3D: a full 3D convolution whose kernel starts as the 2D one, inflated."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register_operator
from .slice_conv import SliceConv, square_kernel


@register_operator
class I3DConv(SliceConv):
    """Inflated 3D convolution (Carreira and Zisserman, CVPR 2017; A3D, MICCAI 2021, 2.1 (b)).

        out[:, d] = sum_j conv2d(x[:, d + j - (K - 1) // 2], weight[:, :, j]) + bias

    with zeros for slices that do not exist; with `depth='isotropic'`, what `torch.nn.Conv3d`
    computes. As initialised every weight[:, :, j] is the 2D weight divided by K: a volume of equal
    slices is answered, away from its ends, as the 2D convolution answers one slice. A 1 x 1 kernel
    stays 1 x 1 x 1.

    Attributes:
        weight: (out_channels, in_channels / groups, K, K, K). A state dict that holds the 2D
            weight is inflated on loading.

    Raises:
        ValueError: a kernel that is not square.
    """

    pixelwise = linear = True

    def weight_shape(self) -> tuple[int, ...]:
        size = square_kernel(self, "it is inflated to K x K x K")
        return (self.out_channels, self.in_channels // self.groups, size, size, size)

    @torch.no_grad()
    def load_weight2d(self, weight: Tensor) -> None:
        self.weight.copy_(self._inflate(weight))

    def _inflate(self, weight: Tensor) -> Tensor:
        size = weight.shape[-1]
        return weight.unsqueeze(2).expand(-1, -1, size, -1, -1) / size

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.ndim == 4:
            state_dict[prefix + "weight"] = self._inflate(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.convolve3d(x, weight, bias)
