"""Context-fusion operators: 2D convolutions that also look along depth, one operator a file."""

from .alignshift import AlignShiftConv
from .registry import OPERATORS, build_conv3d, register_operator
from .slice_conv import SliceConv, fold, unfold

__all__ = [
    "OPERATORS",
    "AlignShiftConv",
    "SliceConv",
    "build_conv3d",
    "fold",
    "register_operator",
    "unfold",
]
