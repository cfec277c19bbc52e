"""Lesion masks by GrabCut: on the surroundings of a lesion against on its whole slice."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import numpy as np

from benchmarks.measure import Case
from deeplesion.data import recist
from deeplesion.data.prepare import prepare
from deeplesion.data.slices import SliceFolder
from deeplesion.phantom.make import make_phantom

LESIONS = 12
Lesion = tuple[np.ndarray, np.ndarray, np.ndarray]  # slice in HU, box, RECIST end points


def cases(root: Path | None = None) -> list[Case]:
    """Against our recipe on the whole slice.

    It learns the background's grey levels from other pixels, so the masks differ: the case's name
    says by how much. `root`: a prepared data set; by default a phantom of 512 x 512 pixels.
    """
    cv2.setNumThreads(0)  # as in the processes of tools/prepare_data.py
    if root is None:
        with tempfile.TemporaryDirectory() as folder:
            make_phantom(Path(folder) / "DeepLesion", patients=6)
            prepare(Path(folder) / "DeepLesion", workers=1)
            lesions = _lesions(Path(folder) / "DeepLesion")
    else:
        lesions = _lesions(root)
    ours = partial(_masks, recist.mask_from_recist, lesions)
    plain = partial(_masks, whole_slice, lesions)
    name = f"{len(lesions)} lesions, our recipe (IoU {_ious(ours(), plain()).mean():.2f})"
    return [Case(name=name, ours=ours, baseline=plain, check=check)]


def check(ours: list[np.ndarray], plain: list[np.ndarray]) -> None:
    """Masks of the same lesions: mean IoU above 0.8, no lesion's below 0.5."""
    ious = _ious(ours, plain)
    assert ious.mean() > 0.8 and ious.min() > 0.5, ious


def whole_slice(hu: np.ndarray, bbox: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Our recipe with all of the slice for surroundings; (H, W) bool."""
    with mock.patch.object(recist, "MARGIN", max(hu.shape)):
        return recist.mask_from_recist(hu, bbox, ends)


def _lesions(root: Path) -> list[Lesion]:
    content = json.loads((root / "annotations" / "train.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    folder = SliceFolder(root / "Images_png")
    found = []
    for lesion in content["annotations"][:LESIONS]:
        x, y, width, height = lesion["bbox"]
        ends = np.reshape(lesion["recist"], (4, 2))
        box = np.array([x, y, x + width, y + height])
        found.append((folder.read(names[lesion["image_id"]]), box, ends))
    return found


def _masks(method: Callable, lesions: list[Lesion]) -> list[np.ndarray]:
    return [method(*lesion) for lesion in lesions]


def _ious(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    return np.array([(x & y).sum() / (x | y).sum() for x, y in zip(a, b, strict=True)])
