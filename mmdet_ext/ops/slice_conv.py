"""The per-slice 2D convolution that every context-fusion operator is built on ("no fusion")."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_depth import conv_depth

Pair = int | tuple[int, int]
Triple = int | tuple[int, int, int]
Affine = tuple[Tensor, Tensor]


def shift_depth(x: Tensor, step: int) -> Tensor:
    """out[:, :, d] = x[:, :, d + step] of a (B, C, D, H, W) volume; 0 for slices that do not exist.
    For operators of one's own; what ships with the package shifts channels by
    `tsm.shift_channels_`."""
    depth = x.shape[2]
    step = max(-depth, min(step, depth))
    return F.pad(x, (0, 0, 0, 0, -step, step))  # a negative width crops


def fold_affine(weight: Tensor, bias: Tensor | None, affine: Affine) -> tuple[Tensor, Tensor]:
    """The kernel (C', ...) and bias whose convolution has times scale plus shift in it."""
    scale, shift = affine
    weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight, shift if bias is None else torch.addcmul(shift, scale, bias)


class SliceConv(nn.Module):
    """No fusion: one 2D convolution for every slice (A3D, MICCAI 2021, section 2.1 (a)).

        out[b, :, d] = conv2d(fuse(x)[b, :, d], weight) + bias

    where `fuse` is the identity. Depth is kept; with `depth='isotropic'` stride, padding and
    dilation act along depth as well, as if the kernel were the middle slice of a K x K x K one.

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
        depth: 'keep'; or 'isotropic', where stride, padding and dilation are an int, for all three
            axes, or a (depth, height, width) triple, and the kernel is square.

    Attributes:
        weight: (out_channels, in_channels / groups, K, K), so that 2D checkpoints load unchanged.

    Raises:
        ValueError: sizes out of range, or channels that `groups` does not divide; 'isotropic' for
            an operator that takes slices to stay as far apart as they were (`keeps_depth`).
    """

    # Set by operators that know what lies between slices: striding along depth would belie them.
    keeps_depth = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair | Triple = 1,
        padding: Pair | Triple | str = 0,
        dilation: Pair | Triple = 1,
        groups: int = 1,
        bias: bool = True,
        depth: str = "keep",
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        if depth not in ("keep", "isotropic"):
            raise ValueError(f"depth must be 'keep' or 'isotropic', got {depth!r}")
        if depth == "isotropic" and self.keeps_depth:
            raise ValueError(f"{kind} works between slices of one stack: depth must be 'keep'")
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
        axes = volume_triple if depth == "isotropic" else in_plane_pair
        self.depth = depth
        self.kernel_size = in_plane_pair("kernel_size", kernel_size)
        self.stride = axes("stride", stride)
        self.dilation = axes("dilation", dilation)
        self.groups = groups
        if padding != "same":
            padding = axes("padding", 0 if padding == "valid" else padding, least=0)
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

    @property
    def fuses(self) -> bool:
        """Whether it sees more than one slice."""
        return type(self) is not SliceConv

    def _sides(self) -> tuple[int, ...]:
        """Zero padding of a K x K (x K) kernel: left, right, top, bottom (, front, back)."""
        sizes = self.kernel_size
        if self.depth == "isotropic":
            sizes = (square_kernel(self, "along depth it is to act as in-plane"), *sizes)
        if self.padding != "same":
            return tuple(n for n in reversed(self.padding) for _ in range(2))
        if set(self.stride) != {1}:
            raise ValueError(f"padding='same' needs stride 1, got {self.stride}")
        sums = [d * (k - 1) for d, k in zip(self.dilation, sizes)]
        # As torch does: of an odd number the larger half goes right, below and behind.
        return tuple(n for total in reversed(sums) for n in (total // 2, total - total // 2))

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
        return self.convolve3d(x, weight.unsqueeze(2), bias)

    def convolve3d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int | None = None,
        spacing: Tensor | None = None,
    ) -> Tensor:
        """3D convolution with this operator's geometry, (B, C, D, H, W) -> (B, c', D', H', W').

        `weight` is (c', C / groups, kd, kh, kw). Where an axis has less than K taps, their middle
        (k - 1) // 2 lies where the K taps have theirs: results of all kernels lie alike. `spacing`
        of the taps along depth is as in `conv_depth`.
        """
        taps, sizes = weight.shape[2:], (self.kernel_size[0], *self.kernel_size)
        sides, dilation = list(self.sides), list(self.dilation)
        for axis in range(-1, -1 - len(dilation), -1):
            rate, k, size = dilation[axis], taps[axis], sizes[axis]
            if k != size:
                before = (size - 1) // 2 - (k - 1) // 2
                sides[-2 * axis - 2] -= rate * before
                sides[-2 * axis - 1] -= rate * (size - k - before)
                dilation[axis] = rate if k > 1 else 1
        groups = self.groups if groups is None else groups
        return conv_depth(x, weight, bias, self.stride, sides, dilation, groups, spacing)

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

        Raises:
            ValueError: `x` has other axes; `F.conv3d` takes four for a volume without a batch.
        """
        if x.ndim != 5:
            raise ValueError(f"expected a (B, C, D, H, W) volume, got {tuple(x.shape)}")
        fuse = self.fuse_ if inplace and not torch.is_grad_enabled() else self.fuse
        return self.convolve_affine(fuse(x, thickness), thickness, affine)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name in ("stride", "dilation"):
            if set(getattr(self, name)) != {1}:
                text += f", {name}={getattr(self, name)}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if any(self.sides):
            text += f", padding={self.padding!r}"
        if self.depth != "keep":
            text += f", depth={self.depth!r}"
        return text if self.bias is not None else text + ", bias=False"


def in_plane_pair(name: str, value: Pair, least: int = 1) -> tuple[int, int]:
    """(height, width) out of an int or a pair; anything else is refused."""
    return _axes(name, value, least, 2, "is in-plane: an int or a (height, width) pair")


def volume_triple(name: str, value: Triple, least: int = 1) -> tuple[int, int, int]:
    """(depth, height, width) out of an int or a triple; anything else is refused."""
    return _axes(name, value, least, 3, "must be an int or a (depth, height, width) triple")


def _axes(name: str, value: int | Sequence[int], least: int, count: int, what: str) -> tuple:
    axes = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(axes) != count or not all(isinstance(n, int) and n >= least for n in axes):
        raise ValueError(f"{name} {what}, at least {least}, got {value!r}")
    return axes


def square_kernel(operator: SliceConv, why: str) -> int:
    """K of a K x K kernel; raises ValueError for any other."""
    height, width = operator.kernel_size
    if height != width:
        raise ValueError(
            f"{type(operator).__name__} needs a square kernel ({why}), got {height} x {width}"
        )
    return height
