"""A program of an exported detector in onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deeplesion.errors import DataError, UserError, install

Program = Callable[..., list[np.ndarray]]

ERRORS_ONLY = 3


def open_program(path: Path) -> Program:
    """The program of an .onnx file on the CPU: it takes its inputs in order, returns its outputs.

    It uses as many threads as OMP_NUM_THREADS says, without it as many as onnxruntime likes.

    Raises:
        UserError: onnxruntime is not installed.
        DataError: onnxruntime cannot read the file.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(f"{path} needs onnxruntime: {install('onnx')}") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    threads = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its classes are no part of its interface
        raise DataError(f"onnxruntime cannot read {path}: {error}") from error
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        return session.run(None, dict(zip(names, inputs, strict=True)))

    return run
