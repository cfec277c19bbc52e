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
from deeplesion.conventions import HU_WINDOW
from deeplesion.data import recist
from deeplesion.data.prepare import prepare
from deeplesion.data.slices import SliceFolder
from deeplesion.phantom.make import make_phantom

LESIONS = 12
Lesion = tuple[np.ndarray, np.ndarray, np.ndarray]  # slice in HU, box, RECIST end points


def cases(root: Path | None = None) -> list[Case]:
    """Against our recipe and against the published one, both on the whole slice.

    They learn the background's grey levels from other pixels, so the masks differ: the names of the
    cases say by how much, docs/masks.md which are nearer to the truth. `root`: a prepared data set;
    by default a phantom of 512 x 512 pixels.
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
    found = []
    for name, method in (("our recipe", whole_slice), ("as published", published_grabcut)):
        plain = partial(_masks, method, lesions)
        name = f"{len(lesions)} lesions, {name} (IoU {_ious(ours(), plain()).mean():.2f})"
        found.append(Case(name=name, ours=ours, baseline=plain, check=check))
    return found


def check(ours: list[np.ndarray], plain: list[np.ndarray]) -> None:
    """Masks of the same lesions: mean IoU above 0.8, no lesion's below 0.5."""
    ious = _ious(ours, plain)
    assert ious.mean() > 0.8 and ious.min() > 0.5, ious


def whole_slice(hu: np.ndarray, bbox: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Our recipe with all of the slice for surroundings; (H, W) bool."""
    with mock.patch.object(recist, "MARGIN", max(hu.shape)):
        return recist.mask_from_recist(hu, bbox, ends)


def published_grabcut(hu: np.ndarray, bbox: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The recipe as it stands in the paper, on the whole slice and the network's window.

    Improved RetinaNet (Zlocha et al., MICCAI 2019); arguments and result as `mask_from_recist`'s.
    """
    low, high = HU_WINDOW
    grey = np.clip((hu - float(low)) * (255 / (high - low)), 0, 255).astype(np.uint8)
    x1, y1, x2, y2 = np.round(bbox).astype(int)
    labels = np.full(hu.shape, cv2.GC_BGD, np.uint8)
    labels[max(y1, 0) : y2 + 1, max(x1, 0) : x2 + 1] = cv2.GC_PR_FGD
    labels[recist.quadrilateral_from_recist(ends, hu.shape)] = cv2.GC_FGD
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    image = np.repeat(grey[:, :, None], 3, axis=2)
    cv2.grabCut(image, labels, None, *models, 3, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


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
