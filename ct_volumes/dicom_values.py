"""Values of DICOM headers, of which any may be missing, empty, or nothing that its tag can have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    value = value_of(dataset, keyword)
    return list(value) if isinstance(value, pydicom.Sequence) else []


class FrameValues:
    """The values of a frame: those of its functional groups before those of the whole file."""

    def __init__(self, header: Dataset, groups: dict[str, Any]):
        self.header, self.groups = header, groups

    def get(self, keyword: str) -> Any:
        return self.groups[keyword] if keyword in self.groups else value_of(self.header, keyword)


def value_of(dataset: Dataset, keyword: str | int) -> Any:
    """None where the tag is missing, empty, or of a value that its kind cannot have."""
    try:
        value = dataset[keyword].value if keyword in dataset else None
    except Exception:  # pydicom raises whatever a damaged value leads to
        return None
    return None if value in (None, "", b"") else value


def numbers(values: Any, keyword: str | int, count: int) -> np.ndarray | None:
    value = values.get(keyword) if isinstance(values, FrameValues) else value_of(values, keyword)
    try:
        found = np.array(value if count > 1 else [value], np.float64).ravel()
    except (TypeError, ValueError):
        return None
    return found if found.shape == (count,) and np.isfinite(found).all() else None


def number(values: Any, keyword: str | int) -> float | None:
    found = numbers(values, keyword, 1)
    return None if found is None else float(found[0])


def integer(values: Any, keyword: str | int) -> int | None:
    found = number(values, keyword)
    return None if found is None or abs(found) > 2**53 else int(found)


def text(values: Any, keyword: str) -> str:
    value = values.get(keyword) if isinstance(values, FrameValues) else value_of(values, keyword)
    try:
        if isinstance(value, (list, pydicom.multival.MultiValue)):
            value = "\\".join(map(str, value))
        value = "" if value is None else str(value)
    except Exception:  # letters that its character set does not have
        return ""
    return "".join(c if c.isprintable() else " " for c in value).strip()


def without_patient(words: str, header: Dataset) -> str:
    """A text of the header without the patient's name and number."""
    name = text(header, "PatientName").replace("^", " ").replace("=", " ")
    for secret in sorted({*name.split(), name, text(header, "PatientID")}, key=len, reverse=True):
        where = words.lower().find(secret.lower()) if len(secret) > 2 else -1
        while where >= 0:
            words = words[:where] + "[...]" + words[where + len(secret) :]
            where = words.lower().find(secret.lower(), where + 5)
    return words
