"""An exported detector in onnxruntime against LesionDetector with the same weights, over slices of
a whole scan."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.detect import (
    ALL_BOXES,
    BOXES,
    CLOCK,
    INTERVAL_MM,
    LINKED,
    random_detector,
    same_scores,
    scan,
    score_between,
)
from benchmarks.measure import Case
from ct_volumes.exported import ExportedDetector
from ct_volumes.lesions import SliceDetections
from mmdet_ext.engine.export import OPENS, export


def cases(
    size: int = 512, slices: int = 4, kind: str = "onnx", overrides: dict | None = None
) -> list[Case]:
    """Times are of `slices` / 2 slices looked at."""
    volume = scan(slices, size)
    options = {"resize.size": size, **ALL_BOXES, "model.test_cfg.rcnn.max_per_img": BOXES}
    detector = random_detector(volume, {**options, **(overrides or {})})
    with tempfile.TemporaryDirectory() as folder:
        export(detector, Path(folder) / kind, kind, (size, size))
        exported = ExportedDetector(Path(folder) / kind, OPENS[kind])
    found = exported.detect_slices(volume, INTERVAL_MM, progress=False)
    least = score_between(found, LINKED * len(found))

    def ours() -> list[SliceDetections]:
        return exported.detect_slices(volume, INTERVAL_MM, progress=False, least_score=least)

    def baseline() -> list[SliceDetections]:
        return detector.detect_slices(volume, INTERVAL_MM, progress=False, least_score=least)

    name = f"{kind}, {len(found)} slices of {size}, {BOXES} boxes each"
    return [Case(name, ours, baseline, same_scores, clock=CLOCK)]
