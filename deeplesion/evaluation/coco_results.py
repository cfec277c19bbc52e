"""Detections of another tool in COCO's result format, with their annotation file -> a `Result`."""

from __future__ import annotations

import math
from pathlib import Path

from deeplesion.data.coco import (
    lesion_of,
    read_annotations,
    read_json,
    run_lengths_of,
    table_key_slices,
)
from deeplesion.data.plausible import is_number, is_numbers
from deeplesion.errors import DataError
from deeplesion.evaluation.result_check import check_result_records
from deeplesion.evaluation.results import Result


def is_coco_results(path: Path) -> bool:
    """Whether a file is a JSON list, as COCO's results are, and not a result file of ours."""
    with open(path, "rb") as file:
        return file.read(64).lstrip()[:1] == b"["


def read_coco_results(
    path: Path,
    annotations: Path,
    name: str = "",
    iou_threshold: float = 0.5,
    pixel_offset: int = 1,
) -> Result:
    """Reads a list of `{image_id, category_id, bbox, score[, segmentation]}`.

    `bbox` is [x, y, width, height] in the annotation file's convention: 0-based pixel centres and
    width = x2 - x1. (Boxes that count pixel edges are half a pixel off, which no IoU notices.)
    Masks, run lengths or polygons, are used if every detection has one.

    Args:
        path: of the results.
        annotations: the COCO file of the images, see `read_annotations`.
        name, iou_threshold, pixel_offset: of the result.

    Raises:
        DataError: the annotation file is not as it should be.
        ValueError: the results are not; names the file and the detection.
    """
    content = read_annotations(annotations)
    found = read_json(path, "a list of detections in COCO's format")
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of detections in COCO's format")
    category = content["categories"][0]["id"]
    images = {image["id"]: image for image in content["images"]}
    lesions = {number: [] for number in images}
    for annotation in content["annotations"]:
        number = annotation["image_id"]
        lesions[number].append(lesion_of(annotation, images[number]))
    records = {
        number: dict(
            file_name=image["file_name"],
            patient=image.get("patient"),
            slice_range=image.get("slice_range"),
            height=image["height"],
            width=image["width"],
            spacing_mm=image.get("spacing_mm"),
            thickness_mm=image.get("thickness_mm"),
            lesions=lesions[number],
            boxes=[],
            scores=[],
            masks=[],
        )
        for number, image in images.items()
    }
    for i, detection in enumerate(found):
        wrong = _wrong_detection(detection, images, category)
        if wrong:
            raise DataError(f"{path}: detection {i + 1}: {wrong}")
        record = records[detection["image_id"]]
        x, y, width, height = detection["bbox"]
        record["boxes"].append([x, y, x + width, y + height])
        record["scores"].append(detection["score"])
        mask = detection.get("segmentation")
        record["masks"].append(
            None if mask is None else run_lengths_of(mask, record["height"], record["width"])
        )
    masked = all(mask is not None for record in records.values() for mask in record["masks"])
    for record in records.values():
        if not masked or not found:
            del record["masks"]
    check_result_records(path, list(records.values()))
    for record in records.values():
        if record["thickness_mm"] is None:
            record["thickness_mm"] = math.nan
    expected = table_key_slices(content)
    return Result(name, list(records.values()), iou_threshold, pixel_offset, expected)


def _wrong_detection(detection: object, images: dict, category: int) -> str | None:
    if not isinstance(detection, dict):
        return "expected image_id, category_id, bbox and score"
    number = detection.get("image_id")
    if not isinstance(number, int) or number not in images:
        return f"image_id {number!r} is none of the annotation file's images"
    if detection.get("category_id") != category:
        return (
            f"category_id {detection.get('category_id')!r} is not {category}, that of the only"
            " category of the annotation file"
        )
    box = detection.get("bbox")
    if not (is_numbers(box, 4) and box[2] >= 0 and box[3] >= 0):
        return f"bbox must be x, y, width, height, finite numbers, got {box!r}"
    if not is_number(detection.get("score")):
        return f"score must be a finite number, got {detection.get('score')!r}"
    return None
