"""Pictures of a result: ground truth and detections on the key slice, with the slices beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.data.slices import SliceFolder, load_slices, plan_stack
from deeplesion.evaluation.diameters import diameters_of_mask
from deeplesion.evaluation.matching import match
from deeplesion.evaluation.results import Result
from deeplesion.files import write_whole

SOFT_TISSUE, LUNG = (-160.0, 240.0), (-1350.0, 150.0)  # HU
AIR = -500  # HU; what is below is lung, or outside the body
PANEL = 640  # px; vector-sharp outlines need more pixels than the slice has
SIDE = PANEL // 2  # of a neighbouring slice's panel, which shows the lesion at the same scale
BAR = 28  # px, for the captions

# BGR; after Okabe and Ito, whose colours those who see red and green alike can tell apart.
WHITE, GREY = (255, 255, 255), (150, 150, 150)
TRUTH = (66, 228, 240)
COLOURS = {"hit": (150, 215, 60), "repeat": (240, 190, 100), "false positive": (60, 110, 255)}


def draw_results(result: Result, folder: SliceFolder, out_dir: Path) -> list[Path]:
    """One PNG a key slice: ground truth, detections, and the previous and the next slice.

    Detections are shown down to the score at which the model has one false positive an image, with
    the RECIST diameters of their masks. The neighbours are those that a network looks at first:
    2 mm away, or the next slices where these are thicker, within the slice's own volume.

    Args:
        result: detections and ground truth; without `slice_range` in its records (result files of
            old) there are no neighbours.
        folder: where the slices are.
        out_dir: made if it is not there.

    Returns:
        the paths, in the order of the records.

    Raises:
        FileNotFoundError, ValueError: a slice is missing or unreadable, see `slices.load_slices`.
    """
    threshold = score_at_one_false_positive(result)
    paths = []
    for record in tqdm(result.records, desc="drawing", unit="slice"):
        path = out_dir / record["file_name"].replace("/", "_")
        slices = read_neighbours(folder, record)
        picture = draw_record(record, slices, threshold, result.iou_threshold, result.pixel_offset)
        write_whole(path, cv2.imencode(".png", picture)[1].tobytes())
        paths.append(path)
    return paths


def score_at_one_false_positive(result: Result) -> float:
    """The lowest score at which there is at most one false positive an image."""
    curve = result.curve
    more = curve.thresholds[curve.fps_per_image > 1]  # a score is kept whole or not at all
    allowed = curve.thresholds[curve.thresholds > more.max(initial=-np.inf)]
    return float(allowed.min()) if len(allowed) else np.inf


def read_neighbours(folder: SliceFolder, record: dict) -> list[tuple[np.ndarray, float]]:
    """The slices to show, each (H, W) HU and its distance from the key slice in mm.

    The key slice comes first, then the previous and the next slice, where they are known and the
    volume does not end.
    """
    name, thickness = record["file_name"], record["thickness_mm"]
    if record.get("slice_range") is None or not np.isfinite(thickness):
        return [(folder.read(name), 0.0)]
    stack, _ = load_slices(folder, name, thickness, record["slice_range"], num_slices=3)
    key_slice = int(Path(name).stem)
    positions, _ = plan_stack(key_slice, thickness, record["slice_range"], num_slices=3)
    distances = [
        ((1 - weight) * near + weight * far - key_slice) * thickness
        for near, far, weight in positions
    ]
    neighbours = [(stack[..., i], distances[i]) for i in (0, 2) if distances[i]]
    return [(stack[..., 1], 0.0), *neighbours]


def draw_record(
    record: dict,
    slices: Sequence[tuple[np.ndarray, float]],
    threshold: float,
    iou_threshold: float = 0.5,
    pixel_offset: int = 1,
) -> np.ndarray:
    """(BAR + PANEL, 2 * PANEL + SIDE, 3) uint8 BGR picture of one record.

    Args:
        record: of a result file.
        slices: as `read_neighbours` returns them.
        threshold: detections of a lower score are left out, and what only they hit is missed.
        iou_threshold, pixel_offset: of a hit, see `deeplesion.evaluation.froc.froc`.
    """
    verdicts, hit_by = match(record, iou_threshold, pixel_offset)
    lesions, scores = record["lesions"], record["scores"]
    masks = record.get("masks") or [None] * len(scores)
    key_slice = slices[0][0]
    boxes = [lesion["bbox"] for lesion in lesions]
    window = window_for(key_slice, boxes)
    scale = PANEL / max(key_slice.shape)

    truth = Panel(key_slice, window, scale)
    for lesion, detection in zip(lesions, hit_by):
        missed = detection is None or scores[detection] < threshold
        text = millimetres(lesion.get("diameters_mm")) + (" missed" if missed else "")
        shape = (lesion["bbox"], lesion.get("mask"), lesion.get("recist"))
        truth.draw(*shape, TRUTH, text.strip())
    found = Panel(key_slice, window, scale)
    for box, score, mask, verdict in zip(record["boxes"], scores, masks, verdicts):
        if score < threshold:
            continue
        measured = diameters_of_mask(mask, record["spacing_mm"]) if mask else None
        text = f"{score:.2f}"
        if measured is not None:
            text += f" {millimetres(measured.lengths_mm)}"
        recist = None if measured is None else measured.recist
        found.draw(box, mask, recist, COLOURS[verdict], text)

    picture = np.zeros((BAR + PANEL, 2 * PANEL + SIDE, 3), np.uint8)
    for panel, left in ((truth, 0), (found, PANEL)):
        image = panel.finished()
        picture[BAR : BAR + image.shape[0], left : left + image.shape[1]] = image
    centre = np.mean(np.reshape(boxes, (-1, 2)), axis=0) if boxes else None
    for sign, top in ((-1, BAR), (1, BAR + SIDE)):
        side = next((s for s in slices if np.sign(s[1]) == sign), None)
        picture[top : top + SIDE, -SIDE:] = neighbour_panel(side, sign, centre, window, scale)

    thickness = record["thickness_mm"]
    thickness = f"{thickness:g} mm slices" if np.isfinite(thickness) else "thickness unknown"
    caption(picture, 0, [(f"{record['file_name']}  {thickness}", WHITE), ("ground truth", TRUTH)])
    shown = "none at one false positive per image" if threshold == np.inf else f">= {threshold:.2f}"
    caption(picture, PANEL, [(f"detections {shown}:", WHITE), *COLOURS.items()])
    caption(picture, 2 * PANEL, [("neighbouring slices", WHITE)])
    return picture


def window_for(hu: np.ndarray, boxes: Sequence) -> tuple[float, float]:
    """The HU window in which to look at an (H, W) slice: that of the lung if the boxes lie in it.

    Boxes are in the lung where more than half of their pixels is air.
    """
    corners = np.reshape(np.array(boxes, float), (-1, 4)).round().astype(int)
    regions = [hu[max(y1, 0) : y2 + 1, max(x1, 0) : x2 + 1].ravel() for x1, y1, x2, y2 in corners]
    pixels = np.concatenate([np.zeros(1), *regions])
    return LUNG if (pixels < AIR).mean() > 0.5 else SOFT_TISSUE


def to_grey(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Grey levels, uint8, of HU of any shape: the window's low end is black, its high end white."""
    low, high = window
    return np.uint8(np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255 + 0.5)


def millimetres(diameters: Sequence[float] | None) -> str:
    """'23 x 15 mm'; empty where they are not known."""
    return f"{diameters[0]:.0f} x {diameters[1]:.0f} mm" if diameters is not None else ""


class Panel:
    """A slice at PANEL pixels a side on which findings are drawn; texts keep off one another."""

    def __init__(self, hu: np.ndarray, window: tuple[float, float], scale: float):
        self.scale = scale
        self.image = enlarged(to_grey(hu, window), scale)
        self.texts: list[tuple[str, np.ndarray, tuple]] = []

    def draw(self, box: Sequence, mask: dict | None, recist: Iterable, colour: tuple, text: str):
        """Box, contour of the mask (COCO run lengths) and RECIST axes, where they are known."""
        if mask:
            # Half-way between the pixels in and out, as the diameters are measured.
            large = cv2.resize(255 * coco_mask.decode(mask), self.image.shape[1::-1])
            outlines = cv2.findContours(
                (large > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
            )[0]
            cv2.drawContours(self.image, outlines, -1, colour, 1, cv2.LINE_AA)
        if recist is not None:
            for start, end in self.points(recist).reshape(2, 2, 2).tolist():
                cv2.line(self.image, start, end, WHITE, 1, cv2.LINE_AA)
        corners = self.points(box)
        cv2.rectangle(self.image, *corners.tolist(), colour, 1)
        self.texts.append((text, corners, colour))

    def points(self, points: Iterable) -> np.ndarray:
        """Pixel-centre coordinates, any number of pairs -> (n, 2) pixels of the panel, int32."""
        points = np.reshape(np.asarray(points, float), (-1, 2))
        return np.round((points + PIXEL_CENTRE) * self.scale - PIXEL_CENTRE).astype(np.int32)

    def finished(self) -> np.ndarray:
        """The picture, with the texts over all that is drawn."""
        height, width = self.image.shape[:2]
        taken: list[tuple[int, int, int, int]] = []
        for text, ((x1, y1), (x2, y2)), colour in self.texts:
            w, h = text_size(text)
            # Above the box, below, right, left: the first place that is free, or else above.
            places = [(x1, y1 - h - 3), (x1, y2 + 4), (x2 + 4, y1), (x1 - w - 4, y1)]
            places = [(min(max(x, 0), width - w), min(max(y, 0), height - h)) for x, y in places]
            free = [p for p in places if not any(overlap((*p, w, h), other) for other in taken)]
            x, y = (free or places)[0]
            taken.append((x, y, w, h))
            write(self.image, text, x, y, colour)
        return self.image


def neighbour_panel(
    neighbour: tuple[np.ndarray, float] | None,
    sign: int,
    centre: np.ndarray | None,
    window: tuple[float, float],
    scale: float,
) -> np.ndarray:
    """(SIDE, SIDE, 3): the part of a neighbouring slice around `centre` (x, y), the middle if None.

    At the scale of the large panels, so that lesions can be compared by eye.
    """
    panel = np.zeros((SIDE, SIDE, 3), np.uint8)
    which = "previous" if sign < 0 else "next"
    if neighbour is None:
        write(panel, f"no {which} slice", 8, 8, GREY)
        return panel
    hu, distance = neighbour
    large = enlarged(to_grey(hu, window), scale)
    middle = np.array(large.shape[1::-1]) / 2 if centre is None else (centre + PIXEL_CENTRE) * scale
    x, y = np.clip(middle - SIDE / 2, 0, np.maximum(np.array(large.shape[1::-1]) - SIDE, 0))
    part = large[int(y) : int(y) + SIDE, int(x) : int(x) + SIDE]
    panel[: part.shape[0], : part.shape[1]] = part
    panel[[0, -1]] = panel[:, [0, -1]] = GREY
    write(panel, f"{which}, {distance:+g} mm", 8, 8, WHITE)
    return panel


def enlarged(grey: np.ndarray, scale: float) -> np.ndarray:
    """(H, W) uint8 -> (H * scale, W * scale, 3), smoothly."""
    large = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    return cv2.cvtColor(large, cv2.COLOR_GRAY2BGR)


def caption(picture: np.ndarray, left: int, parts: Sequence[tuple]) -> None:
    """Texts side by side in the bar, each with its colour."""
    x = left + 8
    for text, colour in parts:
        write(picture, text, x, 8, colour)
        x += text_size(text)[0] + 14


def text_size(text: str) -> tuple[int, int]:
    """Width and height of a text in pixels."""
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)
    return width, height + 4


def write(picture: np.ndarray, text: str, x: int, y: int, colour: tuple) -> None:
    """Text with its top left corner at x, y, on a dark rim that keeps it legible on bone."""
    origin = (int(x), int(y) + text_size(text)[1] - 3)
    for shade, thickness in (((0, 0, 0), 3), (colour, 1)):
        cv2.putText(
            picture, text, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.45, shade, thickness, cv2.LINE_AA
        )


def overlap(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two rectangles x, y, width, height meet."""
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))
