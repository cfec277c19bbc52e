"""FROC of a full test split: ours against one plain loop over the detections."""

from __future__ import annotations

import numpy as np

from benchmarks.measure import Case
from deeplesion.evaluation.froc import FROC, froc

IMAGES, BOXES = 4817, 50


def cases() -> list[Case]:
    """The curve of a test split with the most detections an image that the detector returns."""
    detections, ground_truths = synthetic(IMAGES, BOXES)
    return [
        Case(
            name=f"curve of {IMAGES} images x {BOXES} boxes",
            ours=lambda: points(froc(detections, ground_truths)),
            baseline=lambda: plain_froc(detections, ground_truths),
            check=np.testing.assert_array_equal,
        )
    ]


def points(curve: FROC) -> tuple[np.ndarray, np.ndarray]:
    return curve.fps_per_image, curve.sensitivity


def synthetic(images: int, boxes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Detections, (boxes, 5) an image, and lesions: one an image, two in every fiftieth.

    Three detections lie around each lesion, the others anywhere. Scores have three decimals, so
    that there are ties.
    """
    rng = np.random.default_rng(0)
    detections, ground_truths = [], []
    for image in range(images):
        lesions = _boxes(rng, 2 if image % 50 == 0 else 1)
        near = np.repeat(lesions, 3, axis=0)
        near = near + rng.normal(0, 3, near.shape)
        found = np.concatenate([near, _boxes(rng, boxes - len(near))])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        scores = rng.uniform(size=(boxes, 1)).round(3)
        detections.append(np.hstack([found, scores]))
        ground_truths.append(lesions)
    return detections, ground_truths


def _boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    corner = rng.uniform(0, 450, (number, 2))
    return np.hstack([corner, corner + rng.uniform(10, 60, corner.shape)])


def plain_froc(
    detections: list[np.ndarray],
    ground_truths: list[np.ndarray],
    iou_threshold: float = 0.5,
    offset: float = 1,
) -> tuple[list[float], list[float]]:
    """False positives per image and sensitivity after each detection, by the definition."""
    boxes = [(row[4], image, row) for image, rows in enumerate(detections) for row in rows.tolist()]
    boxes.sort(key=lambda box: -box[0])
    lesions = [rows.tolist() for rows in ground_truths]
    hit = [[False] * len(rows) for rows in lesions]
    number = sum(len(rows) for rows in lesions)
    hits = false_positives = 0
    fps_per_image, sensitivity = [], []
    for _, image, box in boxes:
        reached = False
        for index, lesion in enumerate(lesions[image]):
            if iou(box, lesion, offset) >= iou_threshold:
                reached = True
                if not hit[image][index]:
                    hit[image][index] = True
                    hits += 1
        if not reached:
            false_positives += 1
        fps_per_image.append(false_positives / len(detections))
        sensitivity.append(hits / number)
    return fps_per_image, sensitivity


def iou(a: list[float], b: list[float], offset: float) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    if width <= 0 or height <= 0:
        return 0.0
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    return width * height / (area_a + area_b - width * height)
