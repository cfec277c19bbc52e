"""What operators do with the thickness of slices: check it, and turn it into an align factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_thickness(thickness: Tensor | None, batch: int, operator: str) -> Tensor:
    """Returns a valid (B,) thickness in mm, which may be infinite.

    Raises ValueError if it is missing, of another length, NaN or <= 0. On a GPU the values are
    asserted on the device (RuntimeError), since looking at them would wait for it at every layer;
    compiled code cannot raise for a value, so there an invalid thickness makes the output NaN.
    """
    if thickness is None:
        raise ValueError(f"{operator} needs the slice thickness in mm, one number a volume")
    if thickness.shape != (batch,):
        raise ValueError(
            f"{operator}: thickness must have shape ({batch},), one number a volume of the batch, "
            f"got {tuple(thickness.shape)}"
        )
    if torch.compiler.is_compiling():
        return torch.where(thickness > 0, thickness, torch.nan)
    valid = (thickness > 0).all()  # NaN compares false
    if thickness.is_cuda or thickness.is_meta:
        torch._assert_async(valid, f"{operator}: slice thickness must be > 0 mm and not NaN")
    elif not valid:
        raise ValueError(
            f"{operator}: slice thickness must be > 0 mm (infinity: no fusion), "
            f"got {thickness.tolist()}"
        )
    return thickness


def check_reference(ref_thickness: float) -> float:
    """Returns a valid reference thickness in mm; raises ValueError if it is not positive."""
    if not (math.isfinite(ref_thickness) and ref_thickness > 0):
        raise ValueError(f"ref_thickness must be a positive number of mm, got {ref_thickness}")
    return ref_thickness


def align_factor(
    thickness: Tensor | None, ref_thickness: float, batch: int, operator: str
) -> Tensor:
    """alpha = clamp(r / s, 0, 1) of a batch of volumes, (B,) (AlignShift, Algorithm 1).

    Slices of thickness s lie alpha = r / s of their distance from the virtual slice r mm away: 1 at
    s <= r, 0 at infinity. Raises as `check_thickness`.
    """
    return (ref_thickness / check_thickness(thickness, batch, operator)).clamp(max=1)
