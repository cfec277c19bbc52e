"""AP50 by pycocotools: COCO's average precision at an IoU of 0.5, of boxes and of masks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def ap50(records: Sequence[dict]) -> dict[str, float | None]:
    """AP50 in % of the detections of a result file, over all images, as COCO defines it.

    One category, lesions of any size, the 100 best detections an image, precision at 101 recalls.
    Boxes are x1, y1, x2 - x1, y2 - y1, without the pixel that the published FROC tables add.

    Returns:
        `bbox`, and `segm`: None unless every detection and every lesion has a mask. Both are None
        without lesions.
    """
    if not any(record["lesions"] for record in records):
        return {"bbox": None, "segm": None}
    truth, found = _coco(records)
    masked = all("segmentation" in a for coco in (truth, found) for a in coco.anns.values())
    return {
        "bbox": _average_precision(truth, found, "bbox"),
        "segm": _average_precision(truth, found, "segm") if masked else None,
    }


def _coco(records: Sequence[dict]) -> tuple[COCO, COCO]:
    """Ground truth and detections of the records, both as pycocotools likes them."""
    lesions, detections = [], []
    for image, record in enumerate(records, start=1):
        for lesion in record["lesions"]:
            lesions.append(_annotation(image, lesion["bbox"], lesion.get("mask"), iscrowd=0))
        masks = record.get("masks", [None] * len(record["boxes"]))
        for box, score, mask in zip(record["boxes"], record["scores"], masks, strict=True):
            detections.append(_annotation(image, box, mask, score=score))
    images = [
        {"id": image, "height": record["height"], "width": record["width"]}
        for image, record in enumerate(records, start=1)
    ]
    both = []
    for listed in (lesions, detections):
        coco = COCO()
        coco.dataset = {
            "images": images,
            "categories": [{"id": 1, "name": "lesion"}],
            "annotations": [{**a, "id": i} for i, a in enumerate(listed, start=1)],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        both.append(coco)
    return both[0], both[1]


def _annotation(image: int, box: Sequence[float], mask: dict | None, **fields) -> dict:
    x1, y1, x2, y2 = box
    annotation = dict(image_id=image, category_id=1, bbox=[x1, y1, x2 - x1, y2 - y1], **fields)
    annotation["area"] = (x2 - x1) * (y2 - y1)  # all areas count alike, but pycocotools asks
    if mask:
        annotation["segmentation"] = mask
    return annotation


def _average_precision(truth: COCO, found: COCO, kind: str) -> float:
    evaluation = COCOeval(truth, found, kind)
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.maxDets = [100]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, np.inf]], ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return 100 * float(evaluation.eval["precision"].mean())
