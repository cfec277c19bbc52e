"""The annotation files of tools/prepare_data.py: lesions and masks as a COCO dictionary with
the CT fields beside it, and their reading, which names all that is wrong in a file at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from deeplesion.conventions import LESION_TYPES, PIXEL_CENTRE
from deeplesion.data.run_lengths import mask_areas
from deeplesion.errors import DataError, MissingDataError

MOST_LISTED = 20
_TYPES = tuple(sorted(LESION_TYPES))
# An image reaches half a pixel beyond its pixels' centres; files are rounded.
_EDGE = PIXEL_CENTRE + 1e-4


def read_annotations(path: str | Path, need_lesions: bool = False) -> dict:
    """Reads and checks an annotation file; `to_coco` says what it holds.

    Args:
        path: such as annotations/train.json.
        need_lesions: refuse a file without lesions, of which nothing can be learnt.

    Raises:
        MissingDataError: there is no such file.
        DataError: it is not such a file, is empty, or some of its images or annotations are bad:
            a field missing or of a wrong kind, an id or file name twice, an annotation of no image
            or of another category than lesion, a box that is not finite, without extent or outside
            its image, a mask that is empty or of another size than its image. Names the file and
            the first 20.
    """
    path = Path(path)
    content = read_json(path, "an annotation file of tools/prepare_data.py")
    parts = ("images", "annotations", "categories")
    for part in parts:
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DataError(f"{path}: expected a COCO file with lists of {', '.join(parts)}")
    images, annotations, categories = (content[part] for part in parts)
    if len(categories) != 1 or categories[0].get("name") != "lesion":
        raise DataError(f"{path}: expected one category, 'lesion', got {_short(categories)}")
    if not _is_whole(categories[0].get("id")):
        raise DataError(f"{path}: category 'lesion' has no whole number as its id")
    if not images:
        raise DataError(
            f"{path} holds no key slices. A partial download may have none of this split: "
            "tools/prepare_data.py says which splits it found."
        )
    if need_lesions and not annotations:
        raise DataError(f"{path} holds no lesions: there is nothing to learn from it")

    problems = _image_problems(images)
    if not problems:  # without sound images nothing can be said about what is in them
        problems = _annotation_problems(annotations, images, categories[0]["id"])
    if problems:
        more = len(problems) - MOST_LISTED
        listed = problems[:MOST_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise DataError(
            "\n  ".join([f"{path}: {len(problems)} problem{'s'[: len(problems) > 1]}", *listed])
            + "\nRun tools/prepare_data.py again, or correct the file."
        )
    return content


def read_json(path: Path, expected: str) -> object:
    """What a JSON file holds. Raises DataError, naming the file, if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingDataError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not {expected}: {error}") from None


def is_numbers(value: object, count: int) -> bool:
    """Whether it is a list of `count` finite numbers of a size that measurements have."""
    return isinstance(value, list) and len(value) == count and all(map(is_number, value))


def is_number(value: object) -> bool:
    """Whether it is a finite number of a size that measurements have."""
    # Comparing says no to NaN and infinity, and works with integers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _is_whole(value: object, low: int = -(10**15), high: int = 10**15) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _image_problems(images: list[dict]) -> list[str]:
    problems, ids, names = [], set(), set()
    for i, image in enumerate(images):
        name = image.get("file_name")
        where = f"image {i + 1} ({_short(name)})"

        def check(field: str, good: bool, expected: str, image=image, where=where) -> None:
            if not good:
                found = _short(image[field]) if field in image else "nothing"
                problems.append(f"{where}: {field}: expected {expected}, got {found}")

        key = re.fullmatch(r".+/([0-9]{1,6})\.png", name) if isinstance(name, str) else None
        key_slice = int(key[1]) if key and name.isprintable() else None
        check("file_name", key_slice is not None, "a name like '000001_01_01/109.png'")
        for field in ("id", "patient", "study", "series"):
            check(field, _is_whole(image.get(field)), "a whole number")
        for field in ("height", "width"):
            check(field, _is_whole(image.get(field), 1, 65_535), "a number of pixels")
        spacing, thickness = image.get("spacing_mm"), image.get("thickness_mm", "nothing")
        check("spacing_mm", is_number(spacing) and spacing > 0, "a positive number")
        check("thickness_mm", thickness is None or is_number(thickness), "a number or null")
        ends = image.get("slice_range")
        whole = isinstance(ends, list) and len(ends) == 2 and all(_is_whole(end) for end in ends)
        inside = whole and (key_slice is None or ends[0] <= key_slice <= ends[1])
        check("slice_range", inside, "two numbers with the key slice in between")

        for field, value, seen in (("id", image.get("id"), ids), ("file_name", name, names)):
            if isinstance(value, int | str):
                check(field, value not in seen, "one that no other image has")
                seen.add(value)
    return problems


def _annotation_problems(annotations: list[dict], images: list[dict], category: int) -> list[str]:
    problems, ids, image_of = [], set(), {image["id"]: image for image in images}
    masks, pixels, places = [], [], []
    for i, annotation in enumerate(annotations):
        number, image_id = annotation.get("id"), annotation.get("image_id")
        image = image_of.get(image_id) if _is_whole(image_id) else None
        where = f"annotation {i + 1} (id {_short(number)}"
        where += f" of {image['file_name']})" if image else ")"

        def check(field: str, good: bool, expected: str, annotation=annotation, where=where):
            if not good:
                found = _short(annotation[field]) if field in annotation else "nothing"
                problems.append(f"{where}: {field}: expected {expected}, got {found}")

        check("id", _is_whole(number) and number not in ids, "a whole number, each but once")
        if _is_whole(number):
            ids.add(number)
        check("image_id", image is not None, "the id of one of the images")
        check("category_id", annotation.get("category_id") == category, f"{category}, lesion")
        recist, diameters = annotation.get("recist"), annotation.get("diameters_mm")
        check("recist", recist is None or is_numbers(recist, 8), "8 numbers or null")
        check("diameters_mm", diameters is None or is_numbers(diameters, 2), "2 numbers or null")
        kind = annotation.get("lesion_type", -1)
        check("lesion_type", _is_whole(kind) and kind in _TYPES, f"one of {_TYPES}")
        if image is None:
            continue
        box, size = annotation.get("bbox"), [image["height"], image["width"]]
        if not is_numbers(box, 4):
            check("bbox", False, "x, y, width, height, finite numbers")
        elif min(box[2:]) <= 0:
            check("bbox", False, "x, y, width, height, the last two above 0")
        else:
            x, y, width, height = box
            inside = min(x, y) >= -_EDGE
            inside &= x + width <= size[1] - 1 + _EDGE and y + height <= size[0] - 1 + _EDGE
            check("bbox", inside, f"a box within the image, {size} (height, width)")
        mask = annotation.get("segmentation")
        same = isinstance(mask, dict) and mask.get("size") == size
        check("segmentation", same, f"run lengths of the image's size, {size} (height, width)")
        if same:
            masks.append(mask.get("counts"))
            pixels.append(size[0] * size[1])
            places.append(where)
    for where, area in zip(places, mask_areas(masks, pixels).tolist()):
        if area < 0:
            problems.append(
                f"{where}: segmentation: the run lengths are not those of such an image"
            )
        elif area == 0:
            problems.append(f"{where}: segmentation: the mask is empty")
    return problems


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def to_coco(lesions: pd.DataFrame, masks: Sequence) -> dict:
    """Turn lesions and their masks into a COCO dictionary with one category, 'lesion'.

    `lesions` is (part of) the table of `read_dl_info`; `masks` has one entry for each of its rows:
    an (H, W) bool array or a COCO RLE dictionary. Rows with one `file_name` make one image, in
    order of first appearance; what describes the image is taken from the first of them.

    Images carry `thickness_mm` (None if unknown), `spacing_mm`, `slice_range`, `patient`, `study`,
    `series`, `key_slice`, `display_window` besides COCO's fields, annotations `recist` (8 numbers),
    `diameters_mm` (long, short), `lesion_type`. `bbox` is [x1, y1, x2 - x1, y2 - y1] of 0-based
    pixel centres, `area` the number of pixels in the mask. Computed numbers are rounded to 1e-5.

    Raises ValueError if the masks are not as many as the rows or not as large as the image.
    """
    if len(masks) != len(lesions):
        raise ValueError(f"expected one mask a lesion, got {len(masks)} for {len(lesions)} lesions")
    images, annotations = {}, []
    for lesion, mask in zip(lesions.itertuples(), masks):
        if lesion.file_name not in images:
            images[lesion.file_name] = _coco_image(lesion, image_id=len(images) + 1)
        image = images[lesion.file_name]
        rle = encode_mask(mask)
        if rle["size"] != [image["height"], image["width"]]:
            raise ValueError(
                f"mask of {lesion.file_name} is of size {rle['size']}, its image of"
                f" {[image['height'], image['width']]} (height, width)"
            )
        x1, y1, x2, y2 = lesion.bbox
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": 1,
                "bbox": _rounded((x1, y1, x2 - x1, y2 - y1)),
                "area": int(coco_mask.area(rle)),
                "iscrowd": 0,
                "segmentation": rle,
                "recist": _rounded(lesion.recist.ravel()),
                "diameters_mm": _rounded(lesion.diameters_mm),
                "lesion_type": int(lesion.lesion_type),
            }
        )
    return {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": 1, "name": "lesion"}],
    }


def encode_mask(mask: np.ndarray | dict) -> dict:
    """Encode an (H, W) bool mask as COCO's compressed RLE, ready for JSON: `size`, `counts` (str).

    A mask that is encoded already, counts as bytes or str, is taken as it is.
    """
    rle = mask if isinstance(mask, dict) else coco_mask.encode(np.asfortranarray(mask, np.uint8))
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def _coco_image(lesion, image_id: int) -> dict:
    known = math.isfinite(lesion.thickness_mm)
    return {
        "id": image_id,
        "file_name": lesion.file_name,
        "width": int(lesion.width),
        "height": int(lesion.height),
        # JSON has no NaN.
        "thickness_mm": float(lesion.thickness_mm) if known else None,
        "spacing_mm": float(lesion.spacing_mm),
        "slice_range": [int(index) for index in lesion.slice_range],
        "patient": int(lesion.patient),
        "study": int(lesion.study),
        "series": int(lesion.series),
        "key_slice": int(lesion.key_slice),
        "display_window": [float(hu) for hu in lesion.display_window],
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 5) for value in values]
