"""The per-slice 2D convolution that every context-fusion operator is built on ("no fusion").

A 1 x K x K convolution over D slices is a 2D convolution over B*D images. In
`torch.channels_last_3d` memory folding depth into the batch is a view, so the operators speak
(B, C, D, H, W) to the outside and run 2D kernels inside; kernels that reach along depth do so in
`conv_depth`.
"""

from __future__ import annotations

from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = int | tuple[int, int]
Affine = tuple[Tensor, Tensor]


def fold(x: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B*D, C, H, W), slices of a volume next to each other.

    A view when `x` lies in `torch.channels_last_3d` memory, a copy otherwise.
    """
    return x.transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, batch: int) -> Tensor:
    """(B*D, C, H, W) -> (B, C, D, H, W), the inverse of `fold`; always a view."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def shift_depth(x: Tensor, step: int) -> Tensor:
    """out[:, :, d] = x[:, :, d + step], step 1 or -1, of a (B, C, D, H, W) volume; 0 for slices
    that do not exist. For operators of one's own; what ships with the package shifts channels by
    `tsm.shift_channels_`."""
    beyond = torch.zeros_like(x[:, :, :1])
    return torch.cat([x[:, :, 1:], beyond] if step == 1 else [beyond, x[:, :, :-1]], dim=2)


def conv_depth(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    sides: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    spacing: Tensor | None = None,
) -> Tensor:
    """3D convolution that keeps the depth, on 2D kernels.

        out[:, :, d] = sum_j conv2d(x[:, :, d + j - (K - 1) // 2], weight[:, :, j]) + bias

    over the K depth taps whose slice exists. One 2D convolution makes all taps' terms, which are
    then added, each moved by its offset.

    Args:
        x: (B, C, D, H, W).
        weight: (C', C / groups, K, kh, kw).
        sides: in-plane zero padding left, right, top, bottom; a negative number crops.
        spacing: (B,), how far apart the depth taps lie, 0 to 1 slices; None is 1. Between slices
            (the zeros beyond the ends included) x is interpolated linearly.

    Returns:
        (B, C', D, H', W').
    """
    depth, taps = x.shape[2], weight.shape[2]
    centre = (taps - 1) // 2
    first, last = 0, taps
    if spacing is None:
        # A tap that reaches no slice at all is left out: with D = 1 only the centre is computed.
        first, last = max(0, centre - depth + 1), min(taps, centre + depth)
    taps, centre = last - first, centre - first
    # Output channels in the order (group, tap, channel), so that groups stay together.
    weight = weight[:, :, first:last].unflatten(0, (groups, -1)).movedim(3, 1).flatten(0, 2)
    if bias is not None:
        bias = F.pad(bias.view(groups, 1, -1), (0, 0, centre, taps - 1 - centre)).flatten()
    left, right, top, bottom = sides
    folded = fold(x)
    if left == right >= 0 and top == bottom >= 0:
        padding = (top, left)
    else:
        folded, padding = F.pad(folded, sides), 0
    y = unfold(F.conv2d(folded, weight, bias, stride, padding, dilation, groups), len(x))
    if taps == 1:
        return y
    terms = y.unflatten(1, (groups, taps, -1)).unbind(2)
    total = terms[centre].clone()
    for j, term in enumerate(terms):
        if (offset := j - centre) == 0:
            continue
        if spacing is None:
            add_moved_(total, term, offset)
            continue
        # Convolution is linear: the terms are interpolated, which have fewer channels than x.
        towards = 1 if offset > 0 else -1
        for step in range(0, offset + towards, towards):
            share = (1 - (spacing * offset - step).abs()).clamp(min=0)
            add_moved_(total, term, step, share.to(term.dtype).view(-1, *[1] * (term.ndim - 1)))
    # A copy of a single volume's channels has a batch stride that hides its memory format from
    # what comes next, torch.cat for one; going to images and back gives it the usual one.
    return unfold(fold(total.flatten(1, 2)), len(x))


def add_moved_(total: Tensor, term: Tensor, step: int, share: Tensor | None = None) -> None:
    """total[..., d, :, :] += share * term[..., d + step, :, :] for all d where that slice exists;
    without `share` it is 1."""
    depth = total.shape[-3]
    if abs(step) >= depth:
        return
    into = total.narrow(-3, max(0, -step), depth - abs(step))
    of = term.narrow(-3, max(0, step), depth - abs(step))
    if share is None:
        into.add_(of)
    else:
        into.addcmul_(of, share)


def fold_affine(weight: Tensor, bias: Tensor | None, affine: Affine) -> tuple[Tensor, Tensor]:
    """The kernel (C', ...) and bias whose convolution has times scale plus shift in it."""
    scale, shift = affine
    weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight, shift if bias is None else torch.addcmul(shift, scale, bias)


class SliceConv(nn.Module):
    """No fusion: one 2D convolution for every slice (A3D, MICCAI 2021, section 2.1 (a)).

        out[b, :, d] = conv2d(fuse(x)[b, :, d], weight) + bias

    where `fuse` is the identity. Depth is kept.

    An operator of one's own derives from this class and overrides `fuse`, which mixes slices before
    the per-slice convolution (TSM, AlignShift, A3D), or `convolve`, whose kernel may reach along
    depth (I3D, P3D, ACS), or both. That is enough to be computed correctly everywhere. Two class
    attributes make it faster at inference, where they are true of it; `check_operator` checks them:

    `pixelwise`: neither `fuse` nor, with a 1 x 1 kernel, `convolve` mixes pixels of a slice. The
        backbone then runs them on strips of rows, which stay in the processor's cache.
    `linear`: `convolve(x, scale * weight, scale * bias + shift)` is the result times scale plus
        shift, one number an output channel. A norm that follows then goes into the kernel.

    Both count for the class that sets them and for its children, until one of these overrides
    `fuse` or `convolve` itself.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            `torch.nn.Conv2d`, all in-plane: an int or a (height, width) pair, `padding` also
            'same' or 'valid'.

    Attributes:
        weight: (out_channels, in_channels / groups, K, K), so that 2D checkpoints load unchanged.

    Raises:
        ValueError: sizes out of range, or channels that `groups` does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels) < 1:
            raise ValueError(
                f"there must be at least 1 channel, got in_channels={in_channels}, "
                f"out_channels={out_channels}"
            )
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={in_channels} and "
                f"out_channels={out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = in_plane_pair("kernel_size", kernel_size)
        self.stride = in_plane_pair("stride", stride)
        self.dilation = in_plane_pair("dilation", dilation)
        self.groups = groups
        if padding != "same":
            padding = in_plane_pair("padding", 0 if padding == "valid" else padding, least=0)
        self.padding = padding
        self.sides = self._sides()
        self.weight = nn.Parameter(torch.empty(self.weight_shape()))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    pixelwise = linear = True
    convolve_takes_thickness = False

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)

        def place(name: str) -> int:
            """Where in the order of inheritance, mixins included, `name` is defined."""
            return next(i for i, parent in enumerate(cls.__mro__) if name in vars(parent))

        if cls.forward is not SliceConv.forward:
            # The backbone calls the two halves of `forward` by themselves.
            raise TypeError(f"{cls.__name__}: override fuse or convolve, not forward")
        in_place = cls.fuse_ is not SliceConv.fuse_
        if in_place and place("fuse_") < place("fuse"):
            raise TypeError(f"{cls.__name__}: fuse_ is fuse in place; override fuse as well")
        # What a parent says of its methods need not hold for those that come in their place.
        if in_place and place("fuse_") > place("fuse"):
            cls.fuse_ = SliceConv.fuse_
        if place("pixelwise") > min(place("fuse"), place("convolve")):
            cls.pixelwise = False
        if place("linear") > place("convolve"):
            cls.linear = False
        cls.convolve_takes_thickness = "thickness" in signature(cls.convolve).parameters

    def _sides(self) -> tuple[int, int, int, int]:
        """Zero padding left, right, top, bottom."""
        if self.padding != "same":
            height, width = self.padding
            return (width, width, height, height)
        if self.stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {self.stride}")
        height, width = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size))
        # As torch does: of an odd number the larger half goes right and below.
        return (width // 2, width - width // 2, height // 2, height - height // 2)

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `weight`."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def reset_parameters(self) -> None:
        """Initialises as `torch.nn.Conv2d` does."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        weight = self.weight.new_empty(shape)
        nn.init.kaiming_uniform_(weight, a=5**0.5)
        self.load_weight2d(weight)
        if self.bias is not None:
            bound = weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def load_weight2d(self, weight: Tensor) -> None:
        """Takes over the weight (C', C / groups, K, K) of a 2D convolution."""
        self.weight.copy_(weight)

    def fuse(self, x: Tensor, thickness: Tensor | None) -> Tensor:
        """Mixes slices ahead of the convolution; (B, C, D, H, W) -> the same shape."""
        return x

    def fuse_(self, x: Tensor, thickness: Tensor | None) -> Tensor:
        """`fuse` that may overwrite `x`, for operators that save memory traffic by it."""
        return self.fuse(x, thickness)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, (B, C, D, H, W) -> (B, C', D, H', W').

        `weight`, shaped as the attribute, and `bias` (C',) or None are the operator's own, or what
        became of them with a norm folded in: use these, not the attributes. One that has a fourth
        argument `thickness` gets that as well, as `forward` was given it.
        """
        return conv_depth(
            x, weight.unsqueeze(2), bias, self.stride, self.sides, self.dilation, self.groups
        )

    def convolve_affine(
        self, x: Tensor, thickness: Tensor | None = None, affine: Affine | None = None
    ) -> Tensor:
        """`convolve`, then `affine`: the half of `forward` that follows `fuse`."""
        own = (thickness,) if self.convolve_takes_thickness else ()
        if affine is None:
            return self.convolve(x, self.weight, self.bias, *own)
        if self.linear:
            return self.convolve(x, *fold_affine(self.weight, self.bias, affine), *own)
        y = self.convolve(x, self.weight, self.bias, *own)
        scale, shift = (a.to(y.dtype).view(-1, 1, 1, 1) for a in affine)
        return torch.addcmul(shift, y, scale)

    @property
    def runs_on_strips(self) -> bool:
        """Whether the halves of `forward` may be run by themselves on strips of rows."""
        return self.pixelwise and not (self._forward_hooks or self._forward_pre_hooks)

    def forward(
        self,
        x: Tensor,
        thickness: Tensor | None = None,
        affine: Affine | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """
        Args:
            x: (B, C, D, H, W).
            thickness: (B,) mm.
            affine: (scale, shift), each (C',): the result times scale plus shift, as a norm that
                follows the convolution has it at inference.
            inplace: `x` may be overwritten, unless autograd records.

        Returns:
            (B, C', D, H', W').
        """
        fuse = self.fuse_ if inplace and not torch.is_grad_enabled() else self.fuse
        return self.convolve_affine(fuse(x, thickness), thickness, affine)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name, default in (("stride", (1, 1)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        if any(self.sides):
            text += f", padding={self.padding!r}"
        return text if self.bias is not None else text + ", bias=False"


def in_plane_pair(name: str, value: Pair, least: int = 1) -> tuple[int, int]:
    """(height, width) out of an int or a pair; anything else is refused."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(
            f"{name} is in-plane: an int or a (height, width) pair, at least {least}, got {value!r}"
        )
    return pair


def square_kernel(operator: SliceConv, why: str) -> int:
    """K of a K x K kernel; raises ValueError for any other."""
    height, width = operator.kernel_size
    if height != width:
        raise ValueError(
            f"{type(operator).__name__} needs a square kernel ({why}), got {height} x {width}"
        )
    return height
