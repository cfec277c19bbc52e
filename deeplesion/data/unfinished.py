"""What an interrupted preparation has finished: a line a key slice, of one table, the same folders
of images and one code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import cv2

from deeplesion.data import recist, slices

UNFINISHED = "unfinished.jsonl"


def fingerprint(csv: Path, images: Sequence[Path]) -> str:
    """Changes with the table, with the folders in which slices are looked for, and with the code
    that reads slices and draws masks and OpenCV, which it rests on. Slices are not read."""
    digest = hashlib.sha256(csv.read_bytes())
    for code in (recist, slices):
        digest.update(Path(code.__file__).read_bytes())
    digest.update(cv2.__version__.encode())
    digest.update(json.dumps([str(folder.resolve()) for folder in images]).encode())
    return digest.hexdigest()


def open_unfinished(path: Path, csv: Path, images: Sequence[Path]) -> tuple[dict, BinaryIO]:
    """What an interrupted call finished with the same table and folders of `images`, and the file
    to which further results are appended."""
    header = json_line({"fingerprint": fingerprint(csv, images)})
    content = path.read_bytes() if path.exists() else b""
    finished, good = {}, 0
    if content.startswith(header):
        good = len(header)
        for line in content[good:].splitlines(keepends=True):
            try:
                result = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            finished[result["file_name"]] = result
            good += len(line)
    file = open(path, "r+b" if good else "wb")  # noqa: SIM115, the caller closes it
    # A line torn by the interruption goes.
    file.truncate(good)
    file.seek(good)
    if not good:
        file.write(header)
        file.flush()
    return finished, file


def json_line(value: dict) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"
