"""Shapes of volumes as a 2D network's own code expects them: (N, C, H, W).

H and W are `Extent`s, numbers that know the volume they are of. Wherever they come back together,
as new sizes, a crop or padding, the depth that goes with them is known. Where the code asks
something whose answer is another one for depth, that is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch


class NoCounterpart(ValueError):
    """What is done to an image and has no counterpart with three axes."""


class OfVolume:
    """A number computed from H or W of a volume, beside what the same computation gives for D.

    Attributes:
        axis: 1 is height, 2 width.
        volume: (D, H, W), after the same computation.
        known: volumes that have been met, in which one that is turned into plain numbers by `int`
            is put down. Their depth is found there when these numbers come back as sizes.
    """

    axis: int
    volume: tuple
    known: set

    def __new__(cls, axis: int, volume: tuple, known: set | None = None):
        self = super().__new__(cls, volume[axis])
        self.axis, self.volume = axis, tuple(volume)
        self.known = set() if known is None else known
        return self

    def __reduce__(self):
        return type(self), (self.axis, self.volume)

    @property
    def plain(self) -> Any:
        return self.volume[self.axis]

    @property
    def name(self) -> str:
        return f"a map's {'height' if self.axis == 1 else 'width'} ({self.plain} of {self.volume})"

    def mapped(self, function: Callable) -> Any:
        return of_volume(self.axis, map(function, self.volume), self.known)

    def _times(self, other: OfVolume) -> Any:
        """All pixels are all voxels; of N * h * w likewise."""
        for a, b in ((self, other), (other, self)):
            if all(b.volume) and len({n / m for n, m in zip(a.volume, b.volume)}) == 1:
                times = a.volume[0] / b.volume[0]
                if times == int(times):
                    return int(times) * prod(b.volume)
        raise NoCounterpart(f"{self.name} times {other.name}: nothing says what it is of a volume")

    def __bool__(self) -> bool:
        return self._same("the truth", bool)

    def __float__(self) -> float:
        return float(self._same("float()", lambda n: n))

    def __int__(self) -> int:
        self.known.add(tuple(int(n) for n in self.volume))
        return int(self.plain)

    def _same(self, what: str, function: Callable) -> Any:
        answer = function(self.plain)
        if answer != function(self.volume[0]):
            raise NoCounterpart(f"{what} of {self.name} is another one of its depth")
        return answer

    def __divmod__(self, other: Any) -> tuple:
        return self // other, self % other

    def __round__(self, digits: int | None = None) -> Any:
        return self.mapped(lambda n: round(n, digits))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def of_volume(axis: int, values: Any, known: set) -> OfVolume:
    values = tuple(values)
    kind = Extent if all(isinstance(n, int) for n in values) else RealExtent
    return kind(axis, values, known)


def computed(function: Callable, self: OfVolume, other: Any, reflected: bool = False) -> Any:
    if isinstance(other, OfVolume):
        if other.axis != self.axis:
            if function is operator.mul:
                return self._times(other)
            return function(self.plain, other.plain)
        return of_volume(self.axis, map(function, self.volume, other.volume), self.known)
    return self.mapped(lambda n: function(other, n) if reflected else function(n, other))


def unary(function: Callable) -> Callable:
    return lambda self: self.mapped(function)


def binary(function: Callable, reflected: bool = False) -> Callable:
    def method(self: OfVolume, other: Any) -> Any:
        return computed(function, self, other, reflected) if is_number(other) else NotImplemented

    return method


def comparison(function: Callable, of_both: Callable | None) -> Callable:
    """`of_both` joins the answers of two numbers of the same axis and of their depths; without it
    the two have to be the same."""

    def method(self: OfVolume, other: Any) -> Any:
        if not is_number(other):
            return NotImplemented
        if not isinstance(other, OfVolume):
            return self._same(f"{function.__name__} with {other}", lambda n: function(n, other))
        here = function(self.plain, other.plain)
        if other.axis != self.axis:
            return here
        depth = function(self.volume[0], other.volume[0])
        if of_both is not None:
            return of_both(here, depth)
        if here != depth:
            raise NoCounterpart(
                f"{function.__name__} of {self.name} and {other.name} is another one of their depth"
            )
        return here

    return method


# The arithmetic and the comparisons of numbers, for each axis by itself.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _function = getattr(operator, _name)
    setattr(OfVolume, f"__{_name}__", binary(_function))
    setattr(OfVolume, f"__r{_name}__", binary(_function, reflected=True))
for _name in ("neg", "pos", "abs"):
    setattr(OfVolume, f"__{_name}__", unary(getattr(operator, _name)))
for _name in ("floor", "ceil", "trunc"):
    setattr(OfVolume, f"__{_name}__", unary(getattr(math, _name)))
for _name, _of_both in (
    ("eq", operator.and_), ("ne", operator.or_), ("lt", None), ("le", None), ("gt", None),
    ("ge", None),
):  # fmt: skip
    setattr(OfVolume, f"__{_name}__", comparison(getattr(operator, _name), _of_both))


class Extent(OfVolume, int):
    """H or W of a volume, or a whole number computed from it."""

    __hash__ = int.__hash__


class RealExtent(OfVolume, float):
    """A number computed from H or W of a volume that need not be whole: h / 2."""

    __hash__ = float.__hash__


class ImageSize(tuple):
    """(N, C, H, W) of a volume, or a part of it."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return ImageSize(found) if isinstance(index, slice) else found

    def numel(self) -> int:
        """Of the volume, in voxels."""
        return prod(map(plain, with_depth(tuple(self))))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For `numpy.prod` and the like: of the volume, D included."""
        found = torch.tensor([plain(n) for n in with_depth(tuple(self))]).numpy()
        return found if dtype is None else found.astype(dtype)


def image_shape(shape: torch.Size, place: int = 2, known: set | None = None) -> ImageSize:
    """The shape of a volume, whose (D, H, W) begin at `place`, without D and with Extents."""
    volume = tuple(shape[place : place + 3])
    extents = (Extent(1, volume, known), Extent(2, volume, known))
    return ImageSize((*shape[:place], *extents, *shape[place + 3 :]))


def with_depth(values: Any) -> Any:
    """Arguments in which H is followed by W get the D before them, in nested tuples and lists."""
    if not isinstance(values, (tuple, list)):
        return values
    result = []
    for i, value in enumerate(values):
        if together(*values[i : i + 2]):
            result.append(value.volume[0])
        result.append(with_depth(value) if isinstance(value, (tuple, list)) else value)
    if len(result) == len(values) and all(map(operator.is_, result, values)):
        return values
    return tuple(result) if isinstance(values, tuple) else result


def together(height: Any, width: Any = None) -> bool:
    """Whether they are the height and the width of one volume."""
    both = isinstance(height, Extent) and isinstance(width, Extent)
    return both and (height.axis, width.axis, height.volume) == (1, 2, width.volume)


def along_depth(value: Any) -> Any:
    """What a number or a slice along height or width is along depth."""
    if isinstance(value, OfVolume):
        return value.volume[0]
    if isinstance(value, slice):
        return slice(along_depth(value.start), along_depth(value.stop), along_depth(value.step))
    return value


def plain(value: Any) -> Any:
    """Without the volume that goes with a number, in slices, tuples and lists too."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else value
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value.plain if isinstance(value, OfVolume) else value


def depth_of(what: str, height: Any, width: Any) -> Any:
    """What goes along depth with `height` and `width`. Raises NoCounterpart if the two differ."""
    depth = along_depth(height)
    if depth != along_depth(width):
        raise NoCounterpart(
            f"{what} is {plain(height)} along height and {plain(width)} along width: nothing says "
            "what it is along depth"
        )
    return depth


def cube(what: str, value: Any) -> Any:
    """(n, n) -> (n, n, n); one number and three stay. One that is a map's height or width, for both
    of them, is the map's (D, H, W). Raises NoCounterpart."""
    if isinstance(value, OfVolume):
        depth, height, width = value.volume
        if height != width:
            raise NoCounterpart(
                f"{what} is {value.plain} of a map of {height} x {width}: nothing says what it is "
                "along depth"
            )
        return (depth, height, width)
    if not isinstance(value, (tuple, list)) or len(value) not in (1, 2):
        return value
    return (depth_of(what, value[0], value[-1]), plain(value[0]), plain(value[-1]))
