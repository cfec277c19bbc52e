"""From detections to the tables of the papers: FROC over all, thin and thick slices; result
files."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deeplesion.files import write_whole
from deeplesion.froc import TABLE_FPS, froc

THIN_MM = 2.0

RESULT_FORMAT = "deeplesion-results-1"


def froc_table(
    records: Sequence[dict], iou_threshold: float = 0.5, pixel_offset: int = 1
) -> list[dict]:
    """FROC sensitivities over all images, thin (<= 2 mm) and thick (> 2 mm) ones.

    Args:
        records: one an image, as in a result file (`write_results`): `boxes`, `scores`, `lesions`,
            `thickness_mm`.

    Returns:
        one row a group that has lesions: `group`, `images`, `lesions`, `sensitivity` {operating
        point: %}, `average` (% at 0.5, 1, 2, 4), `difference` (the group's average minus the one
        over all). Images of unknown thickness are in 'all' only.
    """
    thickness = np.array([r["thickness_mm"] for r in records], float)
    groups = {
        "all": np.ones(len(records), bool),
        "thin": thickness <= THIN_MM,
        "thick": thickness > THIN_MM,
    }
    rows = []
    for group, members in groups.items():
        chosen = [r for r, member in zip(records, members) if member]
        if not any(r["lesions"] for r in chosen):
            continue
        curve = froc(
            [detection_array(r) for r in chosen],
            [np.array([x["bbox"] for x in r["lesions"]], float).reshape(-1, 4) for r in chosen],
            iou_threshold,
            pixel_offset,
        )
        points = 100 * curve.sensitivity_at(TABLE_FPS)
        average = 100 * float(curve.score)
        rows.append(
            dict(
                group=group,
                images=len(chosen),
                lesions=sum(len(r["lesions"]) for r in chosen),
                sensitivity={f"{p:g}": float(v) for p, v in zip(TABLE_FPS, points)},
                average=average,
                difference=average - rows[0]["average"] if rows else 0.0,
            )
        )
    return rows


def detection_array(record: dict) -> np.ndarray:
    """(n, 5) x1, y1, x2, y2, score."""
    boxes = np.array(record["boxes"], float).reshape(-1, 4)
    return np.column_stack([boxes, np.array(record["scores"], float)])


def format_table(rows: Sequence[dict]) -> str:
    """The rows of `froc_table` as text, laid out as Table 3 of the AlignShift paper."""
    points = [f"{p:g}" for p in TABLE_FPS]
    lines = ["Sensitivity (%) at false positives per image"]
    header = f"{'slices':<7}{'images':>7}{'lesions':>8} |"
    header += "".join(f"{p:>7}" for p in points) + " | Avg.[0.5,1,2,4]   diff."
    lines += [header, "-" * len(header)]
    for row in rows:
        difference = "-" if row["group"] == "all" else f"{row['difference']:+.2f}"
        lines.append(
            f"{row['group']:<7}{row['images']:>7}{row['lesions']:>8} |"
            + "".join(f"{row['sensitivity'][p]:>7.2f}" for p in points)
            + f" | {row['average']:>15.2f} {difference:>7}"
        )
    return "\n".join(lines)


def write_results(path: Path, records: Sequence[dict]) -> None:
    """Writes a result file: JSON, gzipped when the name ends in .gz.

    `{"format": "deeplesion-results-1", "images": [record, ...]}`; a record has `file_name`,
    `patient`, `height`, `width`, `spacing_mm`, `thickness_mm` (null if unknown), `lesions` (each
    `bbox`, `recist`, `mask`, `diameters_mm`, `lesion_type`), `boxes` (n, 4), `scores` (n,) and,
    optionally, `masks` (n COCO run lengths). Boxes are x1, y1, x2, y2 of 0-based pixel centres in
    the image's own pixels.
    """
    images = [
        {**r, "thickness_mm": r["thickness_mm"] if math.isfinite(r["thickness_mm"]) else None}
        for r in records
    ]
    text = json.dumps({"format": RESULT_FORMAT, "images": images}, separators=(",", ":"))
    write_whole(path, gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text)


def read_results(path: Path) -> list[dict]:
    """Reads what `write_results` wrote. Raises ValueError, naming the file, for anything else."""
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        content = json.loads(data)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a result file of tools/test.py: {error}") from None
    if not isinstance(content, dict) or content.get("format") != RESULT_FORMAT:
        raise ValueError(f"{path} is not a result file of tools/test.py (format {RESULT_FORMAT})")
    for record in content["images"]:
        if record["thickness_mm"] is None:
            record["thickness_mm"] = math.nan
    return content["images"]


def table_file(result_file: Path) -> Path:
    """Where the FROC table of a result file goes: results.json.gz -> results.froc.json."""
    return result_file.with_name(result_file.name.split(".")[0] + ".froc.json")


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """Writes the rows of `froc_table` as JSON."""
    write_whole(path, json.dumps({"froc": list(rows)}, indent=2) + "\n")
