"""Axes and indices that a 2D network's own code names, when its maps are volumes.

The rules of functions that take them, for `Functions3D`: axes are those of (N, C, H, W) or, where
the last one is apart from two others, of (N, H, W, C); those of five stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmdet_ext.image_shape import NoCounterpart, depth_of


def axes_3d(dims: Sequence[int], what: str, last: bool = False) -> tuple[int, ...]:
    """A volume's axes for those of an image that are taken together; with `last` the last one may
    be taken alone: channels, where these come last. Raises NoCounterpart."""
    if any(not -4 <= dim <= 3 for dim in dims):
        return tuple(dims)  # of five axes
    found = {dim % 4 for dim in dims}
    if {2, 3} <= found:
        return tuple(sorted(found | {4}))
    if {1, 2} <= found:
        return tuple(sorted(found | {3}))
    if found <= {0, 1}:
        return tuple(sorted(found))
    if last and found == {3}:
        return (4,)
    raise NoCounterpart(
        f"{what} over axes {tuple(dims)} of a map: of its spatial axes one alone is taken, and "
        "nothing says what becomes of depth"
    )


def over_axes(place: int, last: bool = False) -> Callable:
    """The rule of a function whose argument `place` is `dim`; `last` is as in `axes_3d`."""

    def rule(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Any:
        dim = args[place] if len(args) > place else kwargs.get("dim", kwargs.get("axis"))
        if isinstance(dim, int) and not isinstance(dim, bool):
            dim = (dim,)
        if not isinstance(dim, (tuple, list)) or not dim:
            return func(*args, **kwargs)
        dim = axes_3d(dim, func.__name__, last)
        dim = dim[0] if len(dim) == 1 else dim
        if len(args) > place:
            return func(*args[:place], dim, *args[place + 1 :], **kwargs)
        return func(*args, **{**kwargs, "axis" if "axis" in kwargs else "dim": dim})

    return rule


def flip(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    dims = kwargs["dims"] if "dims" in kwargs else args[1:]
    if len(dims) == 1 and not isinstance(dims[0], int):
        (dims,) = dims
    return func(args[0], axes_3d(dims, "flip"))


def squeeze(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Of one spatial axis of length 1, as after global pooling, depth goes with it."""
    x, *dim = args
    dim = dim[0] if dim else kwargs.get("dim")
    if not isinstance(dim, int) or not -4 <= dim <= 3 or dim % 4 < 2:
        return over_axes(1)(mode, func, args, kwargs)
    axis = dim % 4 + 1
    if x.shape[axis] != 1:
        return x
    if x.shape[2] != 1:
        raise NoCounterpart(f"squeeze of axis {dim} of a map that is {x.shape[2]} deep")
    return func(x, (2, axis))


def flatten(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    named = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), args[1:]))}
    start, end = ({**named, **kwargs}[key] for key in ("start_dim", "end_dim"))
    if -4 <= start <= 3 and -4 <= end <= 3 and start % 4 < end % 4:
        axes = axes_3d(range(start % 4, end % 4 + 1), "flatten")
        start, end = axes[0], axes[-1]
    return func(args[0], start, end)


def permute(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    dims = kwargs["dims"] if "dims" in kwargs else args[1:]
    if len(dims) == 1:
        (dims,) = dims
    if len(dims) != 4:
        return func(*args, **kwargs)
    order = [dim % 4 for dim in dims]
    if order == [0, 3, 1, 2]:  # channels last to channels first
        return func(args[0], (0, 4, 1, 2, 3))
    rows = order.index(2)
    if order[rows : rows + 2] != [2, 3]:
        raise NoCounterpart(f"permute to {tuple(dims)}: nothing says where depth goes")
    return func(args[0], (*order[: rows + 2], 4, *order[rows + 2 :]))


def transpose(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Negative axes stay: the last two are swapped of many a tensor that is no map."""
    dims = [*args[1:], *kwargs.values()]
    if any(not 0 <= dim <= 3 for dim in dims):
        return func(*args, **kwargs)
    order = [*range(4)]
    order[dims[0]], order[dims[1]] = dims[1], dims[0]
    return permute(mode, torch.permute, (args[0], order), {})


def repeat(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    times = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
    if len(times) == 4:
        times = (*times[:2], depth_of("repeat", *times[2:]), *times[2:])
    return func(args[0], *times, **kwargs)


def getitem(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Any:
    x, index, *value = args
    if not isinstance(index, tuple) or any(item is None for item in index):
        return func(*args)
    if any(isinstance(item, Tensor) for item in index):
        return func(*args)
    if index and index[-1] is Ellipsis:
        index = index[:-1]
    gap = [i for i, item in enumerate(index) if item is Ellipsis]
    if not gap and len(index) == 3:
        index = (*index, slice(None))
    after = len(index) - 1 - gap[0] if gap else len(index) - 2
    if after not in ((2, 3) if gap else (2,)):
        return func(*args)
    pair = index[-2:]
    depth = depth_of("an index", *pair)
    return func(x, (*index[:-2], depth, *pair), *value)
