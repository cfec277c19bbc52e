"""The per-slice 2D convolution that every context-fusion operator is built on ("no fusion").

A 1 x K x K convolution over D slices is a 2D convolution over B*D images. In
`torch.channels_last_3d` memory folding depth into the batch is a view, so the operators speak
(B, C, D, H, W) to the outside and run 2D kernels inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import register_operator


def fold(x: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B*D, C, H, W), slices of a volume next to each other.

    A view when `x` lies in `torch.channels_last_3d` memory, a copy otherwise.
    """
    return x.transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, batch: int) -> Tensor:
    """(B*D, C, H, W) -> (B, C, D, H, W), the inverse of `fold`; always a view."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def in_plane_size(name: str, value: int | tuple[int, int]) -> int:
    """One number out of an int or an equal pair; anything else is refused."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or pair[0] != pair[1]:
        raise ValueError(f"{name} is in-plane: an int or an equal pair, got {value!r}")
    return int(pair[0])


def check_thickness(thickness: Tensor | None, batch: int, operator: str) -> Tensor:
    """Returns a valid (B,) thickness in mm, which may be infinite.

    Raises ValueError if it is missing, of another length, NaN or <= 0. On a GPU the values are
    asserted on the device (RuntimeError), since looking at them would wait for it at every layer;
    compiled code cannot raise for a value, so there an invalid thickness makes the output NaN.
    """
    if thickness is None:
        raise ValueError(f"{operator} needs the slice thickness in mm, one number a volume")
    if thickness.shape != (batch,):
        raise ValueError(
            f"{operator}: thickness must have shape ({batch},), one number a volume of the batch, "
            f"got {tuple(thickness.shape)}"
        )
    if torch.compiler.is_compiling():
        return torch.where(thickness > 0, thickness, torch.nan)
    valid = (thickness > 0).all()  # NaN compares false
    if thickness.is_cuda:
        torch._assert_async(valid, f"{operator}: slice thickness must be > 0 mm and not NaN")
    elif not valid:
        raise ValueError(
            f"{operator}: slice thickness must be > 0 mm (infinity: no fusion), "
            f"got {thickness.tolist()}"
        )
    return thickness


@register_operator
class SliceConv(nn.Module):
    """No fusion: one 2D convolution for every slice (A3D, MICCAI 2021, section 2.1 (a)).

        out[b, :, d] = conv2d(fuse(x)[b, :, d], weight) + bias

    where `fuse` is the identity; operators that only rearrange slices before the convolution
    (TSM, AlignShift, A3D) override it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            `torch.nn.Conv2d`, all in-plane, each an int or an equal pair. Depth is kept.

    Attributes:
        weight: (out_channels, in_channels / groups, K, K), so that 2D checkpoints load unchanged.

    Raises:
        ValueError: unequal pairs, or channels that `groups` does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={in_channels} and "
                f"out_channels={out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = in_plane_size("kernel_size", kernel_size)
        self.stride = in_plane_size("stride", stride)
        self.padding = in_plane_size("padding", padding)
        self.dilation = in_plane_size("dilation", dilation)
        self.groups = groups
        size = self.kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, size, size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as `torch.nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def fuse(self, x: Tensor, thickness: Tensor | None) -> Tensor:
        """Mixes slices ahead of the convolution; (B, C, D, H, W) -> the same shape."""
        return x

    def forward(self, x: Tensor, thickness: Tensor | None = None) -> Tensor:
        """(B, C, D, H, W) -> (B, C', D, H', W'); thickness (B,) in mm is not used here."""
        y = F.conv2d(
            fold(self.fuse(x, thickness)),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return unfold(y, len(x))

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else text + ", bias=False"
