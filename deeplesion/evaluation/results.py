"""Result files: the detections of one model beside the ground truth, written, read and checked."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from deeplesion.data.coco import is_number, is_numbers
from deeplesion.data.run_lengths import mask_areas
from deeplesion.evaluation.froc import FROC, froc
from deeplesion.files import write_whole

RESULT_FORMAT = "deeplesion-results-1"
REQUIRED = {
    "file_name", "patient", "height", "width", "spacing_mm", "thickness_mm", "lesions", "boxes",
    "scores",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Result:
    """The detections of one model, and what counts as a hit.

    Attributes:
        name: what tables and figures call it.
        records: of a result file (`read_results`), one an image.
        iou_threshold, pixel_offset: see `deeplesion.evaluation.froc.froc`.
    """

    name: str
    records: list[dict]
    iou_threshold: float = 0.5
    pixel_offset: int = 1

    @cached_property
    def curve(self) -> FROC:
        """FROC of all images."""
        return froc(
            [detection_array(r) for r in self.records],
            [lesion_array(r) for r in self.records],
            self.iou_threshold,
            self.pixel_offset,
        )

    @cached_property
    def patients(self) -> np.ndarray:
        """The patient of each image."""
        return np.array([r["patient"] for r in self.records])


def detection_array(record: dict) -> np.ndarray:
    """(n, 5) x1, y1, x2, y2, score."""
    boxes = np.array(record["boxes"], float).reshape(-1, 4)
    return np.column_stack([boxes, np.array(record["scores"], float)])


def lesion_array(record: dict) -> np.ndarray:
    """(m, 4) x1, y1, x2, y2."""
    return np.array([x["bbox"] for x in record["lesions"]], float).reshape(-1, 4)


def write_results(path: Path, records: Sequence[dict]) -> None:
    """Writes a result file: JSON, gzipped when the name ends in .gz.

    `{"format": "deeplesion-results-1", "images": [record, ...]}`; a record has `file_name`,
    `patient`, `height`, `width`, `spacing_mm`, `thickness_mm` (null if unknown), `lesions` (each
    `bbox`, `recist`, `mask`, `diameters_mm`, `lesion_type`), `boxes` (n, 4), `scores` (n,) and, not
    in every file, `study`, `series`, `slice_range` and `masks` (n COCO run lengths). Boxes are x1,
    y1, x2, y2 of 0-based pixel centres in the image's own pixels.
    """
    images = [
        {**r, "thickness_mm": r["thickness_mm"] if math.isfinite(r["thickness_mm"]) else None}
        for r in records
    ]
    text = json.dumps({"format": RESULT_FORMAT, "images": images}, separators=(",", ":"))
    write_whole(path, gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text)


def read_results(path: Path) -> list[dict]:
    """Reads what `write_results` wrote. Raises ValueError, naming the file, for anything else."""
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        content = json.loads(data)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise ValueError(f"{path} is not a result file of tools/test.py: {error}") from None
    if not isinstance(content, dict) or content.get("format") != RESULT_FORMAT:
        raise ValueError(f"{path} is not a result file of tools/test.py (format {RESULT_FORMAT})")
    check_result_records(path, content.get("images"))
    for record in content["images"]:
        if record["thickness_mm"] is None:
            record["thickness_mm"] = math.nan
    return content["images"]


def default_names(paths: Sequence[Path]) -> list[str]:
    """What to call results: by the folder of their files, where all files are called alike."""
    stems = [path.name.split(".")[0] for path in paths]
    folders = [path.resolve().parent.name for path in paths]
    return folders if set(stems) == {"results"} else stems


def table_file(result_file: Path) -> Path:
    """Where the FROC table of a result file goes: results.json.gz -> results.froc.json."""
    return result_file.with_name(result_file.name.split(".")[0] + ".froc.json")


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """Writes the rows of `froc_table` as JSON."""
    write_whole(path, json.dumps({"froc": list(rows)}, indent=2) + "\n")


def check_result_records(path: Path, records: object) -> None:
    """Raises ValueError with the file, the image and the field that is not as `write_results` says.

    Args:
        path: for the message.
        records: `images` of a result file, thickness still None where it is unknown.
    """
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: 'images' is not a list of images")
    masks, pixels, owners = [], [], []
    for i, record in enumerate(records):
        missing = REQUIRED - record.keys()
        if missing:
            raise ValueError(f"{path}: an image lacks {', '.join(sorted(missing))}")
        name = record["file_name"]
        where = f"{path}: image {i + 1} ({str(name)[:80]})"
        wrong = _wrong_record_field(record)
        if wrong:
            raise ValueError(f"{where}: {wrong}")
        drawn = [lesion["mask"] for lesion in record["lesions"] if lesion.get("mask") is not None]
        found = drawn + record.get("masks", [])
        size = [record["height"], record["width"]]
        if not all(isinstance(mask, dict) and mask.get("size") == size for mask in found):
            raise ValueError(f"{where}: masks must be run lengths of the image's size, {size}")
        masks += [mask.get("counts") for mask in found]
        pixels += [size[0] * size[1]] * len(found)
        owners += [where] * len(found)
    bad = np.flatnonzero(mask_areas(masks, pixels) < 0)
    if len(bad):
        raise ValueError(f"{owners[bad[0]]}: the run lengths of a mask are not those of its image")


def _wrong_record_field(record: dict) -> str | None:
    """What is wrong with an image apart from its masks."""
    sides = (record["height"], record["width"])
    if not isinstance(record["file_name"], str):
        return "file_name must be a text"
    if not isinstance(record["patient"], int | str):
        return "patient must be a number or a text"
    if not all(isinstance(side, int) and 0 < side < 2**16 for side in sides):
        return "height and width must be numbers of pixels"
    if not (is_number(record["spacing_mm"]) and record["spacing_mm"] > 0):
        return "spacing_mm must be a positive number"
    if not (record["thickness_mm"] is None or is_number(record["thickness_mm"])):
        return "thickness_mm must be a number or null"
    if "slice_range" in record and not is_numbers(record["slice_range"], 2):
        return "slice_range must be two numbers"
    if not (_is_array(record["boxes"], 4) and _is_array(record["scores"])):
        return "boxes must be lists of x1, y1, x2, y2 and scores numbers"
    if not _ordered(record["boxes"]):
        return "boxes must have x1 <= x2 and y1 <= y2"
    if len(record["boxes"]) != len(record["scores"]):
        return f"{len(record['boxes'])} boxes, but {len(record['scores'])} scores"
    if not isinstance(masks := record.get("masks", []), list):
        return "masks must be a list"
    if "masks" in record and len(masks) != len(record["boxes"]):
        return f"{len(record['boxes'])} boxes, but {len(masks)} masks"
    lesions = record["lesions"]
    if not isinstance(lesions, list) or not all(isinstance(lesion, dict) for lesion in lesions):
        return "lesions must be a list of lesions"
    for lesion in lesions:
        if not (is_numbers(lesion.get("bbox"), 4) and _ordered([lesion["bbox"]])):
            return "bbox of a lesion must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2"
        for field, count in (("recist", 8), ("diameters_mm", 2)):
            if lesion.get(field) is not None and not is_numbers(lesion[field], count):
                return f"{field} of a lesion must be {count} numbers or null"
        if not isinstance(lesion.get("lesion_type", -1), int):
            return "lesion_type must be a whole number"
    return None


def _is_array(values: object, columns: int | None = None) -> bool:
    """Whether a list holds finite numbers, or lists of so many of them."""
    if not isinstance(values, list):
        return False
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths
        return False
    shape = (len(values),) if columns is None or not values else (len(values), columns)
    return array.shape == shape and array.dtype.kind in "if" and bool(np.isfinite(array).all())


def _ordered(boxes: list) -> bool:
    return all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in boxes)
