"""ACS, Mean-ACS and Soft-ACS: 2D kernels used in the axial, coronal and sagittal views."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import register_operator
from .slice_conv import SliceConv, square_kernel

AXIAL, CORONAL, SAGITTAL = range(3)


class ThreeViewConv(SliceConv):
    """What the three operators share: one 2D kernel in one view.

    The K x K kernel lies in (H, W) axially, (D, W) in the coronal view and (D, H) in the sagittal
    one. The outputs of all views are taken at the same positions: each kernel lies in the middle
    plane, (K - 1) // 2, of the axis that it lacks. A 1 x 1 kernel is the same in all three.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        square_kernel(self, "it is turned into three views")

    def view(
        self,
        view: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        spacing: Tensor | None = None,
    ) -> Tensor:
        """(B, C, D, H, W), the weight (c', C / groups, K, K) -> (B, c', D, H', W'). `spacing` of
        the taps along depth is as in `conv_depth`."""
        kernel = weight.unsqueeze({AXIAL: 2, CORONAL: 3, SAGITTAL: 4}[view])
        return self.convolve3d(x, kernel, bias, groups, spacing)


@register_operator
class ACSConv(ThreeViewConv):
    """Axial-coronal-sagittal convolution (ACS, JBHI 2021, Eqs. 1-3).

        out = cat(conv3d(x, W_a as 1 x K x K), conv3d(x, W_c as K x 1 x K),
                  conv3d(x, W_s as K x K x 1)) + bias

    W_a, W_c and W_s are three near-equal parts of the 2D weight's output channels; of C' mod 3
    channels left over the first parts get one each. All axes are padded with zeros.

    Raises:
        ValueError: a kernel that is not square; groups other than 1 or in_channels (depthwise,
            where each view takes its own channels).
    """

    pixelwise = linear = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.groups not in (1, self.in_channels):
            raise ValueError(
                f"{type(self).__name__} splits channels into views: groups must be 1 or "
                f"in_channels={self.in_channels} (depthwise), got {self.groups}"
            )

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.three_views(x, weight, bias)

    def three_views(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, spacing: Tensor | None = None
    ) -> Tensor:
        """`convolve` with taps along depth that are `spacing` slices apart, (B,)."""
        if self.kernel_size == (1, 1):
            return super().convolve(x, weight, bias)
        depthwise = self.groups > 1
        if depthwise and self.out_channels > self.in_channels:
            # One input channel an output channel, so that both split alike.
            x = x.repeat_interleave(self.out_channels // self.in_channels, dim=1)
        share = [(self.out_channels * part + 2) // 3 for part in range(4)]
        outputs = []
        for view, (start, end) in enumerate(pairwise(share)):
            if start == end:
                continue
            part = None if bias is None else bias[start:end]
            inputs, groups = (x[:, start:end], end - start) if depthwise else (x, 1)
            outputs.append(self.view(view, inputs, weight[start:end], part, groups, spacing))
        return torch.cat(outputs, dim=1)


@register_operator
class MeanACSConv(ThreeViewConv):
    """Mean-ACS convolution (ACS, JBHI 2021, Eq. 4): every view has the whole 2D weight W.

        out = (conv3d(x, W as 1 x K x K) + conv3d(x, W as K x 1 x K)
               + conv3d(x, W as K x K x 1)) / 3 + bias

    Raises:
        ValueError: a kernel that is not square.
    """

    pixelwise = linear = True

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel_size == (1, 1):
            return super().convolve(x, weight, bias)
        shares = self.shares()
        # The bias enters once, and a view's share goes into its kernel: convolution is linear.
        views = (
            self.view(
                view,
                x,
                weight * shares[view],
                bias if view == AXIAL else None,
                self.groups,
            )
            for view in (AXIAL, CORONAL, SAGITTAL)
        )
        return functools.reduce(torch.add, views)  # `sum` would add the first one to 0

    def shares(self) -> Sequence[float] | Tensor:
        """Weight of each view: numbers, or (3, C', 1, 1, 1)."""
        return (1 / 3,) * 3


@register_operator
class SoftACSConv(MeanACSConv):
    """Soft-ACS convolution (ACS, JBHI 2021, Eq. 5): Mean-ACS with learned weights of the views.

        out = sum_v softmax(view_weight)[:, v] * conv3d(x, W in view v) + bias

    Attributes:
        view_weight: (out_channels, 3), axial, coronal, sagittal; from U(0, 1) at first, as in the
            paper's code, so that a view has a share of 0.16 to 0.58. Equal ones are Mean-ACS. None
            for 1 x 1 kernels, whose three views are one.

    Raises:
        ValueError: a kernel that is not square.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.view_weight = (
            None if self.kernel_size == (1, 1) else nn.Parameter(torch.rand(self.out_channels, 3))
        )

    def shares(self) -> Tensor:
        return F.softmax(self.view_weight, dim=1).T[..., None, None, None]
