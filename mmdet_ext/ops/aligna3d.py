"""AlignA3D: A3D that fuses the less, the thicker the slices are."""

from __future__ import annotations

import torch
from torch import Tensor

from .a3d import A3DConv
from .registry import register_operator
from .thickness import align_factor, check_reference


@register_operator
class AlignA3DConv(A3DConv):
    """A3D with the align factor of AlignShift; in no paper.

    With reference thickness r, slice thickness s of the volume and alpha = clamp(r / s, 0, 1)

        out[c, k] = alpha * sum_d x[c, d] * fusion_weight[d, k, c] + (1 - alpha) * x[c, k]

    followed by a 1 x K x K convolution. At s <= r it is A3D, at s = infinity no fusion.

    Args:
        num_slices: D.
        ref_thickness: r in mm.

    Attributes:
        fusion_weight: as in `A3DConv`.

    Raises:
        ValueError: num_slices < 1, ref_thickness not a positive finite number; in `forward`, a
            volume of another depth, thickness missing, NaN or <= 0.
    """

    def __init__(self, *args, num_slices: int, ref_thickness: float = 2.0, **kwargs) -> None:
        super().__init__(*args, num_slices=num_slices, **kwargs)
        self.ref_thickness = check_reference(ref_thickness)

    def mixing(self, thickness: Tensor | None, batch: int) -> Tensor:
        """Of the formula, sum_d x[d] * (alpha * fusion_weight[d] + (1 - alpha) * identity[d]): a
        small matrix is blended instead of a map."""
        weight = self.fusion_weight
        alpha = align_factor(thickness, self.ref_thickness, batch, type(self).__name__)
        identity = torch.eye(self.num_slices, dtype=weight.dtype, device=weight.device)
        # Exact at 0 and 1.
        return torch.lerp(identity.unsqueeze(2), weight, alpha.to(weight.dtype).view(-1, 1, 1, 1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ref_thickness={self.ref_thickness}"
