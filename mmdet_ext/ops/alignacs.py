"""AlignACS: ACS whose coronal and sagittal kernels are of the same size in mm at any thickness."""

from __future__ import annotations

from torch import Tensor

from .acs import ACSConv
from .registry import register_operator
from .thickness import align_factor, check_reference


@register_operator
class AlignACSConv(ACSConv):
    """ACS with the virtual slices of AlignShift; in no paper.

    With reference thickness r, slice thickness s of the volume and alpha = clamp(r / s, 0, 1), tap
    j of the coronal and sagittal kernels meets, instead of slice d + o, o = j - (K - 1) // 2, the
    virtual slice alpha * o slices away:

        x[d + alpha o] = (1 - f) * x[d + p] + f * x[d + p + 1], p = floor(alpha o), f = alpha o - p

    with zeros for slices that do not exist. Of a 3 x 3 kernel these are alpha * x[d +- 1] +
    (1 - alpha) * x[d]. At s <= r it is ACS. At s = infinity every tap meets the slice itself, so
    that these kernels, summed along depth, lie in the row and the column of the pixel. The axial
    kernel knows nothing of the thickness, nor does a 1 x 1 kernel.

    Args:
        ref_thickness: r in mm.

    Raises:
        ValueError: a kernel that is not square; groups other than 1 or in_channels; ref_thickness
            not a positive finite number; in `forward`, thickness missing, NaN or <= 0.
    """

    pixelwise = linear = keeps_depth = True

    def __init__(self, *args, ref_thickness: float = 2.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.ref_thickness = check_reference(ref_thickness)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, thickness: Tensor | None
    ) -> Tensor:
        if self.kernel_size == (1, 1):
            return self.three_views(x, weight, bias)
        alpha = align_factor(thickness, self.ref_thickness, len(x), type(self).__name__)
        return self.three_views(x, weight, bias, alpha)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ref_thickness={self.ref_thickness}"
