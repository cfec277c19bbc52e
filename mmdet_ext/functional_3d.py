"""What a 2D network's own code computes when its maps are volumes.

`Functions3D` is active while a converted network runs. It turns calls that take (N, C, H, W) maps,
when they are given (N, C, D, H, W) ones, into those of three axes: what acts alike along height and
width acts so along depth. Where the two differ nothing says what depth is to do: that is refused.
Functions that take axes or an index have their rules in `image_axes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmdet_ext.image_axes import (
    flatten,
    flip,
    getitem,
    over_axes,
    permute,
    repeat,
    squeeze,
    transpose,
)
from mmdet_ext.image_shape import NoCounterpart, cube, depth_of, image_shape, with_depth


class Functions3D(TorchFunctionMode):
    """Within it, functional 2D calls on (N, C, D, H, W) tensors act along depth too.

    Their shape reads (N, C, H, W), and H and W given back together bring D along; not so in
    compiled code, where it reads (N, C, D, H, W). Calls on tensors of other dimensions, and those
    that name five axes, stay what they are.

    Args:
        convolve: `F.conv2d` for volumes: (x, weight, bias, stride, padding, dilation, groups).
    """

    def __init__(self, convolve: Callable[..., Tensor]) -> None:
        super().__init__()
        self.convolve = convolve
        # Operators and torch's modules are of three axes already: their calls stay as they are.
        self.suspended = False

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not torch.compiler.is_compiling():
            given, args = args, with_depth(args)
            if name in TO_SIZES and args is not given and args[0].ndim in (3, 4):
                # Sizes of a volume for (N, C, 1, 1) or (C, 1, 1).
                args = (args[0].unsqueeze(args[0].ndim - 2), *args[1:])
            kwargs = {key: with_depth(value) for key, value in kwargs.items()}
            if name in SHAPES or func in SHAPES:
                x, *dim = args
                if x.ndim == 5:
                    return SHAPES[name if name in SHAPES else func](x, *dim, **kwargs)
        two = name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor)
        if two or name in POINTWISE:
            operands = (*args, *kwargs.values())
            if any(isinstance(x, Tensor) and x.ndim == 5 for x in operands):
                args = [beside_volume(x) for x in args]
                kwargs = {key: beside_volume(value) for key, value in kwargs.items()}
            return func(*args, **kwargs)
        if name in RULES:
            if not args and "input" in kwargs:
                args = (kwargs["input"],)
                kwargs = {key: value for key, value in kwargs.items() if key != "input"}
            first = args[0] if args else None
            if isinstance(first, (tuple, list)) and first:  # of `cat`
                first = first[0]
            if isinstance(first, Tensor) and first.ndim == 5:
                return RULES[name](self, func, args, kwargs)
        return func(*args, **kwargs)


def size(x: Tensor, dim: int | None = None) -> Any:
    shape = image_shape(x.shape)
    return shape if dim is None else shape[dim]


SHAPES: dict[Any, Callable[[Tensor], Any]] = {
    "size": size,
    "dim": lambda x: 4,
    Tensor.shape.__get__: size,
    Tensor.ndim.__get__: lambda x: 4,
}


def pooling(function: Callable) -> Callable:
    """The rule of a 2D function whose further arguments are numbers or pairs."""

    def rule(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Any:
        what = f"an argument of {func.__name__}"
        further = [cube(what, value) for value in args[1:]]
        return function(args[0], *further, **{k: cube(what, v) for k, v in kwargs.items()})

    return rule


def average_pool(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    def pool(x, kernel_size, stride=None, padding=0, ceil=False, include=True, divisor=None):
        size = cube("kernel_size", kernel_size)
        depth = size if isinstance(size, int) else size[0]
        stride = size if stride is None or stride in ((), []) else cube("stride", stride)
        # A window is K times as many voxels as pixels.
        divisor = None if divisor is None else divisor * depth
        return F.avg_pool3d(x, size, stride, cube("padding", padding), ceil, include, divisor)

    names = {"ceil_mode": "ceil", "count_include_pad": "include", "divisor_override": "divisor"}
    return pool(*args, **{names.get(key, key): value for key, value in kwargs.items()})


def interpolate(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    named = dict(zip(("size", "scale_factor", "mode", "align_corners"), args[1:]))
    return resize(args[0], **named, **kwargs)


def resize(x: Tensor, size=None, scale_factor=None, mode="nearest", **kwargs) -> Tensor:
    """`F.interpolate` of a volume by an image's arguments."""
    if mode == "bicubic" or kwargs.get("antialias"):
        how = "antialias=True" if kwargs.get("antialias") else "mode='bicubic'"
        raise NoCounterpart(f"interpolate with {how} has no counterpart of three axes")
    if isinstance(size, (tuple, list)) and len(size) == 2:
        # Computed from a scale. Compiled it may as well be another map's height and width, which
        # say nothing of its depth; otherwise these bring it along.
        depth, *plane = x.shape[2:]
        times = {n // m if n % m == 0 else None for n, m in zip(size, plane)}
        (factor,) = times if len(times) == 1 else (None,)
        if factor is None or torch.compiler.is_compiling():
            raise NoCounterpart(f"interpolate to size={tuple(size)}: nothing says how deep")
        size = (depth * factor, *size)
    size = cube("size", size)
    scale_factor = cube("scale_factor", scale_factor)
    mode = "trilinear" if mode == "bilinear" else mode
    return F.interpolate(x, size, scale_factor, mode, **kwargs)


def pad(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    args, kwargs = list(args), dict(kwargs)
    widths = tuple(args[1] if len(args) > 1 else kwargs["pad"])
    if len(widths) in (2, 4):
        left, right, top, bottom = (*widths, 0, 0)[:4]
        depth = depth_of("padding", top, left), depth_of("padding", bottom, right)
        widths = (left, right, top, bottom, *depth)
    elif len(widths) == 8 or (len(widths) == 6 and not any(widths[:4])):
        # Of an image these are channels, and the batch, after height and width.
        left, right, top, bottom = widths[:4]
        depth = depth_of("padding", top, left), depth_of("padding", bottom, right)
        widths = (*widths[:4], *depth, *widths[4:])
    if len(args) > 1:
        args[1] = widths
    else:
        kwargs["pad"] = widths
    return func(*args, **kwargs)


def conv2d(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    return mode.convolve(*args, **kwargs)


def conv_transpose2d(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    def convolve(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        geometry = [
            cube(name, value)
            for name, value in (
                ("stride", stride), ("padding", padding), ("output_padding", output_padding),
                ("dilation", dilation),
            )
        ]  # fmt: skip
        first = [n if isinstance(n, int) else n[0] for n in geometry]
        weight = inflate_transposed(weight, first[0], first[3])
        return F.conv_transpose3d(x, weight, bias, *geometry[:3], groups, geometry[3])

    return convolve(*args, **kwargs)


def inflate_transposed(weight: Tensor, stride: int, dilation: int) -> Tensor:
    """The kernel (C, C' / groups, K, K) of a transposed convolution -> (C, C' / groups, K, K, K).

    An output position sees every s-th tap. Each tap's share along depth is 1 over the number of
    taps that are seen together, so that a volume equal along depth is answered as one image is.
    """
    taps = weight.shape[-1]
    if weight.shape[-2] != taps:
        raise NoCounterpart(
            f"a transposed convolution's kernel of {weight.shape[-2]} x {taps}: nothing says what "
            "it is along depth"
        )
    seen = [dilation * j % stride for j in range(taps)]
    shares = weight.new_tensor([1 / seen.count(place) for place in seen])
    return weight.unsqueeze(2) * shares.view(-1, 1, 1)


def beside_volume(x: Any) -> Any:
    """An operand of a pointwise function beside a volume: (N, C, 1, 1), (C, 1, 1) and (N, 1, 1, C)
    get the axis of its depth."""
    if not isinstance(x, Tensor) or x.ndim not in (2, 3, 4):
        return x
    if tuple(x.shape[-2:]) == (1, 1):
        return x.unsqueeze(-1)
    if all(n == 1 for n in x.shape[:-1]):  # (1, 1, 1, C): channels last
        return x
    if x.ndim == 4 and tuple(x.shape[1:3]) == (1, 1):
        return x.unsqueeze(1)
    raise NoCounterpart(
        f"an operand of shape {tuple(x.shape)} beside a volume: a table of an image's pixels has "
        "no depth"
    )


def refuse(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Any:
    raise NoCounterpart(f"{func.__name__} has no counterpart of three axes")


POINTWISE = {
    name + end
    for name in (
        "add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow",
        "maximum", "minimum", "where", "addcmul", "addcdiv", "lerp", "__rsub__", "__rdiv__",
        "__radd__", "__rmul__", "__rtruediv__", "__rpow__", "__floordiv__", "__rfloordiv__",
        "expand_as", "copy", "masked_fill",
        "clamp", "clip", "clamp_min", "clamp_max", "fmax", "fmin", "gt", "ge", "lt", "le", "eq",
        "ne", "greater", "greater_equal", "less", "less_equal", "not_equal", "logical_and",
        "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "__and__",
        "__or__", "__xor__", "__iand__", "__ior__", "__ixor__", "floor_divide", "remainder",
        "fmod", "float_power", "atan2", "arctan2", "hypot", "xlogy", "logaddexp", "logaddexp2",
    )
    for end in ("", "_")
}  # fmt: skip
TO_SIZES = {"expand", "repeat", "broadcast_to"}
RULES = {
    "max_pool2d": pooling(F.max_pool3d),
    "max_pool2d_with_indices": pooling(F.max_pool3d_with_indices),
    "avg_pool2d": average_pool,
    "adaptive_avg_pool2d": pooling(F.adaptive_avg_pool3d),
    "adaptive_max_pool2d": pooling(F.adaptive_max_pool3d),
    "adaptive_max_pool2d_with_indices": pooling(F.adaptive_max_pool3d_with_indices),
    "lp_pool2d": pooling(F.lp_pool3d),
    "max_unpool2d": pooling(F.max_unpool3d),
    "dropout2d": pooling(F.dropout3d),
    "interpolate": interpolate,
    "upsample": interpolate,
    "pad": pad,
    "conv2d": conv2d,
    "conv_transpose2d": conv_transpose2d,
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean",
         "std_mean", "logsumexp", "prod", "nanmean", "any", "all", "count_nonzero",
         "select", "narrow", "unbind", "index_select", "gather", "sort", "argsort", "median"),
        over_axes(1),
    ),
    **dict.fromkeys(
        ("norm", "linalg_norm", "linalg_vector_norm", "roll", "rot90", "topk"), over_axes(2)
    ),
    **dict.fromkeys(
        ("softmax", "log_softmax", "cumsum", "glu", "cat", "concat", "concatenate"),
        over_axes(1, last=True),
    ),
    **dict.fromkeys(
        ("chunk", "split", "tensor_split", "normalize", "cosine_similarity"),
        over_axes(2, last=True),
    ),
    "flip": flip,
    "squeeze": squeeze,
    "flatten": flatten,
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    "repeat": repeat,
    "__getitem__": getitem,
    "__setitem__": getitem,
    **dict.fromkeys(
        ("pixel_shuffle", "pixel_unshuffle", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2"),
        refuse,
    ),
}  # fmt: skip
