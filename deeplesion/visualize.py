"""Pictures of a result file: ground truth and detections on soft-tissue-windowed key slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from deeplesion.evaluation import detection_array
from deeplesion.froc import box_iou, froc
from deeplesion.slices import SliceFolder

SOFT_TISSUE = (-160.0, 240.0)  # HU
PANEL_SIZE = 640  # px; vector-sharp outlines need more pixels than the slice has
GREEN, YELLOW, RED = (80, 220, 80), (0, 210, 255), (70, 70, 255)  # BGR


def draw_results(records: Sequence[dict], image_root: Path, out_dir: Path) -> list[Path]:
    """One PNG a key slice: ground truth left, detections right.

    Detections are shown down to the score at which the whole set has one false positive an image.

    Args:
        records: of a result file (`evaluation.read_results`).
        image_root: the `Images_png` folder.
        out_dir: made if it is not there.

    Returns:
        the paths, in the order of `records`.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    threshold = score_at_one_false_positive(records)
    folder = SliceFolder(image_root)
    paths = []
    for record in tqdm(records, desc="drawing", unit="slice"):
        path = out_dir / record["file_name"].replace("/", "_")
        picture = draw_record(record, folder.read(record["file_name"]), threshold)
        encoded = cv2.imencode(".png", picture)[1]
        path.write_bytes(encoded.tobytes())
        paths.append(path)
    return paths


def score_at_one_false_positive(records: Sequence[dict]) -> float:
    """The lowest score at which there is at most one false positive an image."""
    lesions = [np.array([x["bbox"] for x in r["lesions"]], float).reshape(-1, 4) for r in records]
    curve = froc([detection_array(r) for r in records], lesions)
    allowed = curve.thresholds[curve.fps_per_image <= 1]
    return float(allowed.min()) if len(allowed) else np.inf


def draw_record(record: dict, hu: np.ndarray, threshold: float) -> np.ndarray:
    """(H', W', 3) uint8 BGR picture of one record and its (H, W) key slice in HU."""
    low, high = SOFT_TISSUE
    grey = np.uint8(np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255)
    scale = PANEL_SIZE / max(hu.shape)
    background = cv2.cvtColor(
        cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC),
        cv2.COLOR_GRAY2BGR,
    )
    truth, found = background.copy(), background.copy()
    lesions = record["lesions"]
    for lesion in lesions:
        draw_box(truth, lesion["bbox"], scale, GREEN)
        draw_mask(truth, lesion["mask"], scale, GREEN)
        if lesion["recist"]:
            ends = np.reshape(lesion["recist"], (2, 2, 2))
            for start, end in ends:
                line(truth, start, end, scale, YELLOW)
    boxes = np.reshape(np.array([x["bbox"] for x in lesions], float), (-1, 4))
    detections = detection_array(record)
    masks = record.get("masks", [None] * len(detections))
    for detection, mask in zip(detections, masks):
        if detection[4] < threshold:
            continue
        hit = (box_iou(detection[:4], boxes) >= 0.5).any()
        colour = GREEN if hit else RED
        draw_box(found, detection[:4], scale, colour, f"{detection[4]:.2f}")
        if mask:
            draw_mask(found, mask, scale, colour)
    label(truth, f"{record['file_name']}  {record['thickness_mm']:g} mm  ground truth")
    label(found, "detections (green: hit, red: false positive)")
    return np.hstack([truth, found])


def to_panel(points: Iterable, scale: float) -> np.ndarray:
    """Pixel-centre coordinates -> panel pixels, as int32."""
    return np.round((np.asarray(points, float) + 0.5) * scale - 0.5).astype(np.int32)


def line(picture: np.ndarray, start: Iterable, end: Iterable, scale: float, colour: tuple) -> None:
    a, b = to_panel([start, end], scale).tolist()
    cv2.line(picture, a, b, colour, 1, cv2.LINE_AA)


def draw_box(
    picture: np.ndarray, box: Sequence, scale: float, colour: tuple, text: str = ""
) -> None:
    a, b = to_panel(np.reshape(box, (2, 2)), scale).tolist()
    cv2.rectangle(picture, a, b, colour, 1)
    if text:
        cv2.putText(
            picture, text, (a[0], max(a[1] - 4, 10)), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1,
            cv2.LINE_AA,
        )  # fmt: skip


def draw_mask(picture: np.ndarray, rle: dict, scale: float, colour: tuple) -> None:
    mask = coco_mask.decode(rle)
    large = cv2.resize(mask, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    outlines = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(picture, outlines, -1, colour, 1)


def label(picture: np.ndarray, text: str) -> None:
    cv2.putText(
        picture, text, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA
    )
