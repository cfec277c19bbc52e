"""The annotation files of tools/prepare_data.py: lesions and masks as a COCO dictionary with
the CT fields beside it, and their reading, which names all that is wrong in a file at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from deeplesion.data.annotation_check import (
    annotation_problems,
    image_problems,
    is_ignored,
    refuse_if,
)
from deeplesion.data.plausible import is_whole, short
from deeplesion.errors import DataError, MissingDataError
from deeplesion.files import parse_json


def read_annotations(path: str | Path, need_lesions: bool = False, regions: bool = False) -> dict:
    """Reads and checks an annotation file; `to_coco` says what ours hold.

    Those of others may have less. Needed are, of COCO's fields, `id`, `file_name`, `height` and
    `width` of the images, and `id`, `image_id`, `category_id` and `bbox` of the annotations, of one
    category. What is not there is unknown: without `slice_range` the key slice is used alone,
    without masks there are boxes.

    Args:
        path: such as annotations/train.json.
        need_lesions: refuse a file without lesions, of which nothing can be learnt.
        regions: take regions to ignore too, annotations with `iscrowd` 1. They are for training:
            the benchmark's FROC knows none.

    Raises:
        MissingDataError: there is no such file.
        DataError: it is not such a file, is empty, or some of its images or annotations are bad:
            a field missing or of a wrong kind, an id, file name or box twice, an annotation of no
            image or of another category, a crowd (unless `regions`), a box that is not finite,
            without extent or outside its image, a mask that is empty, of another size than its
            image or far larger than its box. Names the file and the first 20.
    """
    path = Path(path)
    content = read_json(path, "an annotation file of tools/prepare_data.py")
    parts = ("images", "annotations", "categories")
    for part in parts:
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DataError(f"{path}: expected a COCO file with lists of {', '.join(parts)}")
    images, annotations, categories = (content[part] for part in parts)
    if len(categories) != 1:
        raise DataError(
            f"{path}: expected one category, such as 'lesion', got {short(categories)}. The"
            " benchmark tells lesions from the rest, not from one another: merge them into one"
        )
    if not is_whole(categories[0].get("id")) or not isinstance(categories[0].get("name"), str):
        raise DataError(
            f"{path}: the category needs a whole number as its id and a name, got "
            f"{short(categories[0])}"
        )
    if not images:
        raise DataError(
            f"{path} holds no key slices. A partial download may have none of this split: "
            "tools/prepare_data.py says which splits it found. To train without validation set "
            "--cfg-options val_dataloader=None val_cfg=None val_evaluator=None; to test on another "
            "split set test_dataloader.dataset.ann_file."
        )
    if need_lesions and all(map(is_ignored, annotations)):
        raise DataError(f"{path} holds no lesions: there is nothing to learn from it")

    problems = image_problems(images)
    if not problems:  # without sound images nothing can be said about what is in them
        problems = annotation_problems(annotations, images, categories[0]["id"], regions)
    refuse_if(problems, path, "Run tools/prepare_data.py again, or correct the file.")
    return content


def image_folders(
    annotations: dict, root: str | Path, first: str | Path | None = None
) -> list[Path]:
    """The folders in which to look for the series of an annotation file, for `SliceFolder`.

    Args:
        annotations: its content; `prepare` records in it where the series lay.
        root: of the data set, `prepare`'s `out`.
        first: the folder that comes first, `root/Images_png` by default; the recorded ones follow.
    """
    recorded = _info(annotations).get("images")
    recorded = recorded if isinstance(recorded, list) else []
    folders = [Path(root, "Images_png") if first is None else Path(first)]
    folders += [Path(root, folder) for folder in recorded if _is_path(folder)]
    return list({folder.resolve(): folder for folder in folders}.values())


def _is_path(folder: object) -> bool:
    return isinstance(folder, str) and folder.isprintable()


def table_key_slices(annotations: dict) -> int | None:
    """How many key slices there would be if all had been there; None if the file does not say."""
    number = _info(annotations).get("table_key_slices")
    return number if is_whole(number, 1) else None


def mask_kind(annotations: dict) -> str | None:
    """How the masks were drawn, `prepare`'s argument; None if the file does not say."""
    kind = _info(annotations).get("masks")
    return kind if isinstance(kind, str) else None


def _info(annotations: dict) -> dict:
    info = annotations.get("info")
    return info if isinstance(info, dict) else {}


def read_json(path: Path, expected: str) -> object:
    """What a JSON file holds. Raises DataError, naming the file, if it is not JSON."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise MissingDataError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not {expected}: {error}") from None


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
                "lesion_idx": int(lesion.lesion_idx),
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


def lesion_of(annotation: dict, image: dict) -> dict:
    """A lesion as result files have it, from an annotation and its image; see `write_results`."""
    x, y, width, height = annotation["bbox"]
    mask = annotation.get("segmentation") or None
    if mask is not None:
        mask = run_lengths_of(mask, image["height"], image["width"])
    return dict(
        bbox=[x, y, x + width, y + height],
        mask=mask,
        recist=annotation.get("recist"),
        diameters_mm=annotation.get("diameters_mm"),
        lesion_type=annotation.get("lesion_type", -1),
        lesion_idx=annotation.get("lesion_idx"),
    )


def run_lengths_of(mask: dict | list, height: int, width: int) -> dict:
    """A COCO segmentation (run lengths of either kind, or polygons) as compressed run lengths.

    Raises DataError if it is none of these.
    """
    if isinstance(mask, dict) and isinstance(mask.get("counts"), str):
        return mask
    try:
        found = coco_mask.frPyObjects(mask, height, width)
        return encode_mask(coco_mask.merge(found) if isinstance(found, list) else found)
    except Exception as error:  # pycocotools raises many kinds
        raise DataError(f"not a mask in COCO's format: {short(mask)} ({error})") from None


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
