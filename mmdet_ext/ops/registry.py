"""Operators by name, so that a config chooses one by `type`."""

from __future__ import annotations

import difflib

from .slice_conv import SliceConv

OPERATORS: dict[str, type[SliceConv]] = {"SliceConv": SliceConv}


def register_operator(operator: type[SliceConv]) -> type[SliceConv]:
    """Class decorator: makes `operator`, a subclass of `SliceConv`, buildable by its class name.

    Raises TypeError for another class, and ValueError for a name that another operator has.
    """
    if not issubclass(operator, SliceConv):
        raise TypeError(f"{operator.__name__}: an operator derives from mmdet_ext.ops.SliceConv")
    other = OPERATORS.setdefault(operator.__name__, operator)
    if other is not operator:
        raise ValueError(
            f"an operator {operator.__name__} is registered already, from {other.__module__}: give "
            "yours another name"
        )
    return operator


def build_conv3d(
    config: dict | str, in_channels: int, out_channels: int, kernel_size: int, **kwargs
) -> SliceConv:
    """Builds a context-fusion operator.

    Args:
        config: `dict(type='AlignShiftConv', n_fold=8, ...)` or just the name; what else it holds
            goes to the operator's constructor.
        in_channels, out_channels, kernel_size, **kwargs: of the convolution.

    Raises:
        ValueError: the name is not registered.
        TypeError: the operator does not take one of the options.
    """
    options = {"type": config} if isinstance(config, str) else dict(config)
    name = options.pop("type", None)
    if name not in OPERATORS:
        close = difflib.get_close_matches(str(name), OPERATORS, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        known = ", ".join(sorted(OPERATORS))
        raise ValueError(f"unknown fusion operator type={name!r}{hint}; there are: {known}")
    try:
        return OPERATORS[name](in_channels, out_channels, kernel_size, **kwargs, **options)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
