"""Axes and indices that a 2D network's own code names, when its maps are volumes.

The rules of functions that take them, for `Functions3D`. A map's axes are those of the image, in
which height and width stand at some place: (N, C, H, W) has it at 2, (N, H, W, C) at 1, (N, H, W)
at 1. The volume's D, H and W begin at the same place. Axes out of the image's range are those of
the volume and stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmdet_ext.image_shape import Extent, NoCounterpart, depth_of, plain, together

WHOLE = slice(None)


def axes_3d(
    dims: Sequence[int], what: str, rank: int = 4, places: Sequence[int] = (2, 1), last=False
) -> tuple[int, ...]:
    """A volume's axes for those of an image that are taken together.

    Args:
        rank: axes of the image.
        places: where height and width may stand, the likeliest place first.
        last: whether the last axis, taken alone, may be that of channels where only the place is
            not known for sure.

    Raises:
        NoCounterpart: of height and width one alone is taken.
    """
    if any(not -rank <= dim < rank for dim in dims):
        return tuple(dims)
    found = {dim % rank for dim in dims}
    for place in places:
        spatial = {place, place + 1}
        alone = found == {rank - 1} and place + 1 < rank - 1
        if spatial <= found or (not spatial & found and (last or len(places) == 1 or not alone)):
            axes = {dim + (dim > place + 1) for dim in found}
            return tuple(sorted(axes | ({place + 2} if spatial <= found else set())))
    raise NoCounterpart(
        f"{what} over axes {tuple(dims)} of a map: of its spatial axes one alone is taken, and "
        "nothing says what becomes of depth"
    )


def over_axes(argument: int, last: bool = False, default: int | None = None) -> Callable:
    """The rule of a function whose argument `argument` is `dim`; `last` is as in `axes_3d`, and
    `default` the axis that is meant where none is given, if not all are."""

    def rule(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Any:
        key = next((key for key in ("dim", "axis", "dims") if key in kwargs), "dim")
        dim = args[argument] if len(args) > argument else kwargs.get(key, default)
        if isinstance(dim, int) and not isinstance(dim, bool):
            dim = (dim,)
        if not isinstance(dim, (tuple, list)) or not dim:
            return func(*args, **kwargs)
        x = args[0] if isinstance(args[0], Tensor) else args[0][0]
        dim = axes_3d(dim, func.__name__, *mode.layout(x), last)
        dim = dim[0] if len(dim) == 1 else dim
        if len(args) > argument:
            return func(*args[:argument], dim, *args[argument + 1 :], **kwargs)
        return func(*args, **{**kwargs, key: dim})

    return rule


def flip(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    dims = kwargs["dims"] if "dims" in kwargs else args[1:]
    if len(dims) == 1 and not isinstance(dims[0], int):
        (dims,) = dims
    return func(args[0], axes_3d(dims, "flip", *mode.layout(args[0])))


def roll(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    named = {**dict(zip(("shifts", "dims"), args[1:])), **kwargs}
    shifts, dims = (
        [n] if isinstance(n, int) else list(n) for n in (named["shifts"], named["dims"])
    )
    rank, places = mode.layout(args[0])
    axes = axes_3d(dims, "roll", rank, places)
    if len(axes) == len(dims):
        return func(args[0], shifts, dims)
    by = {dim % rank: shift for dim, shift in zip(dims, shifts, strict=True)}
    place = next(place for place in places if {place, place + 1} <= by.keys())
    by[place - 0.5] = depth_of("a shift", by[place], by[place + 1])  # before height
    return func(args[0], [by[dim] for dim in sorted(by)], axes)


def squeeze(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Of one spatial axis of length 1, as after global pooling, depth goes with it."""
    x, *dim = args
    dim = dim[0] if dim else kwargs.get("dim")
    rank, (place, *_) = mode.layout(x)
    spatial = (place, place + 1)
    if not isinstance(dim, int) or not -rank <= dim < rank or dim % rank not in spatial:
        return over_axes(1)(mode, func, args, kwargs)
    axis = dim % rank + 1
    if x.shape[axis] != 1:
        return x
    if x.shape[place] != 1:
        raise NoCounterpart(f"squeeze of axis {dim} of a map that is {x.shape[place]} deep")
    return func(x, (place, axis))


def unsqueeze(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Of `stack` too, whose first argument are tensors."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    x = args[0] if isinstance(args[0], Tensor) else args[0][0]
    rank, (place, *_) = mode.layout(x)
    if not -rank - 1 <= dim <= rank:
        return func(args[0], dim)
    at = dim % (rank + 1)
    # (N, H, W) may become (N, H, W, 1).
    if at > place and not at == rank == 3:
        raise NoCounterpart(
            f"{func.__name__} at {dim}: a map with an axis between or behind height and width"
        )
    found = func(args[0], at + (at > place))
    mode.record(found, place + (at <= place))
    return found


def flatten(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    named = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), args[1:]))}
    start, end = ({**named, **kwargs}[key] for key in ("start_dim", "end_dim"))
    rank, places = mode.layout(args[0])
    if -rank <= start < rank and -rank <= end < rank and start % rank < end % rank:
        axes = axes_3d(range(start % rank, end % rank + 1), "flatten", rank, places)
        start, end = axes[0], axes[-1]
    return func(args[0], start, end)


def permute(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    dims = kwargs["dims"] if "dims" in kwargs else args[1:]
    if len(dims) == 1:
        (dims,) = dims
    rank, places = mode.layout(args[0])
    if len(dims) != rank:
        return func(*args, **kwargs)
    order = [dim % rank for dim in dims]
    for place in places:
        rows = order.index(place)
        # Of a map that may be either, channels that come last go first.
        doubtful = place == 1 and len(places) > 1 and rows != 2
        if order[rows + 1 : rows + 2] == [place + 1] and not doubtful:
            axes = [dim + (dim > place + 1) for dim in order]
            found = func(args[0], (*axes[: rows + 2], place + 2, *axes[rows + 2 :]))
            mode.record(found, rows)
            return found
    raise NoCounterpart(f"permute to {tuple(dims)}: nothing says where depth goes")


def transpose(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Negative axes stay where it is not certain that the tensor is a map: attention swaps the last
    two of its matrices, which may have as many axes."""
    dims = [*args[1:], *kwargs.values()]
    rank, places = mode.layout(args[0])
    lowest = -rank if len(places) == 1 else 0
    if any(not lowest <= dim < rank for dim in dims):
        return func(*args, **kwargs)
    order = [*range(rank)]
    order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    return permute(mode, torch.permute, (args[0], order), {})


def matrix_transpose(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """`x.mT` and its like, which name no axes: refused where `x.transpose(-2, -1)` is."""
    transpose(mode, torch.transpose, (args[0], -2, -1), {})
    return func(*args)


def repeat(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    times = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
    times = tuple(kwargs.pop("dims", times))
    rank, (place, *_) = mode.layout(args[0])
    if func.__name__ == "tile":
        times = (1,) * (rank - len(times)) + times
    if len(times) == rank:
        pair = times[place : place + 2]
        times = (*times[:place], depth_of("repeat", *pair), *times[place:])
    return func(args[0], times, **kwargs)


def reshape(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Of any tensor: where H and W stand together among the sizes, D is before them by now."""
    sizes = args[1:] if len(args) != 2 or isinstance(args[1], int) else args[1]
    sizes = kwargs.get("shape", kwargs.get("size", sizes))
    if not isinstance(sizes, (tuple, list)):  # `view` of another type
        return func(*args, **kwargs)
    extents = [i for i, n in enumerate(sizes) if isinstance(n, Extent)]
    if not extents:
        return func(*args, **kwargs)
    height, *others = extents
    if others != [height + 1] or not together(*sizes[height : height + 2]):
        raise NoCounterpart(
            f"{func.__name__} to {tuple(map(plain, sizes))}: of a map's height and width one alone "
            "is a size, and nothing says what becomes of depth"
        )
    found = func(*args, **kwargs)
    mode.record(found, height - 1)
    return found


def getitem(mode: TorchFunctionMode, func: Callable, args: tuple, kwargs: dict) -> Any:
    x, index, *value = args
    if not isinstance(index, tuple):
        return func(*args)
    rank, (place, *others) = mode.layout(x)
    wide = [axes_of(item) for item in index]
    if sum(wide) > rank:
        return func(*args)  # of five axes
    at, axis, before = {}, 0, 0  # which item is at which axis; how many axes more come before D
    for i, (item, n) in enumerate(zip(index, wide)):
        at |= dict.fromkeys(range(axis, axis + n), i)
        if item is None and axis > place and not axis == rank == 3:
            raise NoCounterpart(f"an index {index}: an axis between or behind height and width")
        if axis <= place:
            before += (item is None) - isinstance(item, int)
        axis += rank - sum(wide) if item is Ellipsis else n
    pair = [index[at[a]] if a in at else WHOLE for a in (place, place + 1)]
    if others and all(at.get(a) is None or index[at[a]] == WHOLE for a in (1, 2)):
        return func(*args)  # of the channels, if they come last
    if any(isinstance(item, (Tensor, list)) for item in pair):
        if at.get(place) == at.get(place + 1) and pair[0].ndim == 3:  # a mask of voxels
            return func(*args)
        raise NoCounterpart("an index by a tensor along height or width: nothing says it of depth")
    depth = depth_of("an index", *pair)
    if place in at:
        index = (*index[: at[place]], depth, *index[at[place] :])
    found = func(x, index, *[beside_volume(v, mode, x) for v in value])
    if isinstance(found, Tensor) and isinstance(depth, slice):
        mode.record(found, place + before)
    return found


def axes_of(item: Any) -> int:
    """How many axes of an image an item of an index stands for."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.ndim - (item.ndim > 2)  # a mask of voxels
    return 1


def beside_volume(x: Any, mode: TorchFunctionMode, volume: Tensor) -> Any:
    """An operand of a pointwise function beside a volume: (N, C, 1, 1), (C, 1, 1), and (N, 1, 1, C)
    of channels last, get the axis of its depth."""
    if not isinstance(x, Tensor) or x.ndim >= volume.ndim or x.numel() == 1:
        return x
    rank, places = mode.layout(volume)
    for place in places:
        height = place - (rank - x.ndim)
        if height < -1 or (height == -1 and x.shape[0] == 1):
            return x  # channels of channels last
        if height >= 0 and tuple(x.shape[height : height + 2]) == (1, 1):
            return x.unsqueeze(height)
        # A map with fewer axes beside one with more.
        at = height - 1
        same = tuple(x.shape[at : at + 3]) == tuple(volume.shape[place : place + 3])
        if at >= 0 and same and at in mode.layout(x)[1] and (x.ndim, volume.ndim) != (4, 5):
            return x
    raise NoCounterpart(
        f"an operand of shape {tuple(x.shape)} beside a volume: a table of an image's pixels has "
        "no depth"
    )
