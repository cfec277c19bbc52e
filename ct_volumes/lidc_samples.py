"""LIDC-IDRI as crops to learn from: the files that tools/prepare_data.py --lidc writes, and reading
them. Needs no DICOM library."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from deeplesion.data.annotation_check import refuse_if
from deeplesion.data.coco import read_json
from deeplesion.data.plausible import is_whole, short
from deeplesion.errors import DataError, MissingDataError
from deeplesion.files import write_whole

INDEX, CROPS = "nodules.json", "crops"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a nodule: it becomes a file's name
SIZE = 58  # voxels of 1 mm a side: the ACS paper's 48, and 5 that training may move to each side
SPLITS = ("train", "test")
VERSION = 1
PREPARE = "Run tools/prepare_data.py DICOM_ROOT --lidc --out DIR"


@dataclass(frozen=True)
class NoduleSample:
    """A nodule whose crop is there.

    Attributes:
        malignancy: 1 to 5, the most frequent rating.
        is_rated: whether that is benign (1, 2) or malignant (4, 5).
        readings: how many radiologists outlined it.
        reading: the id of the one whose outline is the mask; None of a consensus.
        split: 'train' or 'test'.
        voxels: of the mask, 1 mm each.
        whole: whether the central 48 mm hold all of the mask.
    """

    name: str
    patient: str
    malignancy: int
    is_rated: bool
    readings: int
    reading: int | None
    split: str
    voxels: int
    whole: bool


def crop_path(folder: Path, name: str) -> Path:
    return folder / CROPS / f"{name}.npz"


def write_crop(folder: Path, name: str, hu: np.ndarray, mask: np.ndarray) -> None:
    """Writes int16 HU and a bool mask of the same shape."""
    write_whole(crop_path(folder, name), lambda file: np.savez_compressed(file, hu=hu, mask=mask))


def read_crop(folder: Path, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(size, size, size) int16 HU and bool mask. Raises MissingDataError or DataError, with the
    file, if it is not there or is no such crop."""
    path = crop_path(folder, name)
    try:
        with np.load(path, allow_pickle=False) as content:
            hu, mask = content["hu"], content["mask"]
    except FileNotFoundError:
        raise MissingDataError(f"{path} does not exist. {PREPARE} again") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is damaged ({error}). Delete it, and run tools/prepare_data.py --lidc again"
        ) from None
    for found, kind in ((hu, np.int16), (mask, bool)):
        if found.shape != (size,) * 3 or found.dtype != kind:
            raise DataError(
                f"{path}: expected {np.dtype(kind)} {(size,) * 3}, got {found.dtype} {found.shape}."
                " Delete it, and run tools/prepare_data.py --lidc again"
            )
    return hu, mask


def write_samples(folder: Path, info: dict, samples: Sequence[NoduleSample]) -> None:
    content = {"info": {"version": VERSION, **info}, "nodules": [asdict(s) for s in samples]}
    write_whole(folder / INDEX, json.dumps(content, indent=1) + "\n")


def read_samples(folder: Path) -> tuple[dict, list[NoduleSample]]:
    """What is said of all nodules, and the nodules.

    Of all: `size`, the voxels of 1 mm a side of the crops; `masks`, 'reading' or 'consensus';
    `split_by`, 'patient' or 'nodule'; `leaking_patients`, how many have nodules on both sides.

    Raises:
        MissingDataError: there is no such file. DataError: it is none of tools/prepare_data.py, or
        is damaged.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise MissingDataError(
            f"{path} does not exist. {PREPARE} first, and point LIDC_ROOT at DIR"
        )
    content = read_json(path, "a file of tools/prepare_data.py --lidc")
    info = content.get("info") if isinstance(content, dict) else None
    nodules = content.get("nodules") if isinstance(content, dict) else None
    sound = (
        isinstance(info, dict)
        and info.get("version") == VERSION
        and is_whole(info.get("size"), 1, 512)
        and info.get("masks") in ("reading", "consensus")
        and info.get("split_by") in ("patient", "nodule")
        and is_whole(info.get("leaking_patients"), 0)
        and isinstance(nodules, list)
        and len(nodules) > 0
    )
    if not sound:
        raise DataError(f"{path} is no file of tools/prepare_data.py --lidc. {PREPARE}")
    problems = [line for i, nodule in enumerate(nodules) for line in _problems(i + 1, nodule)]
    refuse_if(problems, path, "Run tools/prepare_data.py --lidc again.")
    samples = [NoduleSample(**nodule) for nodule in nodules]
    if len({sample.name for sample in samples}) < len(samples):
        raise DataError(f"{path} holds a nodule twice. {PREPARE} again")
    sides = [{s.patient for s in samples if s.split == side} for side in SPLITS]
    if info["split_by"] == "patient" and (both := sorted(sides[0] & sides[1])):
        raise DataError(
            f"{path} is split by patient, but {len(both)} of them, such as {both[0]}, are on both"
            f" sides. {PREPARE} again"
        )
    return info, samples


def _problems(number: int, nodule: object) -> list[str]:
    names = {field.name for field in fields(NoduleSample)}
    if not isinstance(nodule, dict) or nodule.keys() != names:
        return [f"nodule {number}: expected {', '.join(sorted(names))}, got {short(nodule)}"]
    name, reading = nodule["name"], nodule["reading"]
    sound = {
        "name": isinstance(name, str) and NAME.fullmatch(name),
        "patient": isinstance(nodule["patient"], str) and nodule["patient"],
        "malignancy": is_whole(nodule["malignancy"], 1, 5),
        "is_rated": isinstance(nodule["is_rated"], bool),
        "readings": is_whole(nodule["readings"], 1),
        "reading": reading is None or is_whole(reading),
        "split": nodule["split"] in SPLITS,
        "voxels": is_whole(nodule["voxels"], 1),
        "whole": isinstance(nodule["whole"], bool),
    }
    sound["is_rated"] = sound["is_rated"] and not (nodule["is_rated"] and nodule["malignancy"] == 3)
    return [
        f"nodule {number} ({short(name)}): {field} is {short(nodule[field])}"
        for field, good in sound.items()
        if not good
    ]
