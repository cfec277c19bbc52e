"""Context-fusion operators: 2D convolutions that also look along depth, one operator a file.

Every module of this folder is imported; what it registers and what it lists here is the package's.
"""

import importlib
import pkgutil

from .check import check_operator
from .conv_depth import conv_depth, fold, unfold
from .registry import OPERATORS, build_conv3d, register_operator
from .slice_conv import Affine, SliceConv, shift_depth
from .thickness import align_factor, check_thickness

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
globals().update(OPERATORS)

__all__ = [
    "OPERATORS",
    "Affine",
    "SliceConv",
    "align_factor",
    "build_conv3d",
    "check_operator",
    "check_thickness",
    "conv_depth",
    "fold",
    "register_operator",
    "shift_depth",
    "unfold",
    *(name for name in OPERATORS if name != "SliceConv"),
]
