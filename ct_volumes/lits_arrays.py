"""LiTS's cases as arrays on disk, of which a training reads a crop and not the whole file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ct_volumes.lits import Files, read_case
from deeplesion.files import write_whole

VERSION = 1  # of what is written


def arrays_of(files: Files, cache: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(S, H, W) int16 HU and uint8 labels of a case, turned as `read_case` has them.

    Args:
        cache: folder where the arrays are kept, 3 bytes a voxel, and from where they are mapped
            into memory when they are asked for again. They are written anew if the case's files
            have changed. Several processes may use it at once. None: the files are read each time.

    Raises what `read_case` raises, and WriteError if the folder cannot be written.
    """
    if cache is None:
        case = read_case(files)
        return case.volume.hu, case.labels
    stem = Path(cache) / f"case_{files.number:03d}"
    record, *paths = (stem.with_suffix(end) for end in (".json", ".hu.npy", ".labels.npy"))
    now = _state(files)
    if _read_record(record) != now or (found := _mapped(paths)) is None:
        case = read_case(files)
        for path, array in zip(paths, (case.volume.hu, case.labels)):
            write_whole(path, lambda file, array=array: np.save(file, array))
        write_whole(record, json.dumps(now) + "\n")  # last: what it stands for is whole
        found = _mapped(paths) or (case.volume.hu, case.labels)
    return found


def _state(files: Files) -> dict[str, Any]:
    """What tells one state of a case's files from another."""
    stats = {path.name: path.stat() for path in (files.volume, files.segmentation)}
    return {"version": VERSION} | {
        name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()
    }


def _read_record(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _mapped(paths: list[Path]) -> tuple[np.ndarray, np.ndarray] | None:
    """Both arrays, or None if one is gone or was cut off."""
    try:
        hu, labels = (np.load(path, mmap_mode="r") for path in paths)
    except (FileNotFoundError, EOFError, ValueError):
        return None
    return (hu, labels) if hu.shape == labels.shape and hu.ndim == 3 else None
