"""convert_to_3d: any 2D network becomes a 3D one, with its weights.

Either depth is kept and the 2D network runs as it is on the slices, only its `nn.Conv2d`s becoming
operators that see the volumes (`slice_network.py`); or everything acts along all three axes
(`isotropic.py`).
"""

from __future__ import annotations

import copy
import functools
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ext.isotropic import (
    Convolve2D,
    IsotropicNetwork,
    become_3d,
    enter,
    give_depth,
    go_on,
    has_own_code,
    isotropic_operator,
    leave,
    of_one_voxel,
    pad_volume,
    padding_of,
    refuse_isotropic,
    suspend,
    transposed_3d,
)
from mmdet_ext.ops import OPERATORS, SliceConv, build_conv3d
from mmdet_ext.slice_network import Calls, Network3D, slices_to_volumes, volumes_to_slices

# With slices as images these would take the batch for channels or depth.
MODULES_3D = (
    nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.InstanceNorm3d, nn.MaxPool3d, nn.AvgPool3d,
    nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d, nn.FractionalMaxPool3d, nn.LPPool3d,
    nn.MaxUnpool3d,
)  # fmt: skip


def convert_to_3d(
    model: nn.Module,
    conv: str | dict = "AlignShiftConv",
    in_channels: int = 1,
    stem: str = "middle",
    skip_first_conv: bool | None = None,
    depth: str = "keep",
    **conv_kwargs,
) -> Network3D | IsotropicNetwork:
    """Makes a 3D network out of a 2D one, keeping its weights (AlignShift, MICCAI 2020; ACS, JBHI
    2021). `model` itself stays as it is.

        network = convert_to_3d(resnet, "AlignShiftConv", n_fold=8)
        features = network(volume, thickness)  # (B, 1, D, H, W) and (B,) mm -> (B, C, D, h, w)

        network = convert_to_3d(resnet, "ACSConv", depth="isotropic")
        features = network(volume)  # (B, 1, D, H, W) -> (B, C, d, h, w)

    Every `nn.Conv2d` becomes an operator. With depth='keep' the rest of the network, code in its
    `forward` included, runs slice by slice: BatchNorm counts slices as images, and a pooled feature
    is a slice's. With 'isotropic' stride, padding, dilation, pooling, interpolation and norms act
    along depth as in-plane; a functional call in a `forward` does so too.

    Args:
        model: the network. "First" below means in the order of registration.
        conv: operator, by name or as `dict(type='AlignShiftConv', n_fold=8)`. Isotropic networks
            take 'ACSConv', 'MeanACSConv', 'SoftACSConv', 'I3DConv' (plain 3D), 'SliceConv' (2.5D),
            'P3DConv' and 'TSMConv'.
        in_channels: channels of the volume. If the first convolution has more, it is reduced to 1.
        stem: the reduced first kernel is the 'middle' one of the channels (of RGB the green, as in
            the released DeepLesion models) or their 'sum'.
        skip_first_conv: the first convolution does not fuse, whatever `conv` is. None: so it is
            with depth='keep'.
        depth: 'keep' or 'isotropic'.
        **conv_kwargs: options of the operator.

    Raises:
        ValueError: a module, named by its path, that an operator cannot stand in for, that would
            mix the slices, or that has no 3D counterpart; options out of range.
        TypeError: the operator does not take one of the options, or lacks one.
    """
    if stem not in ("middle", "sum"):
        raise ValueError(f"stem must be 'middle' or 'sum', got {stem!r}")
    if depth not in ("keep", "isotropic"):
        raise ValueError(f"depth must be 'keep' or 'isotropic', got {depth!r}")
    isotropic = depth == "isotropic"
    skip_first_conv = not isotropic if skip_first_conv is None else skip_first_conv
    config = dict(**({"type": conv} if isinstance(conv, str) else conv), **conv_kwargs)
    # Options are refused even where no convolution would come to take them.
    probe = nn.Conv2d(16, 16, 1, device="meta")
    operator_for(probe, config, probe.weight, isotropic)

    operators: dict[nn.Module, nn.Module] = {}
    kept: dict[nn.Module, SimpleNamespace] = {}
    convolve, first = Convolve2D(config), True
    for name, module in model.named_modules():
        try:
            refuse(module, isotropic)
            if isotropic and isinstance(module, nn.ConvTranspose2d):
                operators[module] = transposed_3d(module)
            if not isinstance(module, nn.Conv2d):
                continue
            weight = stem_weight(module, in_channels, stem) if first else module.weight
            options = {"type": "SliceConv"} if first and skip_first_conv else config
            if isotropic and (why := computes_by_itself(module)):
                if options["type"] != config["type"]:
                    raise ValueError(f"skip_first_conv=True does not reach this convolution: {why}")
                kept[module] = SimpleNamespace(weight=convolve.weight_3d(module, weight))
            else:
                operators[module] = operator_for(module, options, weight, isotropic)
            first = False
        except ValueError as error:
            raise ValueError(f"{name or 'the model itself'}: {error}") from None
    refuse_torn_weights(model, {**operators, **kept})

    fusing = [m for m in operators.values() if isinstance(m, SliceConv)]
    none = not kept and (fusing or not isotropic) and not any(m.fuses for m in fusing)
    if config["type"] != "SliceConv" and none:
        warnings.warn(
            f"none of the {len(fusing)} convolutions of the converted {type(model).__name__} "
            f"sees another slice, with skip_first_conv={skip_first_conv} and {config}",
            stacklevel=2,
        )
    if isotropic:
        return isotropic_network(model, operators, kept, convolve)
    return slice_network(model, operators)


def slice_network(model: nn.Module, operators: dict[nn.Module, nn.Module]) -> Network3D:
    """The copy of `model` on slices, with operators for convolutions."""
    calls = Calls()
    for name, module in model.named_modules():
        if module in operators:
            operators[module].register_forward_pre_hook(
                functools.partial(slices_to_volumes, calls, name), with_kwargs=True
            )
            operators[module].register_forward_hook(volumes_to_slices)
    return Network3D(copy_with(model, operators), calls)


def isotropic_network(
    model: nn.Module,
    operators: dict[nn.Module, nn.Module],
    kept: dict[nn.Module, SimpleNamespace],
    convolve: Convolve2D,
) -> IsotropicNetwork:
    """The copy of `model` with operators for convolutions and all else of three axes. `kept` are
    the convolutions that stay in their place, and their weights."""
    for module, operator in operators.items():
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            sides = [*module._reversed_padding_repeated_twice[:2]] * 3
            operator.register_forward_pre_hook(
                functools.partial(pad_volume, sides, module.padding_mode)
            )
    weights = {
        id(conv.weight): new.weight
        for conv, new in kept.items()
        if "weight" in conv._parameters and new.weight is not conv.weight
    }
    network = copy_with(model, operators, weights)
    for module in network.modules():
        become_3d(module)
        if has_own_code(module):
            module.register_forward_pre_hook(functools.partial(enter, convolve))
            module.register_forward_hook(leave, always_call=True)
        elif not any(module.children()):
            # An operator has no hooks but ours. Those of other modules are code for images.
            module.register_forward_pre_hook(suspend, prepend=isinstance(module, SliceConv))
            module.register_forward_hook(go_on, prepend=True, always_call=True)
            if isinstance(module, SliceConv):
                module.register_forward_pre_hook(of_one_voxel)
            if isinstance(module, (nn.ConvTranspose3d, nn.MaxUnpool3d)):
                module.register_forward_pre_hook(give_depth, with_kwargs=True)
    return IsotropicNetwork(network, convolve)


def copy_with(
    model: nn.Module, operators: dict[nn.Module, nn.Module], weights: dict[int, Any] | None = None
) -> nn.Module:
    """A deep copy of `model` with `operators` in place of its convolutions, and of weights by their
    id."""
    # What the memo holds, deepcopy takes instead of a copy: wherever the network refers to a
    # convolution or to a weight, its copy refers to the operator and to the new weight.
    memo: dict[int, Any] = {id(module): operator for module, operator in operators.items()}
    memo |= weights or {}
    for module, operator in operators.items():
        take_over(operator, module, memo)
    return copy.deepcopy(model, memo)


def refuse(module: nn.Module, isotropic: bool) -> None:
    """Raises ValueError for a module that operators cannot stand in for, that would mix the slices
    or has no 3D counterpart."""
    kind = type(module).__name__
    if isinstance(module, (Network3D, IsotropicNetwork, *OPERATORS.values())):
        raise ValueError(f"{kind} is 3D already; convert the 2D network it came from")
    if isinstance(module, MODULES_3D):
        raise ValueError(f"{kind} would mix the slices; convert the 2D part of the network alone")
    if not isinstance(module, nn.Conv2d):
        if isotropic:
            refuse_isotropic(module)
        return
    if isinstance(module, nn.LazyConv2d):
        raise ValueError(f"{kind} has no weight yet; run the network once on an image")
    why = computes_by_itself(module)
    if why:
        # Its functional convolution is converted as it runs.
        if isotropic:
            return
        raise ValueError(why)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(vars(module)[key] for key in hooks):
        raise ValueError(f"the hooks of this {kind} would be lost; remove them")
    if module.padding_mode != "zeros" and not isotropic:
        raise ValueError(f"operators pad with zeros, not by padding_mode={module.padding_mode!r}")


def computes_by_itself(conv: nn.Conv2d) -> str:
    """Why an operator cannot stand in for `conv`, which convolves by more than weight and bias."""
    kind = type(conv).__name__
    if not {"weight", "bias"} <= conv._parameters.keys():
        return (
            f"weight or bias of this {kind} is computed (parametrization, weight norm, pruning); "
            "make it a parameter first, e.g. by torch.nn.utils.parametrize.remove_parametrizations"
        )
    methods = ("forward", "_conv_forward")
    if "forward" in vars(conv) or any(
        getattr(type(conv), method) is not getattr(nn.Conv2d, method) for method in methods
    ):
        return (
            f"{kind} has a forward of its own; put an nn.Conv2d in its place (if it computes the "
            "same, by `module.__class__ = torch.nn.Conv2d`)"
        )
    return ""


def stem_weight(conv: nn.Conv2d, in_channels: int, stem: str) -> Tensor:
    """Weight of the first convolution for a volume of `in_channels`."""
    channels = conv.weight.shape[1] * conv.groups
    if channels == in_channels:
        return conv.weight
    if in_channels != 1 or conv.groups != 1 or (stem == "middle" and channels % 2 == 0):
        raise ValueError(
            f"the first convolution takes {channels} channels in {conv.groups} group(s), which "
            f"cannot become in_channels={in_channels} by stem={stem!r}: in_channels={channels} "
            "keeps them; 'middle' makes 1 of an odd number, 'sum' of any, without groups"
        )
    middle = channels // 2
    return conv.weight[:, middle : middle + 1] if stem == "middle" else conv.weight.sum(1, True)


def operator_for(conv: nn.Conv2d, config: dict, weight: Tensor, isotropic: bool) -> nn.Module:
    """The operator of `config` for the place of `conv`. Its weight is set from `weight` if it has
    another shape than conv's; if not, `take_over` will do."""
    # The weight's sizes, not the attributes: they are what nn.Conv2d computes with.
    out_channels, in_channels, *kernel_size = weight.shape
    if isotropic:
        operator = isotropic_operator(
            config, weight.shape, conv.stride, padding_of(conv), conv.dilation, conv.groups,
            bias=conv.bias is not None,
        )  # fmt: skip
    else:
        operator = build_conv3d(
            config, in_channels * conv.groups, out_channels, tuple(kernel_size),
            stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
            bias=conv.bias is not None,
        )  # fmt: skip
    operator.to(conv.weight.device, conv.weight.dtype)
    if operator.weight.shape != conv.weight.shape:
        operator.load_weight2d(weight)
        operator.weight.requires_grad_(conv.weight.requires_grad)
    operator.train(conv.training)
    return operator


def refuse_torn_weights(model: nn.Module, operators: dict[nn.Module, nn.Module]) -> None:
    """Raises ValueError for a weight of several modules that not all would have in one shape."""
    shapes: dict[int, torch.Size] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            shape = getattr(operators.get(module), key, parameter).shape
            if shapes.setdefault(id(parameter), shape) != shape:
                raise ValueError(
                    f"{name}.{key}: shared with a module that keeps its 2D shape, or gets another "
                    "one; give them weights of their own"
                )


def take_over(operator: nn.Module, conv: nn.Conv2d, memo: dict[int, Any]) -> None:
    """Gives `operator` copies of what `conv` holds, its own weight excepted if shaped otherwise."""
    if operator.weight.shape != conv.weight.shape:
        memo.setdefault(id(conv.weight), operator.weight)
    for key, value in vars(conv).items():
        value = copy.deepcopy(value, memo)
        if key not in vars(operator):
            vars(operator)[key] = value
        elif isinstance(value, (dict, set)):  # of parameters, buffers, hooks on loading ...
            vars(operator)[key] |= value
