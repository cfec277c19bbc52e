"""Context-fusion operators: 2D convolutions that also look along depth, one operator a file."""

from .a3d import A3DConv
from .acs import ACSConv, MeanACSConv, SoftACSConv
from .alignshift import AlignShiftConv
from .i3d import I3DConv
from .p3d import P3DConv
from .registry import OPERATORS, build_conv3d, register_operator
from .slice_conv import Affine, SliceConv, conv_depth, fold, shift_depth, unfold
from .tsm import TSMConv

__all__ = [
    "OPERATORS",
    "A3DConv",
    "ACSConv",
    "Affine",
    "AlignShiftConv",
    "I3DConv",
    "MeanACSConv",
    "P3DConv",
    "SliceConv",
    "SoftACSConv",
    "TSMConv",
    "build_conv3d",
    "conv_depth",
    "fold",
    "register_operator",
    "shift_depth",
    "unfold",
]
