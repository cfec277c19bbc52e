"""convert_to_3d: any 2D network becomes a 3D one that sees the neighbouring slices.

The 2D network runs as it is, on the B*D slices of a batch of volumes as on B*D images; only its
`nn.Conv2d`s become context-fusion operators, each of which sees the volumes.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ext.ops import OPERATORS, SliceConv, build_conv3d, fold, unfold

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
    skip_first_conv: bool = True,
    **conv_kwargs,
) -> Network3D:
    """Makes a 3D network out of a 2D one, keeping its weights (AlignShift, MICCAI 2020; ACS, JBHI
    2021). `model` itself stays as it is.

        network = convert_to_3d(resnet, "AlignShiftConv", n_fold=8)
        features = network(volume, thickness)  # (B, 1, D, H, W) and (B,) mm -> (B, C, D, h, w)

    Every `nn.Conv2d` becomes an operator; the rest of the network, code in its `forward` included,
    runs slice by slice. So BatchNorm counts slices as images, and a pooled feature is a slice's.

    Args:
        model: the network. "First" below means in the order of registration.
        conv: operator, by name or as `dict(type='AlignShiftConv', n_fold=8)`.
        in_channels: channels of the volume. If the first convolution has more, it is reduced to 1.
        stem: the reduced first kernel is the 'middle' one of the channels (of RGB the green, as in
            the released DeepLesion models) or their 'sum'.
        skip_first_conv: the first convolution does not fuse, whatever `conv` is.
        **conv_kwargs: options of the operator.

    Raises:
        ValueError: a module, named by its path, that an operator cannot stand in for or that would
            mix the slices; options out of range.
        TypeError: the operator does not take one of the options, or lacks one.
    """
    if stem not in ("middle", "sum"):
        raise ValueError(f"stem must be 'middle' or 'sum', got {stem!r}")
    config = dict(**({"type": conv} if isinstance(conv, str) else conv), **conv_kwargs)
    # Options are refused even where no convolution would come to take them.
    probe = nn.Conv2d(16, 16, 1, device="meta")
    operator_for(probe, config, probe.weight)

    calls = Calls()
    operators: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        try:
            refuse(module)
            if not isinstance(module, nn.Conv2d):
                continue
            first = not operators
            operators[module] = operator = operator_for(
                module,
                {"type": "SliceConv"} if first and skip_first_conv else config,
                stem_weight(module, in_channels, stem) if first else module.weight,
            )
        except ValueError as error:
            raise ValueError(f"{name or 'the model itself'}: {error}") from None
        operator.register_forward_pre_hook(
            functools.partial(slices_to_volumes, calls, name), with_kwargs=True
        )
        operator.register_forward_hook(volumes_to_slices)
    refuse_torn_weights(model, operators)

    if config["type"] != "SliceConv" and all(map(is_plain, operators.values())):
        warnings.warn(
            f"none of the {len(operators)} convolutions of the converted {type(model).__name__} "
            f"sees another slice, with skip_first_conv={skip_first_conv} and {config}",
            stacklevel=2,
        )
    # What the memo holds, deepcopy takes instead of a copy: wherever the network refers to a
    # convolution or to a weight, its copy refers to the operator and to the new weight.
    memo: dict[int, Any] = {id(module): operator for module, operator in operators.items()}
    for module, operator in operators.items():
        take_over(operator, module, memo)
    return Network3D(copy.deepcopy(model, memo), calls)


class Network3D(nn.Module):
    """A 2D network that runs on volumes; made by `convert_to_3d`.

    Attributes:
        model: the 2D network with operators for convolutions; its state dict has the 2D keys.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        super().__init__()
        self.model = model
        self.calls = calls
        self.training = model.training

    def forward(self, volume: Any, thickness: Tensor | None = None) -> Any:
        """Runs the network on all slices of the volumes.

        Args:
            volume: (B, C, D, H, W), or what the 2D network takes: a tuple, list or dict of such
                volumes, equal in B and D.
            thickness: (B,) mm, for the operators that ask for it.

        Returns:
            what the 2D network returns, D put after the second dimension of every tensor that has
            B*D in the first ((B*D, C, h, w) -> (B, C, D, h, w), (B*D, K) -> (B, K, D)), inside
            tuples, lists and dicts too; all else as it is.

        Raises:
            ValueError: volumes or thickness of another shape; a convolution that is given other
                images than the B*D slices.
        """
        batch, depth = batch_and_depth(volume)
        if thickness is not None and getattr(thickness, "shape", None) != (batch,):
            raise ValueError(
                f"thickness must be a tensor of shape ({batch},), one number of mm a volume, "
                f"got {thickness}"
            )
        call = Call(batch, depth, thickness)
        outer, self.calls.running = self.calls.running, call
        try:
            output = self.model(map_tensors(fold, volume))
        finally:
            self.calls.running = outer
        return map_tensors(functools.partial(self.finish, call), output)

    def finish(self, call: Call, output: Tensor) -> Tensor:
        """Unfolds an output of `call`."""
        # The node of the tensor that `output` is a view of: a change in place leaves just this one.
        base = output if output._base is None else output._base
        if not torch.compiler.is_compiling() and base.grad_fn is not None:
            # Activation checkpointing in the model runs operators again in the backward pass, which
            # begins here: by then this call is over, and others may have come since.
            base.grad_fn.register_prehook(lambda gradients: self.calls.resume(call))
        if output.ndim == 0 or output.shape[0] != call.batch * call.depth:
            return output
        if output.ndim == 1:
            return output.unflatten(0, (call.batch, call.depth))
        return unfold(output, call.batch)


@dataclass(frozen=True)
class Call:
    """What the operators must know of one forward pass: B, D and thickness, (B,) mm."""

    batch: int
    depth: int
    thickness: Tensor | None


class Calls(threading.local):
    """The calls of one converted network, which its operators look at; apart in every thread.

    Copies and pickles are empty.
    """

    running: Call | None = None
    # Weak, so that a call is not taken for a later one's once its graph is gone.
    resumed: Callable[[], Call | None] = staticmethod(lambda: None)

    def resume(self, call: Call) -> None:
        """From now on this thread computes the backward pass of `call`."""
        self.resumed = weakref.ref(call)

    def __reduce__(self):
        return type(self), ()


def slices_to_volumes(
    calls: Calls, name: str, operator: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """Forward pre-hook: (B*D, C, H, W) -> (B, C, D, H, W) and the thickness."""
    (x,) = (*args, *kwargs.values())
    call = calls.running or calls.resumed()
    if call is None:
        raise RuntimeError(
            f"{name}: this {type(operator).__name__} belongs to a converted network and runs only "
            "within that network's forward, or backward from its outputs"
        )
    if x.ndim != 4 or x.shape[0] != call.batch * call.depth:
        raise ValueError(
            f"{name}: expected the {call.batch} x {call.depth} slices of the volumes as images, "
            f"got {tuple(x.shape)}: a network that regroups its images cannot be converted"
        )
    return (unfold(x, call.batch), call.thickness), {}


def volumes_to_slices(operator: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook: (B, C, D, H, W) -> (B*D, C, H, W)."""
    images = fold(output)
    # Checkpointing's first pass records no gradients, and a view made in it may not be changed in
    # place afterwards, as the network may do with what a convolution gave it.
    return images if torch.is_grad_enabled() else images.detach()


def batch_and_depth(volume: Any) -> tuple[int, int]:
    """B and D of a volume or of a collection of them; refuses what is not (B, C, D, H, W)."""
    shapes: list[torch.Size] = []
    map_tensors(lambda x: shapes.append(x.shape), volume)
    for shape in shapes:
        if len(shape) != 5:
            hint = "; one image is a volume of one slice, x.unsqueeze(2)" if len(shape) == 4 else ""
            raise ValueError(f"expected a (B, C, D, H, W) volume, got {tuple(shape)}{hint}")
    if len({(shape[0], shape[2]) for shape in shapes}) != 1:
        found = ", ".join(str(tuple(shape)) for shape in shapes) or type(volume).__name__
        raise ValueError(f"expected (B, C, D, H, W) volumes, equal in B and D, got {found}")
    return shapes[0][0], shapes[0][2]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`function` of every tensor in nested tuples, lists and dicts; all else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = value.copy()
        for key, item in value.items():
            mapped[key] = map_tensors(function, item)
        return mapped
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def refuse(module: nn.Module) -> None:
    """Raises ValueError for a module that operators cannot stand in for, or that mixes slices."""
    kind = type(module).__name__
    if isinstance(module, (Network3D, *OPERATORS.values())):
        raise ValueError(f"{kind} is 3D already; convert the 2D network it came from")
    if isinstance(module, MODULES_3D):
        raise ValueError(f"{kind} would mix the slices; convert the 2D part of the network alone")
    if not isinstance(module, nn.Conv2d):
        return
    if isinstance(module, nn.LazyConv2d):
        raise ValueError(f"{kind} has no weight yet; run the network once on an image")
    if not {"weight", "bias"} <= module._parameters.keys():
        raise ValueError(
            f"weight or bias of this {kind} is computed (parametrization, weight norm, pruning); "
            "make it a parameter first, e.g. by torch.nn.utils.parametrize.remove_parametrizations"
        )
    methods = ("forward", "_conv_forward")
    if "forward" in vars(module) or any(
        getattr(type(module), method) is not getattr(nn.Conv2d, method) for method in methods
    ):
        raise ValueError(
            f"{kind} has a forward of its own; put an nn.Conv2d in its place (if it computes the "
            "same, by `module.__class__ = torch.nn.Conv2d`)"
        )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(vars(module)[key] for key in hooks):
        raise ValueError(f"the hooks of this {kind} would be lost; remove them")
    if module.padding_mode != "zeros":
        raise ValueError(f"operators pad with zeros, not by padding_mode={module.padding_mode!r}")


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


def operator_for(conv: nn.Conv2d, config: dict, weight: Tensor) -> nn.Module:
    """The operator of `config` for the place of `conv`. Its weight is set from `weight` if it has
    another shape than conv's; if not, `take_over` will do."""
    # The weight's sizes, not the attributes: they are what nn.Conv2d computes with.
    out_channels, in_channels, *kernel_size = weight.shape
    operator = build_conv3d(
        config, in_channels * conv.groups, out_channels, tuple(kernel_size), stride=conv.stride,
        padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
        bias=conv.bias is not None,
    ).to(conv.weight.device, conv.weight.dtype)  # fmt: skip
    if operator.weight.shape != conv.weight.shape:
        operator.load_weight2d(weight)
        operator.weight.requires_grad_(conv.weight.requires_grad)
    operator.train(conv.training)
    return operator


def is_plain(operator: nn.Module) -> bool:
    """Whether it sees one slice alone; shifts do where their part (n_fold) of the channels is 0."""
    return type(operator) is SliceConv or getattr(operator, "n_fold", 1) > operator.in_channels


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
