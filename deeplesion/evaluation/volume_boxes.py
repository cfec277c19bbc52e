"""3D boxes of lesions as files hold them: JSON, or the pickle of the fully annotated test set of
DeepLesion, of which no code is run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np

from deeplesion.errors import DataError, MissingDataError
from deeplesion.files import parse_json

EXPECTED = (
    "expected is a split, such as 'test', with a name for each volume, and for each name the boxes"
    " of its lesions, rows x1, y1, z1, x2, y2, z2"
)


def read_volume_boxes(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """{split: {name of a volume: (n, 6) x1, y1, z1, x2, y2, z2}}, ends included.

    From JSON, or from a pickle of dicts of NumPy arrays. Nothing that the pickle names is imported
    or called: the few names that NumPy arrays are made of stand for classes of this file, any
    other is refused.

    Raises:
        DataError: with the file and the volume, if it is not there or anything else.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingDataError(
            f"{path} is not there: give the file of the boxes of all lesions"
        ) from None
    if content.lstrip()[:1] == b"{":
        try:
            splits = parse_json(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from None
    else:
        try:
            splits = _Unpickler(io.BytesIO(content), encoding="latin1").load()
        except Exception as error:  # there is nothing that bad bytes do not raise
            raise DataError(
                f"{path} is neither JSON nor a pickle of NumPy arrays alone: {error}"
            ) from None
    if not _is_dict(splits) or not splits or not all(map(_is_dict, splits.values())):
        raise DataError(f"{path}: {EXPECTED}")
    return {
        split: {name: _boxes(f"{path}: {split}, {name}", rows) for name, rows in volumes.items()}
        for split, volumes in splits.items()
    }


def _is_dict(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _boxes(where: str, rows: object) -> np.ndarray:
    try:
        boxes = rows.array() if isinstance(rows, _Array) else np.array(rows, np.float64)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: {error}; {EXPECTED}") from None
    boxes = boxes.astype(np.float64)
    if not boxes.size:
        boxes = boxes.reshape(0, 6)
    if boxes.ndim != 2 or boxes.shape[1] != 6 or not np.isfinite(boxes).all():
        raise DataError(f"{where}: an array of shape {boxes.shape}; {EXPECTED}")
    if (boxes[:, 3:] < boxes[:, :3]).any():
        raise DataError(f"{where}: a box ends before it starts; {EXPECTED}")
    return boxes


class _DType:
    """What stands for `numpy.dtype`: numbers alone, no objects."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or code not in {
            *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"
        }:  # fmt: skip
            raise pickle.UnpicklingError(f"an array of type {code!r}, which are no numbers")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """What stands for `numpy.ndarray` until all of it is read."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self) -> np.ndarray:
        data = self.data.encode("latin1") if isinstance(self.data, str) else bytes(self.data)
        if type(self.dtype) is not _DType:
            raise ValueError("an array without a type")
        array = np.frombuffer(data, self.dtype.order + self.dtype.code)
        return array.reshape(self.shape, order="F" if self.fortran else "C")


def _reconstruct(*_: object) -> _Array:
    """For `numpy._core.multiarray._reconstruct`: what fills the array comes after it."""
    return _Array()


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    """For `numpy._core.numeric._frombuffer`."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _encode(text: str, _: str) -> bytes:
    """For `_codecs.encode`, by which old pickles write bytes."""
    return text.encode("latin1")


def _bytes() -> bytes:
    """For `bytes`, by which old pickles write that there are none."""
    return b""


_NAMES = {
    ("__builtin__", "bytes"): _bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


# The unpickler in Python, not that in C, in which a few bytes can ask for gigabytes.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it wants to call {module}.{name}, which no array needs"
            ) from None
