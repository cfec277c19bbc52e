"""LiTS as slices to detect in: the instances of a slice's labels, and the COCO files of them that
tools/prepare_data.py --lits writes. Needs no NIfTI library."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.data.annotation_check import annotation_problems, image_problems, refuse_if
from deeplesion.data.coco import encode_mask, read_json
from deeplesion.data.plausible import is_whole
from deeplesion.errors import DataError

CLASSES = ("liver", "lesion")  # categories 1 and 2
LABELS = {1: 1, 2: 2}  # category -> the lowest label that counts as it: a lesion is liver, too
ANNOTATION_FILES = {"train": "annotations/train.json", "val": "annotations/val.json"}


def instances_of(labels: np.ndarray) -> list[dict]:
    """The instances on a slice, as COCO annotations without ids.

    Each is a part of the liver (label >= 1) or of the lesions (label 2) that is connected within
    the slice, pixels that share a corner included. Boxes are tight: [x, y, width, height] in pixel
    centres, so that they begin at -0.5. Parts with one and the same box are one instance.

    Args:
        labels: (H, W), 0, 1 liver, 2 lesion.
    """
    found = []
    for category, least in LABELS.items():
        count, parts, stats, _ = cv2.connectedComponentsWithStats(
            (labels >= least).astype(np.uint8), connectivity=8
        )
        by_box: dict[tuple, list[int]] = {}
        for part in range(1, count):
            x, y, width, height, _ = stats[part].tolist()
            by_box.setdefault((x, y, width, height), []).append(part)
        for (x, y, width, height), same in by_box.items():
            mask = np.isin(parts, same)
            found.append(
                {
                    "category_id": category,
                    "bbox": [x - PIXEL_CENTRE, y - PIXEL_CENTRE, width, height],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode_mask(mask),
                }
            )
    return found


def to_coco(slices: list[dict], info: dict) -> dict:
    """Slices, {'image': without id, 'instances': as `instances_of` returns them}, as a COCO
    dictionary with two categories; `info` says what `read_samples` returns."""
    images, annotations = [], []
    for number, slice_ in enumerate(slices, 1):
        images.append({"id": number, **slice_["image"]})
        for instance in slice_["instances"]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **instance})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    return dict(info=info, images=images, annotations=annotations, categories=categories)


def read_samples(path: Path, need_instances: bool = False) -> dict:
    """Reads and checks an annotation file of LiTS.

    Its `info` holds `lits`, the folder of the NIfTI files, and `step_mm`, the distance of slices.

    Raises:
        MissingDataError: there is no such file.
        DataError: it is none of `tools/prepare_data.py --lits`, or its images or annotations are
            bad; `need_instances` and there are none.
    """
    path = Path(path)
    content = read_json(path, "an annotation file of tools/prepare_data.py --lits")
    info = content.get("info") if isinstance(content, dict) else None
    names = content.get("categories") if isinstance(content, dict) else None
    expected = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    lists = isinstance(content, dict) and all(
        isinstance(content.get(part), list) and all(isinstance(e, dict) for e in content[part])
        for part in ("images", "annotations")
    )
    if not lists or names != expected or not isinstance(info, dict) or "lits" not in info:
        raise DataError(
            f"{path} is no annotation file of LiTS: expected images, annotations, the categories"
            f" {' and '.join(CLASSES)}, and in `info` the folder `lits`. Write it with"
            " tools/prepare_data.py FOLDER --lits --out DIR"
        )
    if not content["images"] or (need_instances and not content["annotations"]):
        what = "slices" if not content["images"] else "liver: there is nothing to learn from it"
        raise DataError(f"{path} holds no {what}")
    problems = image_problems(content["images"])
    problems += [
        f"image {i + 1}: patient: expected the number of the case"
        for i, image in enumerate(content["images"])
        if not is_whole(image.get("patient"), 0)
    ]
    if not problems:
        of_category = {category["id"]: [] for category in expected}
        for annotation in content["annotations"]:
            number = annotation.get("category_id")
            of_category.setdefault(number if is_whole(number) else None, []).append(annotation)
        for category, annotations in of_category.items():
            known = category if category in (1, 2) else 1
            problems += annotation_problems(annotations, content["images"], known)
    refuse_if(problems, path, "Run tools/prepare_data.py --lits again.")
    return content
