"""Result files are checked before they are used: what is in them decides what is reported."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from deeplesion.conventions import LESION_TYPES
from deeplesion.data.plausible import (
    SPACING,
    THICKNESS,
    is_numbers,
    is_spacing,
    is_thickness,
)
from deeplesion.data.run_lengths import mask_areas
from deeplesion.errors import DataError

REQUIRED = {
    "file_name", "patient", "height", "width", "spacing_mm", "thickness_mm", "lesions", "boxes",
    "scores",
}  # fmt: skip
MANY = 20  # detections that do not have the same score by chance


def check_result_records(path: Path, records: object) -> None:
    """Raises ValueError with the file, the image and the field that is not as `write_results` says.

    Args:
        path: for the message.
        records: `images` of a result file, thickness still None where it is unknown.
    """
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: 'images' is not a list of images")
    if not records:
        raise DataError(f"{path} holds no images")
    masks, pixels, owners, names = [], [], [], set()
    for i, record in enumerate(records):
        missing = REQUIRED - record.keys()
        if missing:
            raise DataError(f"{path}: an image lacks {', '.join(sorted(missing))}")
        name = record["file_name"]
        where = f"{path}: image {i + 1} ({str(name)[:80]})"
        wrong = _wrong_record_field(record)
        if wrong:
            raise DataError(f"{where}: {wrong}")
        if name in names:
            raise DataError(f"{where}: the image is in the file twice, and would count twice")
        names.add(name)
        drawn = [lesion["mask"] for lesion in record["lesions"] if lesion.get("mask") is not None]
        found = drawn + record.get("masks", [])
        size = [record["height"], record["width"]]
        if not all(isinstance(mask, dict) and mask.get("size") == size for mask in found):
            raise DataError(f"{where}: masks must be run lengths of the image's size, {size}")
        masks += [mask.get("counts") for mask in found]
        pixels += [size[0] * size[1]] * len(found)
        owners += [where] * len(found)
    corners = [v for r in records for box in r["boxes"] for v in box]
    if corners and max(corners) <= 1:
        raise DataError(f"{path}: boxes must be in pixels, these are fractions of their images")
    scores = [score for r in records for score in r["scores"]]
    if len(scores) >= MANY and len(set(scores)) == 1:
        warnings.warn(
            f"{path}: all of its {len(scores):,} detections have the score {scores[0]:g}. FROC"
            " ranks detections by score: the order in the file decides",
            stacklevel=2,
        )
    bad = np.flatnonzero(mask_areas(masks, pixels) < 0)
    if len(bad):
        raise DataError(f"{owners[bad[0]]}: the run lengths of a mask are not those of its image")


def _wrong_record_field(record: dict) -> str | None:
    """What is wrong with an image apart from its masks."""
    sides = (record["height"], record["width"])
    if not isinstance(record["file_name"], str):
        return "file_name must be a text"
    if not (record["patient"] is None or isinstance(record["patient"], int | str)):
        return "patient must be a number, a text or null"
    if not all(isinstance(side, int) and 0 < side < 2**16 for side in sides):
        return "height and width must be numbers of pixels"
    if not (record["spacing_mm"] is None or is_spacing(record["spacing_mm"])):
        return f"spacing_mm must be {SPACING}"
    if not (record["thickness_mm"] is None or is_thickness(record["thickness_mm"])):
        return f"thickness_mm must be {THICKNESS}"
    if record.get("slice_range") is not None and not is_numbers(record["slice_range"], 2):
        return "slice_range must be two numbers or null"
    if not (_is_array(record["boxes"], 4) and _is_array(record["scores"])):
        return "boxes must be lists of x1, y1, x2, y2 and scores numbers"
    if not _ordered(record["boxes"]):
        return "boxes must have x1 <= x2 and y1 <= y2"
    if _outside(record["boxes"], record):
        return "boxes must lie in the image: are they of an image of another size?"
    if len(record["boxes"]) != len(record["scores"]):
        return f"{len(record['boxes'])} boxes, but {len(record['scores'])} scores"
    if not isinstance(masks := record.get("masks", []), list):
        return "masks must be a list"
    if "masks" in record and len(masks) != len(record["boxes"]):
        return f"{len(record['boxes'])} boxes, but {len(masks)} masks"
    lesions = record["lesions"]
    if not isinstance(lesions, list) or not all(isinstance(lesion, dict) for lesion in lesions):
        return "lesions must be a list of lesions"
    if len({str(lesion.get("bbox")) for lesion in lesions}) < len(lesions):
        return "two lesions have the same bbox: one of them would count twice"
    for lesion in lesions:
        if not (is_numbers(lesion.get("bbox"), 4) and _ordered([lesion["bbox"]])):
            return "bbox of a lesion must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2"
        if _outside([lesion["bbox"]], record):
            return "bbox of a lesion must lie in the image"
        for field, count in (("recist", 8), ("diameters_mm", 2)):
            if lesion.get(field) is not None and not is_numbers(lesion[field], count):
                return f"{field} of a lesion must be {count} numbers or null"
        if lesion.get("lesion_type", -1) not in [*LESION_TYPES]:
            return f"lesion_type must be one of {', '.join(map(str, LESION_TYPES))}"
        if not isinstance(lesion.get("lesion_idx"), int | None):
            return "lesion_idx must be a whole number or null"
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


def _outside(boxes: list, record: dict) -> bool:
    """Whether one of the boxes has nothing of the image in it, a pixel of tolerance given."""
    right, bottom = record["width"], record["height"]
    return any(x1 > right or y1 > bottom or x2 < -1 or y2 < -1 for x1, y1, x2, y2 in boxes)
