"""What a number read from a JSON file may be."""

from __future__ import annotations

from deeplesion.conventions import SPACING_MM, THICKNESS_MM

SPACING = f"a size of a pixel in mm, {SPACING_MM[0]:g} to {SPACING_MM[1]:g}, or null"
THICKNESS = f"a number of mm, {THICKNESS_MM[0]:g} to {THICKNESS_MM[1]:g}, or null (0: unknown)"


def is_number(value: object) -> bool:
    """Whether it is a finite number of a size that measurements have."""
    # Comparing says no to NaN and infinity, and works with integers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def is_numbers(value: object, count: int) -> bool:
    """Whether it is a list of `count` finite numbers of a size that measurements have."""
    return isinstance(value, list) and len(value) == count and all(map(is_number, value))


def is_whole(value: object, low: int = -(10**15), high: int = 10**15) -> bool:
    """Whether it is a whole number in this range."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_spacing(value: object) -> bool:
    """Whether it may be the size of a CT pixel in mm."""
    return is_number(value) and SPACING_MM[0] <= value <= SPACING_MM[1]


def is_thickness(value: object) -> bool:
    """Whether it may be the thickness of CT slices in mm; 0 and less stand for unknown."""
    return is_number(value) and (value <= 0 or THICKNESS_MM[0] <= value <= THICKNESS_MM[1])


def short(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
