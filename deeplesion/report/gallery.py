"""What a report's gallery shows: confident false positives, missed lesions and hits of a model,
each with the outlines to draw and a picture of its surroundings."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from deeplesion.conventions import LESION_TYPES, PIXEL_CENTRE, THIN_MM
from deeplesion.data.recist import mask_outline
from deeplesion.data.slices import SliceFolder
from deeplesion.evaluation.breakdowns import size_group
from deeplesion.evaluation.diameters import diameters_of_mask
from deeplesion.evaluation.matching import match
from deeplesion.evaluation.results import Result
from deeplesion.report.pictures import (
    read_neighbours,
    score_at_one_false_positive,
    to_grey,
    window_for,
)

KINDS = ("false positive", "missed", "hit")
MIN_SIDE = 64  # px of the slice that a picture shows at least
MAX_SIDE = 160  # px a side of an embedded picture
JPEG_QUALITY = 80


def collect(result: Result, examples: int, folder: SliceFolder | None = None) -> dict:
    """The findings of a result at the score at which it has one false positive an image.

    Args:
        result: detections and ground truth.
        examples: how many findings of each kind at most: the false positives and the hits of the
            highest scores, and the largest of the missed lesions.
        folder: where the slices are; None for outlines without pictures.

    Returns:
        `threshold`, that score (None if no score has so few false positives), `counts` {kind:
        how many there are in all}, and `findings`, kind by kind, the first of each first. A finding
        has

        - `kind`; `name` and `patient` of its slice; `thickness_mm` (None if unknown) and
          `thickness`, 'thin', 'thick' or 'unknown';
        - `score` of the detection (of a missed lesion: of the best one below the threshold) or
          None; `annotated`, `predicted`: diameters in mm or None;
        - `types`: the lesion's, or for a false positive those of the lesions on its slice; `size`:
          the lesion's group, or for a false positive that of its predicted diameters;
        - `view`: x, y, side of the square that is shown and `spacing_mm`; `truth`, `found` and
          `others` (further detections above the threshold): what is drawn, each with `box`,
          `outline`, `recist` and, of detections, `verdict`. Coordinates count pixel edges;
        - with slices, `pictures`: the view in the key slice and in its neighbours, JPEGs as data
          URIs, and `distances`, how far from the key slice each is in mm.

    Raises:
        FileNotFoundError, ValueError: a slice is missing or unreadable, see `slices.load_slices`.
    """
    threshold = score_at_one_false_positive(result)
    chosen, counts = [], {}
    found = _findings(result, threshold)
    for kind in KINDS:
        of_kind = [finding for finding in found if finding["kind"] == kind]
        counts[kind] = len(of_kind)
        chosen += sorted(of_kind, key=_rank, reverse=True)[:examples]

    findings = []
    for finding in tqdm(
        chosen, desc=f"gallery of {result.name}", unit="finding", disable=folder is None
    ):
        findings.append(_describe(finding, threshold, folder))
    return dict(
        threshold=threshold if np.isfinite(threshold) else None, counts=counts, findings=findings
    )


def _findings(result: Result, threshold: float) -> list[dict]:
    """Every finding, with the record, detection and lesion (indices, or None) that it is about."""
    findings = []
    for record in result.records:
        verdicts, hit_by = match(record, result.iou_threshold, result.pixel_offset)
        shared = dict(record=record, verdicts=verdicts)
        for detection, verdict in enumerate(verdicts):
            if verdict == "false positive" and record["scores"][detection] >= threshold:
                findings.append(
                    dict(kind="false positive", detection=detection, lesion=None, **shared)
                )
        for lesion, detection in enumerate(hit_by):
            hit = detection is not None and record["scores"][detection] >= threshold
            kind = "hit" if hit else "missed"
            findings.append(dict(kind=kind, detection=detection, lesion=lesion, **shared))
    return findings


def _rank(finding: dict) -> float:
    """What the findings of a kind are sorted by: size if missed, else score."""
    record = finding["record"]
    if finding["kind"] == "missed":
        diameters = record["lesions"][finding["lesion"]].get("diameters_mm")
        return diameters[0] if diameters else 0.0
    return record["scores"][finding["detection"]]


def _describe(finding: dict, threshold: float, folder: SliceFolder | None) -> dict:
    """A finding as `collect` returns it."""
    record, detection = finding["record"], finding["detection"]
    lesions, thickness = record["lesions"], record["thickness_mm"]
    lesion = None if finding["lesion"] is None else lesions[finding["lesion"]]
    known = bool(np.isfinite(thickness))
    found = None if detection is None else _detection(finding, detection)
    predicted = None if found is None else found.pop("diameters_mm")
    subject = lesion or dict(diameters_mm=predicted)
    box = lesion["bbox"] if lesion else record["boxes"][detection]
    view = _view(box, record["height"], record["width"])
    others = [
        dict(box=_edges(box), verdict=verdict)
        for i, (box, score, verdict) in enumerate(
            zip(record["boxes"], record["scores"], finding["verdicts"])
        )
        if score >= threshold and i != detection
    ]
    described = dict(
        kind=finding["kind"],
        name=record["file_name"],
        patient=record["patient"],
        thickness_mm=thickness if known else None,
        thickness=("thin" if thickness <= THIN_MM else "thick") if known else "unknown",
        score=None if detection is None else record["scores"][detection],
        annotated=lesion.get("diameters_mm") if lesion else None,
        predicted=predicted,
        types=sorted({_type(x) for x in ([lesion] if lesion else lesions)}) or ["unknown"],
        size=size_group(subject),
        view=view,
        spacing_mm=record["spacing_mm"],
        truth=[_shape(x["bbox"], x.get("mask"), x.get("recist")) for x in lesions],
        found=found,
        others=others,
    )
    if folder is not None:
        slices = read_neighbours(folder, record)
        described["distances"] = [distance for _, distance in slices]
        described["pictures"] = _pictures([hu for hu, _ in slices], box, view)
    return described


def _detection(finding: dict, index: int) -> dict:
    """The shapes of a detection, its verdict and, under `diameters_mm`, what its mask measures."""
    record = finding["record"]
    mask = record["masks"][index] if record.get("masks") else None
    measured = diameters_of_mask(mask, record["spacing_mm"]) if mask else None
    shape = _shape(record["boxes"][index], mask, None if measured is None else measured.recist)
    diameters = None if measured is None else np.round(measured.lengths_mm, 1).tolist()
    return dict(verdict=finding["verdicts"][index], diameters_mm=diameters, **shape)


def _shape(box: Sequence, mask: dict | None, recist: Iterable | None) -> dict:
    """Box (4,), outline (2n,) and RECIST axes (8,), None where not known; flat lists of x, y."""
    decoded = coco_mask.decode(mask) if mask else np.zeros((1, 1))
    return dict(
        box=_edges(box),
        outline=_edges(mask_outline(decoded)) if decoded.any() else None,
        recist=None if recist is None else _edges(recist),
    )


def _edges(points: Iterable) -> list[float]:
    """Pixel-centre coordinates of files -> pixel edges, which pictures count; tenths will do."""
    return np.round(np.asarray(points, float).ravel() + PIXEL_CENTRE, 1).tolist()


def _type(lesion: dict) -> str:
    return LESION_TYPES[lesion.get("lesion_type", -1)]


def _view(box: Sequence[float], height: int, width: int) -> list[int]:
    """x, y, side of a square around a box, three times its size, within the slice."""
    x1, y1, x2, y2 = box
    side = int(np.clip(3 * max(x2 - x1, y2 - y1), MIN_SIDE, max(height, width)))
    side = min(side, height, width)
    x = int(np.clip((x1 + x2 + 1 - side) / 2, 0, width - side))
    y = int(np.clip((y1 + y2 + 1 - side) / 2, 0, height - side))
    return [x, y, side]


def _pictures(slices: Sequence[np.ndarray], box: Sequence, view: Sequence[int]) -> list[str]:
    """The view of each slice as a JPEG in a data URI, all in the window that suits the first."""
    window = window_for(slices[0], [box])
    x, y, side = view
    pictures = []
    for hu in slices:
        grey = to_grey(hu[y : y + side, x : x + side], window)
        if side > MAX_SIDE:
            grey = cv2.resize(grey, (MAX_SIDE, MAX_SIDE), interpolation=cv2.INTER_AREA)
        encoded = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        content = base64.b64encode(encoded.tobytes()).decode("ascii")
        pictures.append(f"data:image/jpeg;base64,{content}")
    return pictures
