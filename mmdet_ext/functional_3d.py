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
    beside_volume,
    flatten,
    flip,
    getitem,
    matrix_transpose,
    over_axes,
    permute,
    repeat,
    reshape,
    roll,
    squeeze,
    transpose,
    unsqueeze,
)
from mmdet_ext.image_shape import (
    Extent,
    ImageSize,
    NoCounterpart,
    OfVolume,
    cube,
    depth_of,
    image_shape,
    with_depth,
)


class Functions3D(TorchFunctionMode):
    """Within it, functional 2D calls on (N, C, D, H, W) tensors act along depth too.

    Their shape reads (N, C, H, W), and H and W given back together bring D along; not so in
    compiled code, where it reads (N, C, D, H, W). Calls that name five axes stay what they are, and
    so do those on tensors that are no maps. A tensor of five axes is a map, and one of more or
    fewer if D, H and W of a map that was met stand in it.

    Args:
        convolve: `F.conv2d` for volumes: (x, weight, bias, stride, padding, dilation, groups).
    """

    def __init__(self, convolve: Callable[..., Tensor]) -> None:
        super().__init__()
        self.convolve = convolve
        # Operators and torch's modules are of three axes already: their calls stay as they are.
        self.suspended = False
        # (D, H, W) that maps end in, and (place, (D, H, W)) of others, channels last for example.
        self.known: set[tuple[int, ...]] = set()
        self.elsewhere: set[tuple[int, tuple[int, ...]]] = set()

    def record(self, x: Tensor, place: int) -> None:
        """Puts down that `x` is a map whose D, H and W begin at `place`."""
        if torch.compiler.is_compiling() or not 0 <= place <= x.ndim - 3:
            return
        volume = tuple(x.shape[place : place + 3])
        if place == x.ndim - 3:
            self.known.add(volume)
        else:
            self.elsewhere.add((place, volume))

    def layout(self, x: Tensor) -> tuple[int, tuple[int, ...]]:
        """How many axes the image has that `x` is of, and where height and width may stand in it,
        the likeliest place first; nowhere if it is no map."""
        either = (2, 1) if x.ndim == 5 else ()
        if torch.compiler.is_compiling() or x.ndim < 4:
            return x.ndim - 1, either
        shape = tuple(x.shape)
        found = [
            place
            for place in range(x.ndim - 3)
            if (place, shape[place : place + 3]) in self.elsewhere
        ]
        # What was pooled to one voxel is hard to tell from a gate.
        if shape[-3:] in self.known and (x.ndim == 5 or shape[-3:] != (1, 1, 1)):
            found.insert(0, x.ndim - 3)
        return x.ndim - 1, tuple(found) or either

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not torch.compiler.is_compiling():
            given, args = args, with_depth(args)
            if name in TO_SIZES and args is not given:
                args = (to_sizes(*args), *args[1:])
            kwargs = {key: with_depth(value) for key, value in kwargs.items()}
            if name in SHAPES or func in SHAPES:
                x, *dim = args
                if places := self.layout(x)[1]:
                    shape = image_shape(x.shape, places[0], self.known)
                    return SHAPES[name if name in SHAPES else func](shape, *dim, **kwargs)
            if name in LAST_AXES or (name.startswith("linalg_") and name not in RULES):
                refuse_last_axes(self, name, (*args, *kwargs.values()))
        two = name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor)
        if two or name in POINTWISE:
            return self.pointwise(func, args, kwargs)
        if not args and "input" in kwargs:
            args = (kwargs["input"],)
            kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        first = args[0] if args else None
        if isinstance(first, (tuple, list)) and first:  # of `cat`
            first = first[0]
        if not isinstance(first, Tensor):
            return func(*args, **kwargs)
        if name in ("view", "reshape"):
            return reshape(self, func, args, kwargs)
        places = self.layout(first)[1]
        if not places:
            return func(*args, **kwargs)
        if rule := RULES.get(name) or RULES.get(func):
            found = rule(self, func, args, kwargs)
        else:
            refuse_axes(name, args, kwargs)
            found = func(*args, **kwargs)
        same = isinstance(found, Tensor) and found.ndim == first.ndim and name not in MOVING
        if same and len(places) == 1:
            self.record(found, places[0])
        return found

    def pointwise(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        operands = (*args, *kwargs.values())
        for x in operands:
            if isinstance(x, OfVolume):
                raise NoCounterpart(
                    f"{func.__name__} with {x.name}: nothing says what it is of a volume. The"
                    " number of pixels, h * w, is that of voxels"
                )
        volume = None  # of the most axes
        for x in operands:
            if isinstance(x, Tensor) and self.layout(x)[1]:
                volume = x if volume is None or x.ndim > volume.ndim else volume
        if volume is not None:
            args = [beside_volume(x, self, volume) for x in args]
            kwargs = {key: beside_volume(x, self, volume) for key, x in kwargs.items()}
        return func(*args, **kwargs)


def size(shape: ImageSize, dim: int | None = None) -> Any:
    return shape if dim is None else shape[dim]


SHAPES: dict[Any, Callable[[ImageSize], Any]] = {
    "size": size,
    "dim": len,
    Tensor.shape.__get__: size,
    Tensor.ndim.__get__: len,
}


def to_sizes(x: Tensor, *sizes: Any) -> Tensor:
    """(N, C, 1, 1) or (C, 1, 1), to be expanded to sizes that hold a volume's, gets its depth."""
    sizes = sizes[0] if len(sizes) == 1 else sizes
    height = next((i for i, n in enumerate(sizes) if isinstance(n, Extent)), None)
    if height is None or x.ndim >= len(sizes):
        return x
    # Counted from behind, the axes stand beside those that they are expanded to.
    depth = height - 1 - (len(sizes) - 1 - x.ndim)
    return x.unsqueeze(depth) if depth >= 0 else x


def refuse_axes(name: str, args: tuple, kwargs: dict) -> None:
    """Raises NoCounterpart for a function that nothing is known of here, if it is given axes, or
    whole numbers that may be axes."""
    named = [key for key, value in kwargs.items() if key in AXES and value is not None]
    numbers = name not in OF_NUMBERS and any(whole(value) for value in args[1:])
    if named or numbers:
        raise NoCounterpart(
            f"{name} of a map with {', '.join(named) or 'whole numbers'}: nothing says what it "
            "does along depth"
        )


def refuse_last_axes(mode: Functions3D, name: str, operands: tuple) -> None:
    """Raises NoCounterpart for a function of the last axis or two of a tensor, if an operand is
    known to be a map that ends in height and width."""
    for x in operands:
        if isinstance(x, Tensor):
            rank, places = mode.layout(x)
            if places == (rank - 2,):
                raise NoCounterpart(
                    f"{name} acts on the last axes of a map, of its width alone or of height and "
                    "width: nothing says what becomes of depth"
                )


def whole(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(whole(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


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
    return resize(args[0], mode.known, **named, **kwargs)


def resize(x: Tensor, known: set, size=None, scale_factor=None, mode="nearest", **kwargs) -> Tensor:
    """`F.interpolate` of a volume by an image's arguments."""
    if mode == "bicubic" or kwargs.get("antialias"):
        how = "antialias=True" if kwargs.get("antialias") else "mode='bicubic'"
        raise NoCounterpart(f"interpolate with {how} has no counterpart of three axes")
    if isinstance(size, OfVolume):
        size = cube("size", size)
    elif size is not None and not isinstance(size, (tuple, list)):
        size = (size, size)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        # Plain numbers. Compiled they may be another map's height and width.
        depths = {volume[0] for volume in known if volume[1:] == tuple(size)}
        if not depths and len(set(x.shape[2:])) == 1 == len(set(size)):
            depths = {size[0]}
        if len(depths) != 1 or torch.compiler.is_compiling():
            raise NoCounterpart(f"interpolate to size={tuple(size)}: nothing says how deep")
        size = (*depths, *size)
    scale_factor = cube("scale_factor", scale_factor)
    mode = "trilinear" if mode == "bilinear" else mode
    return F.interpolate(x, size, scale_factor, mode, **kwargs)


def pad(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Widths go from the last axis to the first, two each."""
    args, kwargs = list(args), dict(kwargs)
    widths = list(args[1] if len(args) > 1 else kwargs["pad"])
    rank, (place, *_) = mode.layout(args[0])
    end = 2 * (rank - place)  # of height's
    if end - 4 < len(widths) <= 2 * rank:
        widths += [0] * (end - len(widths))
        left, right, top, bottom = widths[end - 4 : end]
        widths[end:end] = depth_of("padding", top, left), depth_of("padding", bottom, right)
    if len(args) > 1:
        args[1] = widths
    else:
        kwargs["pad"] = widths
    return func(*args, **kwargs)


def norm_of_last_axes(mode: Functions3D, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    if len(shape) < 3:  # without depth
        refuse_last_axes(mode, func.__name__, args[:1])
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
AXES = {
    "dim", "dims", "axis", "axes", "dim0", "dim1", "axis0", "axis1", "start_dim", "end_dim",
    "source", "destination",
}  # fmt: skip
# Functions whose whole numbers are no axes, and no sizes along them.
OF_NUMBERS = {
    "group_norm", "batch_norm", "instance_norm", "local_response_norm",
    "channel_shuffle", "native_channel_shuffle", "threshold", "threshold_", "hardtanh", "hardtanh_",
    "elu", "elu_", "celu", "celu_", "leaky_relu", "leaky_relu_", "rrelu", "rrelu_", "softplus",
    "softshrink", "hardshrink", "logit", "nan_to_num", "round", "round_", "dropout", "dropout_",
    "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "fill_", "full_like", "new_full",
    "new_zeros", "new_ones", "new_empty", "uniform_", "normal_", "bernoulli", "bernoulli_",
    "random_", "to", "type", "stride", "histc", "heaviside", "copysign", "ldexp",
    "cross_entropy", "nll_loss", "expand", "broadcast_to",
    "__lshift__", "__rshift__", "__reduce_ex__",
}  # fmt: skip
# Functions that act on the last axis or two, beside those of `torch.linalg`.
LAST_AXES = {
    "linear", "bilinear", "matmul", "inner", "scaled_dot_product_attention", "tril", "tril_",
    "triu", "triu_", "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft",
    "det", "logdet", "slogdet", "inverse", "pinverse", "cholesky", "qr", "svd", "matrix_exp",
    "cdist", "pairwise_distance", "trapz", "trapezoid", "cumulative_trapezoid",
}  # fmt: skip
# Functions after which height and width may stand at another place.
MOVING = {"permute", "transpose", "swapaxes", "swapdims", "flatten"}
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
    **dict.fromkeys(("layer_norm", "rms_norm"), norm_of_last_axes),
    "conv2d": conv2d,
    "conv_transpose2d": conv_transpose2d,
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "aminmax", "argmax", "argmin", "var", "std",
         "var_mean", "std_mean", "logsumexp", "special_logsumexp", "prod", "nanmean", "nansum",
         "nanmedian", "any", "all", "count_nonzero", "select", "narrow", "unbind", "index_select",
         "index_fill", "index_fill_", "index_add", "index_add_", "index_copy", "index_copy_",
         "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "median", "unflatten",
         "cummax", "cummin", "cumprod", "logcumsumexp"),
        over_axes(1),
    ),
    **dict.fromkeys(("sort", "argsort", "mode"), over_axes(1, default=-1)),
    **dict.fromkeys(
        ("norm", "linalg_norm", "linalg_vector_norm", "quantile", "nanquantile",
         "repeat_interleave", "take_along_dim"),
        over_axes(2),
    ),
    **dict.fromkeys(("topk", "kthvalue", "diff"), over_axes(2, default=-1)),
    **dict.fromkeys(
        ("softmax", "log_softmax", "softmin", "cumsum", "cat", "concat", "concatenate"),
        over_axes(1, last=True),
    ),
    "glu": over_axes(1, last=True, default=-1),
    **dict.fromkeys(
        ("chunk", "split", "tensor_split", "normalize", "cosine_similarity"),
        over_axes(2, last=True),
    ),
    "flip": flip,
    "roll": roll,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "stack": unsqueeze,
    "flatten": flatten,
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys((Tensor.mT.__get__, Tensor.mH.__get__, "adjoint"), matrix_transpose),
    "repeat": repeat,
    "tile": repeat,
    "__getitem__": getitem,
    "__setitem__": getitem,
    **dict.fromkeys(
        ("pixel_shuffle", "pixel_unshuffle", "rot90", "kron", "fft_fft2", "fft_ifft2", "fft_rfft2",
         "fft_irfft2", "fft_hfft2", "fft_ihfft2"),
        refuse,
    ),
}  # fmt: skip
