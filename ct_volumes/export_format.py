"""The folder of an exported detector: `manifest.json`, which says all that the programs do not, and
beside it the programs. What tools/export.py writes and `ct_volumes.exported` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from deeplesion.errors import DataError, MissingDataError, UserError
from deeplesion.files import check_out_folder, file_sha256, parse_json, write_whole

MANIFEST = "manifest.json"
FORMAT = "deeplesion-mmdet export"
VERSION = 1
PROGRAMS = ("features", "boxes", "masks")
SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}
# What an interrupted export leaves: programs, under their temporary names too, and the manifest's
# temporary file. The endings are those of `write_whole`.
_PROGRAM, _SUFFIX = "|".join(PROGRAMS), "|".join(map(re.escape, SUFFIX.values()))
_PART = r"(\.\d+-[0-9a-f]{8})?\.part"
LEFT = re.compile(
    rf"({_PROGRAM})(-[0-9a-f]{{12}}({_SUFFIX})|({_SUFFIX})\.new({_PART})?)"
    rf"|{re.escape(MANIFEST)}{_PART}"
)
MULTIPLE = 32  # of the sides of an image that the features' program takes

# What must be in a manifest, and of what type; None where there may be nothing.
_NUMBER = (int, float)
_CODER = {"means": list, "stds": list, "ratio_clip": _NUMBER, "clip": str}
_ROI = {"bins": int, "scale": _NUMBER, "sampling_ratio": int, "aligned": bool}
_NEEDED = {
    "kind": str,  # of SUFFIX
    "experiment": str,
    "software": str,
    "checkpoint_sha256": str,
    "network_sha256": str,
    "trained_as": (dict, type(None)),
    "classes": list,
    "stack": {"num_slices": int, "policy": str, "target_mm": _NUMBER, "interpolation": str},
    "input": {
        "size": (list, type(None)),  # that every slice is brought to; None: as it is
        "program_size": (list, type(None)),  # the only one that the program takes; None: any
        "interpolation": str,
        "air_hu": int,
        "windows_hu": list,
    },
    "proposals": {
        **_CODER,
        "stride": int,
        "base_anchors": list,
        "nms_pre": int,
        "max_per_img": int,
        "iou_threshold": _NUMBER,
        "min_size": (*_NUMBER, type(None)),
    },
    "boxes": {
        **_CODER,
        **_ROI,
        "score_thr": _NUMBER,
        "iou_threshold": _NUMBER,
        "max_per_img": int,
        "shrink": _NUMBER,
    },
    "programs": dict,
}
_MASKS = {**_ROI, "per_class": bool, "threshold": _NUMBER, "whole_pixels": bool}


def is_export(folder: Path) -> bool:
    """Whether a folder holds a manifest, of whatever version, or a damaged one."""
    try:
        found = parse_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError):
        return True
    return isinstance(found, dict) and found.get("format") == FORMAT


def read_manifest(folder: Path) -> dict:
    """The manifest of an exported detector.

    Raises:
        MissingDataError: there is no such folder, or no manifest in it.
        DataError: it is none of this version, or damaged.
    """
    path = folder / MANIFEST
    remedy = "Give the folder that tools/export.py wrote"
    if not folder.is_dir():
        raise MissingDataError(f"{folder} is no folder of an exported detector. {remedy}")
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise MissingDataError(f"{folder} holds no {MANIFEST}. {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}). {_AGAIN}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{path} is not of an exported detector. {remedy}")
    if found.get("version") != VERSION:
        raise DataError(
            f"{path} is of version {found.get('version')} of the format, and this software reads"
            f" version {VERSION}. {_AGAIN} with this version of the software"
        )
    needed = _NEEDED if found.get("masks") is None else {**_NEEDED, "masks": _MASKS}
    if problem := _problem(found, needed, ""):
        raise DataError(f"{path} is damaged: {problem}. {_AGAIN}")
    names = [name for name in PROGRAMS if name != "masks" or found.get("masks")]
    programs = {name: {"file": str, "sha256": str} for name in names}
    problem = _problem(found["programs"], programs, "programs.")
    if not problem and found["kind"] not in SUFFIX:
        problem = f"kind is {found['kind']!r}, not one of {', '.join(SUFFIX)}"
    if problem:
        raise DataError(f"{path} is damaged: {problem}. {_AGAIN}")
    return found


_AGAIN = "Export the detector again"


def _problem(found: Mapping, needed: Mapping, path: str) -> str | None:
    """What is not there or of another type."""
    for name, kind in needed.items():
        if name not in found:
            return f"there is no {path}{name}"
        value = found[name]
        if isinstance(kind, Mapping):
            if not isinstance(value, Mapping):
                return f"{path}{name} is no object"
            if problem := _problem(value, kind, f"{path}{name}."):
                return problem
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return f"{path}{name} is {value!r}"
    return None


def program_path(folder: Path, manifest: Mapping, name: str) -> Path:
    """The file of a program. Raises DataError if it is not there or not as it was written."""
    entry = manifest["programs"][name]
    path = folder / Path(entry["file"]).name
    try:
        digest = file_sha256(path)
    except FileNotFoundError:
        raise MissingDataError(
            f"{path}, a program of the exported detector, is not there"
        ) from None
    if digest != entry["sha256"]:
        raise DataError(f"{path} is damaged: it is not as it was written. {_AGAIN}")
    return path


def write_program(
    folder: Path, name: str, kind: str, content: bytes | Callable[[BinaryIO], None]
) -> dict:
    """Writes a program under a name that no other one has; returns its entry in the manifest."""
    temporary = folder / f"{name}{SUFFIX[kind]}.new"
    write_whole(temporary, content)
    digest = file_sha256(temporary)
    path = folder / f"{name}-{digest[:12]}{SUFFIX[kind]}"
    temporary.replace(path)
    return {"file": path.name, "sha256": digest}


def check_folder(folder: Path) -> None:
    """Raises UserError if an export would be written among other files."""
    check_out_folder(folder)
    if not folder.is_dir() or is_export(folder):
        return
    if not all(LEFT.fullmatch(path.name) for path in folder.iterdir()):
        raise UserError(f"--out {folder} holds other files: give an empty or a new folder")


def write_manifest(folder: Path, manifest: Mapping) -> None:
    """Writes the manifest; with it the folder becomes the new export, and programs that belong to
    no manifest any more are removed."""
    content = {"format": FORMAT, "version": VERSION, **manifest}
    write_whole(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
    remove_others(folder, manifest)


def remove_others(folder: Path, manifest: Mapping | None) -> None:
    """Removes programs that a manifest, or none, does not name."""
    named = {entry["file"] for entry in manifest["programs"].values()} if manifest else set()
    for path in folder.iterdir():
        if path.name not in named and LEFT.fullmatch(path.name):
            path.unlink()
