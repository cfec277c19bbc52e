"""A program of an exported detector in torch.export's format; needs torch alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from deeplesion.errors import DataError


def open_program(path: Path) -> Callable[..., list[np.ndarray]]:
    """The program of a .pt2 file on the CPU: it takes its inputs in order and returns its outputs.

    Raises DataError if torch cannot read the file.
    """
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # a file of another version of torch fails in many ways
        raise DataError(f"torch {torch.__version__} cannot read {path}: {error}") from error

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        # A program is traced where autograd records, and its constants need no gradient.
        with torch.no_grad():
            found = module(*(torch.from_numpy(np.ascontiguousarray(each)) for each in inputs))
        return [each.numpy() for each in found]

    return run
