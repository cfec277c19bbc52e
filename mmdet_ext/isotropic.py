"""The parts of an isotropic 3D network: modules of three axes for those of two, and its forward.

Convolutions become operators in `convert.py`; what the network's own code computes by functions
becomes 3D as it runs, in `functional_3d.py`.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_ext.functional_3d import Functions3D, inflate_transposed
from mmdet_ext.image_shape import NoCounterpart, cube, plain, with_depth
from mmdet_ext.ops import SliceConv, build_conv3d

# What a module of two axes becomes, and its attributes that are one number or one an axis.
KINDS_3D: dict[type, tuple[type, tuple[str, ...]]] = {
    nn.BatchNorm2d: (nn.BatchNorm3d, ()),
    nn.InstanceNorm2d: (nn.InstanceNorm3d, ()),
    nn.Dropout2d: (nn.Dropout3d, ()),
    nn.MaxPool2d: (nn.MaxPool3d, ("kernel_size", "stride", "padding", "dilation")),
    nn.AvgPool2d: (nn.AvgPool3d, ("kernel_size", "stride", "padding")),
    nn.LPPool2d: (nn.LPPool3d, ("kernel_size", "stride")),
    nn.MaxUnpool2d: (nn.MaxUnpool3d, ("kernel_size", "stride", "padding")),
    nn.FractionalMaxPool2d: (
        nn.FractionalMaxPool3d, ("kernel_size", "output_size", "output_ratio")
    ),
    nn.AdaptiveAvgPool2d: (nn.AdaptiveAvgPool3d, ("output_size",)),
    nn.AdaptiveMaxPool2d: (nn.AdaptiveMaxPool3d, ("output_size",)),
    nn.ZeroPad2d: (nn.ZeroPad3d, ("padding",)),
    nn.ConstantPad2d: (nn.ConstantPad3d, ("padding",)),
    nn.ReflectionPad2d: (nn.ReflectionPad3d, ("padding",)),
    nn.ReplicationPad2d: (nn.ReplicationPad3d, ("padding",)),
    nn.CircularPad2d: (nn.CircularPad3d, ("padding",)),
    nn.Softmax2d: (nn.Softmax, ()),
}  # fmt: skip
REFUSED = (nn.PixelShuffle, nn.PixelUnshuffle, nn.Fold, nn.Unfold)


def kind_3d(module: nn.Module) -> type | None:
    """The class of two axes that `module` is of and that has a counterpart of three; None for what
    stays as it is: other modules, and children with a forward of their own."""
    for kind in KINDS_3D:
        if isinstance(module, kind):
            own = "forward" in vars(module) or type(module).forward is not kind.forward
            return None if own else kind
    return None


def refuse_isotropic(module: nn.Module) -> None:
    """Raises ValueError for a module, other than a convolution, that has no 3D counterpart."""
    name = type(module).__name__
    if isinstance(module, REFUSED):
        raise ValueError(f"{name} rearranges an image's channels and pixels: no 3D counterpart")
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        raise ValueError(
            f"{name} over {module.normalized_shape} is as large as the image: no 3D counterpart "
            "without knowing the depth; normalise the channels alone"
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{name} has no sizes yet; run the network once on an image")
    kind = kind_3d(module)
    for key in KINDS_3D[kind][1] if kind else ():
        axes_of(module, key)
    if getattr(module, "mode", None) == "bicubic":
        raise ValueError(f"{name} with mode='bicubic' has no 3D counterpart")


def axes_of(module: nn.Module, key: str) -> Any:
    """The value of a geometry attribute with three axes."""
    value = getattr(module, key)
    if key == "padding" and isinstance(value, tuple) and len(value) == 4:
        return cube(key, (value[:2], value[2:]))[0] * 3
    return cube(key, value)


def become_3d(module: nn.Module) -> None:
    """Turns a module into its 3D kind, in place; others stay. Weights and hooks are kept."""
    kind = kind_3d(module)
    if kind is None:
        return
    kind_of_three, attributes = KINDS_3D[kind]
    if kind is nn.AvgPool2d and module.divisor_override is not None:
        # A window is K times as many voxels as pixels.
        size = axes_of(module, "kernel_size")
        module.divisor_override *= size if isinstance(size, int) else size[0]
    for key in attributes:
        setattr(module, key, axes_of(module, key))
    if kind is nn.Softmax2d:
        module.dim = 1
    module.__class__ = kind_of_three


def transposed_3d(conv: nn.ConvTranspose2d) -> nn.ConvTranspose3d:
    """The transposed convolution for the place of `conv`, whose kernel is inflated; its bias is yet
    to be set."""
    name = type(conv).__name__
    if not {"weight", "bias"} <= conv._parameters.keys():
        raise ValueError(f"weight or bias of this {name} is computed; make it a parameter first")
    if "forward" in vars(conv) or type(conv).forward is not nn.ConvTranspose2d.forward:
        raise ValueError(f"{name} has a forward of its own; put an nn.ConvTranspose2d in its place")
    weight = inflate_transposed(conv.weight.detach(), conv.stride[0], conv.dilation[0])
    geometry = {
        key: cube(key, getattr(conv, key))
        for key in ("stride", "padding", "output_padding", "dilation")
    }
    transposed = nn.ConvTranspose3d(
        len(weight), weight.shape[1] * conv.groups, tuple(weight.shape[2:]), **geometry,
        groups=conv.groups, bias=conv.bias is not None, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    transposed.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    return transposed.train(conv.training)


class IsotropicNetwork(nn.Module):
    """A 2D network all of whose modules and calls act along three axes; made by `convert_to_3d`.

    Attributes:
        model: the 2D network, its modules 3D; its state dict has the 2D keys.
    """

    def __init__(self, model: nn.Module, convolve: Convolve2D) -> None:
        super().__init__()
        self.model = model
        self.convolve = convolve
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes (B, C, D, H, W) volumes wherever the 2D network takes (B, C, H, W) images, and
        returns what that returns, with depth in every map.

        Raises:
            ValueError: naming the module, for what its code does to an image that has no
                counterpart with three axes.
        """
        if torch.compiler.is_compiling():
            return self.run(*args, **kwargs)
        try:
            return self.run(*args, **kwargs)
        except Exception as error:
            name = self.name_of_origin(error)
            if isinstance(error, NoCounterpart):
                raise ValueError(f"{name}: {error}") from error
            error.add_note(f"In {name} of a network converted to 3D: is its code for images alone?")
            raise

    def run(self, *args: Any, **kwargs: Any) -> Any:
        outer, functions = RUNNING.functions, Functions3D(self.convolve)
        # Another network in whose forward this one runs has no say here.
        suspended = outer is not None and outer.suspended
        if outer is not None:
            outer.suspended = True
        RUNNING.functions = functions
        if not torch.compiler.is_compiling():
            self.convolve.known, self.convolve.elsewhere = functions.known, functions.elsewhere
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.ndim == 5:
                functions.record(x, 2)
        try:
            with functions:
                return self.model(*args, **kwargs)
        finally:
            RUNNING.functions = outer
            if outer is not None:
                outer.suspended = suspended

    def name_of_origin(self, error: Exception) -> str:
        """The innermost module of the network in whose forward `error` came up."""
        names = {module: name for name, module in self.model.named_modules()}
        found, trace = "", error.__traceback__
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                found = names.get(module, found)
            trace = trace.tb_next
        return found or "the model itself"


class Running(threading.local):
    """The mode that a network runs in, apart in every thread: modules suspend it."""

    functions: Functions3D | None = None
    # The module that runs by itself, if it is not the network that began it.
    alone: nn.Module | None = None


RUNNING = Running()


class Convolve2D:
    """`F.conv2d` on volumes: the operator of a converted network, for kernels that its own code
    computes or keeps; and what the network's hooks have to know of its forward.

    Args:
        config: of the operator.
    """

    def __init__(self, config: dict) -> None:
        self.config = config
        self.operators: dict[tuple, SliceConv] = {}
        # The maps that the network's last forward met, as in `Functions3D`.
        self.known: set[tuple] = set()
        self.elsewhere: set[tuple] = set()

    def __call__(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
        geometry = (stride, padding, dilation, groups)
        if x.ndim == 4:  # one sample
            return self(x.unsqueeze(0), weight, bias, *geometry).squeeze(0)
        key = (*weight.shape, *(tuple(n) if isinstance(n, list) else n for n in geometry))
        if key not in self.operators:
            self.operators[key] = self.build(weight, *geometry)
        operator = self.operators[key]
        thickness = (None,) if operator.convolve_takes_thickness else ()
        return operator.convolve(operator.fuse(x, None), weight, bias, *thickness)

    def weight_3d(self, conv: nn.Conv2d, weight: Tensor) -> nn.Parameter | Tensor:
        """What becomes of the `weight` of a convolution that stays in its place, having a forward
        of its own: the operator's. Raises ValueError if the operator holds more than that."""
        operator = isotropic_operator(
            self.config,
            weight.shape,
            conv.stride,
            padding_of(conv),
            conv.dilation,
            conv.groups,
            bias=False,
        ).to(weight.device, weight.dtype)
        if "weight" not in conv._parameters:
            self.check(operator, conv.weight)
            return weight
        self.check(operator, operator.weight)
        if operator.weight.shape == conv.weight.shape:
            return conv.weight
        operator.load_weight2d(weight)
        return operator.weight.requires_grad_(conv.weight.requires_grad)

    def build(self, weight: Tensor, stride, padding, dilation, groups) -> SliceConv:
        """The operator for these kernels, its own weight on no device."""
        shape = (*weight.shape[:2], *weight.shape[-2:])
        with torch.device("meta"):
            operator = isotropic_operator(
                self.config, shape, stride, padding, dilation, groups, bias=False
            )
        self.check(operator, weight)
        return operator

    def check(self, operator: SliceConv, weight: Tensor) -> None:
        """Raises NoCounterpart if `weight` is not all that `operator` is made of."""
        kept = {key: tuple(p.shape) for key, p in operator.named_parameters()}
        if kept != {"weight": tuple(weight.shape)}:
            raise NoCounterpart(
                f"its own code computes a kernel of shape {tuple(weight.shape)}, but a "
                f"{type(operator).__name__} holds {kept}: put an nn.Conv2d in its place"
            )


def isotropic_operator(
    config: dict, shape: Any, stride, padding, dilation, groups: int, bias: bool
) -> SliceConv:
    """The operator for a 2D convolution of kernels (C', C / groups, K, K). Raises NoCounterpart for
    one that differs along height and width."""
    geometry = dict(stride=stride, padding=padding, dilation=dilation)
    geometry = {key: cube(key, value) for key, value in geometry.items()}
    out_channels, in_channels, *kernel_size = shape
    return build_conv3d(
        config, in_channels * groups, out_channels, tuple(kernel_size), **geometry, groups=groups,
        bias=bias, depth="isotropic",
    )  # fmt: skip


def padding_of(conv: nn.Conv2d) -> Any:
    """What an operator in place of `conv` pads with zeros; otherwise a hook pads. Raises
    NoCounterpart for padding that differs along height and width."""
    padding = cube("padding", conv.padding)
    return padding if conv.padding_mode == "zeros" else 0


def has_own_code(module: nn.Module) -> bool:
    """Whether its forward may hold calls for images: neither an operator's nor, in general, one of
    torch's modules does."""
    if isinstance(module, SliceConv):
        return False
    torchs = type(module).__module__.startswith("torch.nn.")
    # Those of torch's that take axes or a size to interpolate to, or that act on the last axis, do
    # so of images.
    of_axes = (
        nn.Flatten, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.CosineSimilarity,
        nn.Unflatten, nn.Upsample, nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm,
        nn.PairwiseDistance,
    )  # fmt: skip
    return not torchs or isinstance(module, (nn.Conv2d, *of_axes))


def give_depth(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of modules that are told the size of what they make."""
    return plain(with_depth(args)), {key: plain(with_depth(x)) for key, x in kwargs.items()}


def of_one_voxel(operator: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of an operator, after `suspend`: what code for images has made an image of
    one pixel, as of a pooled vector, is a volume of one voxel."""
    x = args[0]
    return (x.unsqueeze(2), *args[1:]) if tuple(x.shape[2:]) == (1, 1) else args


def suspend(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of an operator or a module of torch, whose calls are for volumes already."""
    if RUNNING.functions is not None:
        RUNNING.functions.suspended = True


def go_on(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the same, called after errors too, and before any hook of the user's."""
    functions = RUNNING.functions
    if functions is None:
        return
    if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
        places = (2,) if isinstance(module, SliceConv) else functions.layout(args[0])[1]
        if len(places) == 1 and output.ndim == args[0].ndim:
            functions.record(output, places[0])
    functions.suspended = False


def enter(convolve: Convolve2D, module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a module with code of its own: activation checkpointing runs it again in
    the backward pass, when the network's forward, whose maps it is to know, is over."""
    if RUNNING.functions is None:
        functions = Functions3D(convolve)
        functions.known |= convolve.known
        functions.elsewhere |= convolve.elsewhere
        RUNNING.functions, RUNNING.alone = functions, module
        functions.__enter__()


def leave(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the same, called after errors too."""
    if RUNNING.alone is module:
        RUNNING.functions.__exit__(None, None, None)
        RUNNING.functions = RUNNING.alone = None


def pad_volume(sides: list[int], mode: str, operator: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of an operator for a convolution that does not pad with zeros."""
    return (F.pad(args[0], sides, mode), *args[1:])
