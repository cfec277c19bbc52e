"""What became of each detection and of each lesion of an image."""

from __future__ import annotations

import numpy as np

from deeplesion.evaluation.froc import box_iou
from deeplesion.evaluation.results import detection_array, lesion_array


def match(
    record: dict, iou_threshold: float = 0.5, pixel_offset: int = 1
) -> tuple[list[str], list[int | None]]:
    """What became of each detection and of each lesion of one image, by the rule of `froc`.

    Returns:
        for each detection 'hit' (the first to reach some lesion), 'repeat' (reaches only lesions
        hit before) or 'false positive'; for each lesion the index of the detection that hits it, or
        None.
    """
    detections, lesions = detection_array(record), lesion_array(record)
    reached = box_iou(detections[:, None, :4], lesions, pixel_offset) >= iou_threshold
    by_score = np.argsort(-detections[:, 4], kind="stable")
    hit_by = [
        int(by_score[np.argmax(reached[by_score, j])]) if reached[:, j].any() else None
        for j in range(len(lesions))
    ]
    verdicts = [
        "hit" if i in hit_by else "repeat" if reaches else "false positive"
        for i, reaches in enumerate(reached.any(axis=1).tolist())
    ]
    return verdicts, hit_by
