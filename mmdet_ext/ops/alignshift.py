"""AlignShift: a thickness-aware shift of channels along depth, then a per-slice convolution."""

from __future__ import annotations

from torch import Tensor

from .registry import register_operator
from .thickness import align_factor, check_reference
from .tsm import TSMConv


@register_operator
class AlignShiftConv(TSMConv):
    """AlignShift convolution (AlignShift, MICCAI 2020, Algorithm 1).

    With fold = C // n_fold channels, reference thickness r and slice thickness s of the volume,
    the align factor is alpha = clamp(r / s, 0, 1) and

        out[:fold, d]       = alpha * x[:fold, d+1]       + (1 - alpha) * x[:fold, d]
        out[fold:2fold, d]  = alpha * x[fold:2fold, d-1]  + (1 - alpha) * x[fold:2fold, d]
        out[2fold:, d]      = x[2fold:, d]

    followed by a 1 x K x K convolution: shifted channels come from the "virtual slice" r mm away.
    At s <= r it is TSM, at s = infinity no fusion.

    Args:
        n_fold: one part in `n_fold` of the channels is shifted up, one down.
        ref_thickness: r in mm.
        zero_padding: at the first and last slice the missing neighbour is 0 (Algorithm 1);
            False leaves the border slice as it is (the authors' released configs).

    Raises:
        ValueError: n_fold is no int of at least 2, ref_thickness not a positive finite number; in
            `forward`, thickness missing, NaN or <= 0.
    """

    keeps_depth = True

    def __init__(
        self, *args, ref_thickness: float = 2.0, zero_padding: bool = True, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.ref_thickness = check_reference(ref_thickness)
        self.zero_padding = zero_padding

    def alpha(self, thickness: Tensor | None, batch: int) -> Tensor:
        return align_factor(thickness, self.ref_thickness, batch, type(self).__name__)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, ref_thickness={self.ref_thickness}, "
            f"zero_padding={self.zero_padding}"
        )
