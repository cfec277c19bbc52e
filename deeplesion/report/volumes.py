"""The evaluation of whole scans as a user sees it: the table, its files, the calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deeplesion.errors import DataError
from deeplesion.evaluation.volume_boxes import read_volume_boxes
from deeplesion.evaluation.volume_evaluation import (
    VOLUME_POINTS,
    evaluate_volumes,
    patient_of,
    read_volume_detections,
)
from deeplesion.evaluation.volume_froc import Calibration, write_calibration
from deeplesion.files import write_whole
from deeplesion.report.tables import INTERVALS, Number, Row, Table, to_text, write_tables

OVERLAP_NAMES = {"iobb": "IoBB", "iou": "IoU"}


def write_volume_evaluation(
    folder: Path,
    truth: Path,
    out: Path,
    split: str = "test",
    count_missing: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> str:
    """Evaluates the lesions found in a folder of scans and writes evaluation.json, tables and, if
    no scan is missing, calibration.json to `out`; returns what to print.

    Args:
        folder: what `tools/detect.py` wrote: a folder a scan with lesions.json.
        truth: file of all lesions' boxes, see `read_volume_boxes`.
        split: which part of the truth.
        count_missing: see `read_volume_detections`.
        resamples, seed: of the bootstrap.

    Raises:
        DataError: files that are not there or not as they should be; a split that the truth lacks.
    """
    splits = read_volume_boxes(truth)
    if not splits.get(split):
        raise DataError(
            f"{truth} has no volumes of the split '{split}'; its splits are"
            f" {', '.join(sorted(splits))}: choose with --split"
        )
    names, truths = list(splits[split]), list(splits[split].values())
    found = read_volume_detections(folder, names, count_missing)
    patients = [patient_of(name) for name in names]
    rows, curve = evaluate_volumes(found.boxes, truths, patients, resamples, seed)
    content = dict(
        split=split,
        scans=len(names),
        scans_without_lesions=sum(not len(boxes) for boxes in truths),
        lesions=curve.num_lesions,
        detections=len(curve.thresholds),
        patients=len(set(patients)),
        counted_without_detections=found.missing,
        algorithm=found.algorithm,
        settings=dict(resamples=resamples, seed=seed),
        froc=rows,
    )
    table = volume_table(content)
    write_whole(out / "evaluation.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    paths = write_tables([table], out)
    written = ["evaluation.json", *(path.name for path in paths)]
    lines = [to_text(table), ""]
    calibration = out / "calibration.json"
    if found.missing:
        # Nobody knows how many false positives they have: too few would be counted.
        calibration.unlink(missing_ok=True)
        lines.append(
            f"{len(found.missing):,} scans have no lesions.json: counted as empty. Hence there is"
            " no calibration.json: detect in all scans for one."
        )
    else:
        write_calibration(calibration, Calibration.of(curve, found.algorithm))
        written.append(calibration.name)
    if found.others:
        lines.append(f"{len(found.others):,} scans of the folder are not of this split: left out.")
    return "\n".join([*lines, f"{out}: {', '.join(written)}"])


def volume_table(content: dict) -> Table:
    """A row for each criterion of `evaluate_volumes`."""
    rows: Sequence[dict] = content["froc"]
    title = "Lesions in 3D: sensitivity (%) at false positives per scan"
    if any("interval" in row for row in rows):
        title += f"{INTERVALS}patients"
    missing = len(content["counted_without_detections"])
    note = f"PARTIAL DATA: {missing:,} scans without detections" if missing else ""
    table = Table("volumes", title, ("overlap", "scans", "lesions"), (*VOLUME_POINTS, "mean"), [])
    for row in rows:
        ends = row.get("interval", {})
        values = {**row["sensitivity"], "mean": row["average"]}
        ends = {**ends, "mean": ends.get("average", ())}
        overlap = f"3D {OVERLAP_NAMES[row['overlap']]} >= {row['threshold']:g}"
        numbers = tuple(Number(value, *ends.get(key, ())) for key, value in values.items())
        table.rows.append(Row((overlap, content["scans"], content["lesions"]), numbers, note=note))
    return table
