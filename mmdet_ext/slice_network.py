"""The 3D network that keeps depth: a 2D one on the slices, whose operators see the volumes."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ext.ops import fold, unfold


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
