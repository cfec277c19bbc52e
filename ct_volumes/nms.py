"""Greedy non-maximum suppression on a CPU that ends when it has as many boxes as are asked for."""

from __future__ import annotations

import numpy as np


def first_kept(boxes: np.ndarray, iou_threshold: float, most: int) -> np.ndarray:
    """The first `most` boxes that greedy NMS keeps.

    Args:
        boxes: (n, 4) float32 x1, y1, x2, y2, by falling score.
        iou_threshold: a box that overlaps with a kept one by more is left out.

    Returns the numbers of at most `most` boxes, ascending.
    """
    left, top, right, bottom = np.ascontiguousarray(boxes.T)
    areas = (right - left) * (bottom - top)
    rest = np.arange(len(boxes))
    kept = []
    while len(rest) and len(kept) < most:
        best, rest = rest[0], rest[1:]
        kept.append(best)
        # In the order and type of mmcv's operations, so that a tie with the threshold is one there.
        width = np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest])
        height = np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest])
        common = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(invalid="ignore", divide="ignore"):  # two boxes without area: not more
            iou = common / (areas[best] + areas[rest] - common)
        rest = rest[~(iou > np.float32(iou_threshold))]
    return np.array(kept, np.int64)
