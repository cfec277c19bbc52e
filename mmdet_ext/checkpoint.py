"""Checkpoint files: plain data, written whole, loaded as data only.

torch's files are pickles, and a pickle may run any code when it is loaded. Nothing here lets it:
what is not data is refused, and there is no way around that.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch

from deeplesion.errors import DataError, MissingDataError
from deeplesion.files import write_whole

LAST_CHECKPOINT = "last_checkpoint"  # the file that names a run's last checkpoint, as in mmengine
AVERAGED = "averaged"  # where a checkpoint's meta says how its weights were averaged
REFUSED = (
    "{path} is refused: loading it would call {what}, and checkpoints are loaded as data only "
    "(tensors, numbers, strings, lists, dicts). Ask its author for the weights alone, "
    "torch.save(model.state_dict(), 'weights.pth'): such a file loads here."
)
DAMAGED = "{path} is damaged ({reason}). Take another copy of it, or an earlier checkpoint."
UNREADABLE = "{path} is damaged, or no checkpoint at all: it cannot be read as data."


class CheckpointError(DataError):
    """A checkpoint that cannot be used, and why."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint file that is cut off or altered."""


class UnreachableError(CheckpointError, ConnectionError):
    """Weights that are to be fetched, and cannot be."""


def load_checkpoint_file(path: str | Path, map_location: Any = "cpu") -> dict:
    """Loads a checkpoint, new (zip) or old format, as data only: no code in it is run.

    Raises:
        MissingDataError: no such file.
        DamagedCheckpoint: it is cut off or its checksums do not match (torch does not look).
        CheckpointError: it holds something else than tensors, numbers, strings, lists and dicts,
            which is named.
    """
    path = Path(path).expanduser()
    check_whole(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        # torch's text is not passed on: it explains how to switch the check off.
        called = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and called:
            raise CheckpointError(REFUSED.format(path=path, what=called[1])) from None
        raise DamagedCheckpoint(UNREADABLE.format(path=path)) from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a dict of weights, or "
            "one with the key 'state_dict'"
        )
    return checkpoint


def how_averaged(checkpoint: dict) -> str:
    """Of what the weights that a checkpoint is tested with, `state_dict`, are the average; '' if
    they are those of an update."""
    meta = checkpoint.get("meta")
    said = meta.get(AVERAGED) if isinstance(meta, dict) else None
    return str(said or ("moving average" if "ema_state_dict" in checkpoint else ""))


def check_whole(path: Path) -> None:
    """Raises DamagedCheckpoint if a zip's checksums do not match; old formats have none."""
    if not path.is_file():
        raise MissingDataError(f"no checkpoint file {path}")
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            # torch reads nothing, without a word, from a file that is marked as a folder (0x10).
            folders = [info.filename for info in archive.infolist() if info.external_attr & 0x10]
            bad = next(iter(folders), None) or archive.testzip()
    except Exception as error:  # zipfile and zlib raise many kinds on altered bytes
        raise DamagedCheckpoint(DAMAGED.format(path=path, reason=error)) from error
    if bad is not None:
        raise DamagedCheckpoint(DAMAGED.format(path=path, reason=f"{bad} in it is altered"))


def download(url: str) -> Path:
    """Fetches a file into torch's cache, unless it is there, and returns its path.

    A name like densenet121-a639ec97.pth is held against the SHA-256 that it carries.

    Raises:
        CheckpointError: another file came.
        UnreachableError: none came.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([a-f0-9]{8,})\.", path.name)
        try:
            torch.hub.download_url_to_file(url, str(path), digest and digest[1])
        except RuntimeError as error:
            raise CheckpointError(f"{url}: {error}") from None
        except OSError as error:
            raise UnreachableError(
                f"could not fetch the weights {url} ({error}). On a machine with network fetch that"
                f" file and put it at {path}, or give the path of a copy instead of the address"
            ) from None
    return path


def save_checkpoint_file(checkpoint: dict, path: Path) -> None:
    """Writes plain data: there as a whole or not at all, whenever the process is killed.

    Raises TypeError naming what in `checkpoint` is no data.
    """
    data = plain_data(checkpoint)
    write_whole(path, lambda file: torch.save(data, file))


def plain_data(value: Any, where: str = "checkpoint") -> Any:
    """Tensors (on the CPU), numbers, strings, lists, tuples and dicts; arrays become tensors.

    A module's state dict stays an OrderedDict with its `_metadata`, the versions of its parts.
    Raises TypeError naming the key of anything else.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if value is None or isinstance(value, (bool, int, float, str)):
        # Subclasses (numpy's float64 is a float, enums may be strings) become the bare type.
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                return kind(value)
        return None
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return plain_data(value.item(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        items = {key: plain_data(item, f"{where}[{key!r}]") for key, item in value.items()}
        if not hasattr(value, "_metadata"):
            return items
        state_dict = OrderedDict(items)
        state_dict._metadata = value._metadata
        return state_dict
    if isinstance(value, (list, tuple)):
        items = [plain_data(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, lists "
        "and dicts. Keep it out of the message hub and of state_dict(), or make it one of these."
    )


def last_checkpoint(work_dir: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint that a run can be resumed from, and what is wrong with later ones.

    The file that `last_checkpoint` names comes first, then the others, newest first. Returns None
    if the folder holds none at all; raises DamagedCheckpoint if it holds only damaged ones.
    """
    numbered = [
        (file.stat().st_mtime, int(match[1]), file)
        for file in work_dir.glob("*.pth")
        if (match := re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", file.name))
    ]
    candidates = [file for *_, file in sorted(numbered, reverse=True)]
    pointer = work_dir / LAST_CHECKPOINT
    if pointer.is_file():
        # The name alone: a work directory may have been moved.
        named = work_dir / Path(pointer.read_text().strip()).name
        candidates.sort(key=lambda file: file != named)
    damaged = []
    for file in candidates:
        try:
            check_whole(file)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        else:
            return file, damaged
    if damaged:
        raise DamagedCheckpoint("\n".join([f"no whole checkpoint in {work_dir}:", *damaged]))
    return None, []
