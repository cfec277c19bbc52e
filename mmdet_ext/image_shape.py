"""Shapes of volumes as a 2D network's own code expects them: (N, C, H, W).

H and W are `Extent`s, numbers that know the volume they are of. Wherever they come back together,
as new sizes, a crop or padding, the depth that goes with them is known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch


class NoCounterpart(ValueError):
    """What is done to an image and has no counterpart with three axes."""


class Extent(int):
    """H or W of a volume, or what is computed from it and from other numbers alike.

    Attributes:
        axis: 1 is height, 2 width.
        volume: (D, H, W), after the same computation.
    """

    axis: int
    volume: tuple[int, int, int]

    def __new__(cls, axis: int, volume: tuple[int, ...]) -> Extent:
        self = super().__new__(cls, volume[axis])
        self.axis, self.volume = axis, tuple(volume)
        return self

    def __mul__(self, other: Any) -> int:
        if isinstance(other, Extent) and other.axis != self.axis and other.volume == self.volume:
            return prod(self.volume)  # all pixels are all voxels
        return self._computed(operator.mul, other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> int:
        return self._computed(operator.add, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> int:
        return self._computed(operator.sub, other)

    def __floordiv__(self, other: Any) -> int:
        return self._computed(operator.floordiv, other)

    def __mod__(self, other: Any) -> int:
        return self._computed(operator.mod, other)

    def __neg__(self) -> int:
        return self._computed(operator.mul, -1)

    def __reduce__(self):
        return type(self), (self.axis, self.volume)

    def _computed(self, function: Callable[[int, int], int], other: Any) -> Any:
        if isinstance(other, Extent):
            if other.axis != self.axis:
                return function(int(self), int(other))
            volume = map(function, self.volume, other.volume)
        elif isinstance(other, int):
            volume = (function(n, other) for n in self.volume)
        else:
            return function(int(self), other)
        return Extent(self.axis, tuple(volume))


def image_shape(shape: torch.Size) -> torch.Size:
    """(N, C, D, H, W) -> (N, C, H, W) with Extents."""
    return torch.Size((*shape[:2], Extent(1, shape[2:]), Extent(2, shape[2:])))


def with_depth(values: Any) -> Any:
    """Arguments in which H is followed by W get the D before them, in nested tuples and lists."""
    if not isinstance(values, (tuple, list)):
        return values
    result = []
    for i, value in enumerate(values):
        following = values[i + 1] if i + 1 < len(values) else None
        both = isinstance(value, Extent) and isinstance(following, Extent)
        if both and (value.axis, following.axis, value.volume) == (1, 2, following.volume):
            result.append(value.volume[0])
        result.append(with_depth(value) if isinstance(value, (tuple, list)) else value)
    if len(result) == len(values) and all(map(operator.is_, result, values)):
        return values
    return tuple(result) if isinstance(values, tuple) else result


def along_depth(value: Any) -> Any:
    """What a number or a slice along height or width is along depth."""
    if isinstance(value, Extent):
        return value.volume[0]
    if isinstance(value, slice):
        return slice(along_depth(value.start), along_depth(value.stop), along_depth(value.step))
    return value


def depth_of(what: str, height: Any, width: Any) -> Any:
    """What goes along depth with `height` and `width`. Raises NoCounterpart if the two differ."""
    depth = along_depth(height)
    if depth != along_depth(width):
        raise NoCounterpart(
            f"{what} is {height} along height and {width} along width: nothing says what it is "
            "along depth"
        )
    return depth


def cube(what: str, value: Any) -> Any:
    """(n, n) -> (n, n, n); one number and three stay. One that is a map's height or width, for both
    of them, is the map's (D, H, W). Raises NoCounterpart."""
    if isinstance(value, Extent):
        depth, height, width = value.volume
        if height != width:
            raise NoCounterpart(
                f"{what} is {value} of a map of {height} x {width}: nothing says what it is along "
                "depth"
            )
        return (depth, height, width)
    if not isinstance(value, (tuple, list)) or len(value) not in (1, 2):
        return value
    return (depth_of(what, value[0], value[-1]), value[0], value[-1])
