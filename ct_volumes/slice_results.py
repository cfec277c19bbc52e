"""What a detector found on the slices of a volume, kept in a file as it comes, so that interrupted
work goes on."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ct_volumes.lesions import Patch, SliceDetections
from deeplesion.files import explained, write_whole

FORMAT = 1


class SliceResults:
    """Detections of slices in a file of JSON lines: the first one is what they belong to, each
    other one a slice. It grows at its end; a line that is not whole, since the writing process was
    ended, is written over.

    Args:
        path: of the file. One that is there is continued if it is of the same `key`; else it is of
            other work, which was not finished, and is begun anew. None keeps them in memory alone.
        key: what decides the results, as JSON can hold it.

    Attributes:
        found: {index of the slice: SliceDetections}, those of the file included.

    Raises WriteError if the file cannot be written.
    """

    def __init__(self, path: Path | None, key: dict) -> None:
        self.path = path
        self.found: dict[int, SliceDetections] = {}
        if path is None:
            return
        header = json.dumps(dict(format=FORMAT, key=key), sort_keys=True).encode() + b"\n"
        self._end = len(header)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        if not content.startswith(header):
            write_whole(path, header)
            return
        for line in content[len(header) :].splitlines(keepends=True):
            try:
                found = decoded(line)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                break  # it and what follows are found again
            self.found[found.index] = found
            self._end += len(line)

    def add(self, several: Iterable[SliceDetections]) -> None:
        """Keeps detections, in the file first. Interrupted, it keeps them all or none."""
        several = list(several)
        if self.path is not None and several:
            lines = b"".join(map(encoded, several))
            with explained(self.path, len(lines)), open(self.path, "r+b") as file:
                file.seek(self._end)
                file.truncate()
                file.write(lines)
            self._end += len(lines)
        self.found.update((each.index, each) for each in several)


def encoded(found: SliceDetections) -> bytes:
    """A line of JSON; masks as eight pixels a byte, in base64."""
    content = dict(
        index=found.index,
        # JSON's numbers are those of Python, which hold a float32 exactly.
        boxes=np.asarray(found.boxes, np.float64).tolist(),
        scores=np.asarray(found.scores, np.float64).tolist(),
        masks=None if found.masks is None else [_encoded_patch(patch) for patch in found.masks],
    )
    return json.dumps(content).encode() + b"\n"


def decoded(line: bytes) -> SliceDetections:
    """The inverse of `encoded`. Raises one of the errors that `SliceResults` catches if a line is
    not whole or not of it."""
    if not line.endswith(b"\n"):
        raise ValueError("the line is not whole")
    content = json.loads(line)
    boxes = np.array(content["boxes"], np.float32).reshape(-1, 4)
    scores = np.array(content["scores"], np.float32).reshape(len(boxes))
    masks = content["masks"]
    if masks is not None:
        masks = tuple(_decoded_patch(*patch) for patch in masks)
        if len(masks) != len(boxes):
            raise ValueError("not a mask for each box")
    return SliceDetections(int(content["index"]), boxes, scores, masks)


def _encoded_patch(patch: Patch) -> tuple[int, int, int, int, str]:
    bits = base64.b64encode(np.packbits(patch.mask).tobytes()).decode()
    return (patch.x, patch.y, *patch.mask.shape, bits)


def _decoded_patch(x: int, y: int, height: int, width: int, bits: str) -> Patch:
    packed = np.frombuffer(base64.b64decode(bits, validate=True), np.uint8)
    if min(x, y, height, width) < 0 or len(packed) != (height * width + 7) // 8:
        raise ValueError("not the pixels of a mask")
    mask = np.unpackbits(packed)[: height * width]
    return Patch(x, y, mask.reshape(height, width).astype(bool))
