"""Result files: the detections of one model beside the ground truth, written, read and checked."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from deeplesion.errors import DataError
from deeplesion.evaluation.froc import FROC, froc
from deeplesion.evaluation.result_check import check_result_records
from deeplesion.files import parse_json, write_whole

RESULT_FORMAT = "deeplesion-results-1"
MODEL = ("config", "checkpoint", "checkpoint_sha256")  # what is said of the one that was tested
DEFAULT_STEM = re.compile(r"results(_tta\w*)?")  # of files that tools/test.py names


@dataclass(frozen=True, eq=False)
class Result:
    """The detections of one model, and what counts as a hit.

    Attributes:
        name: what tables and figures call it.
        records: one an image, see `write_results`.
        iou_threshold, pixel_offset: see `deeplesion.evaluation.froc.froc`.
        table_key_slices: how many key slices the table of lesions has of this split, more than the
            records where a part of the data was missing; None if that is not known.
        views: of test-time augmentation, by which the detections were found too; () without it.
        model: what was tested: `config`, its name, `checkpoint`, the name of the file, and
            `checkpoint_sha256`; None if that is not known, as of files of old.
    """

    name: str
    records: list[dict]
    iou_threshold: float = 0.5
    pixel_offset: int = 1
    table_key_slices: int | None = None
    views: tuple[str, ...] = ()
    model: Mapping[str, str] | None = None

    @cached_property
    def curve(self) -> FROC:
        """FROC of all images."""
        return froc(
            [detection_array(r) for r in self.records],
            [lesion_array(r) for r in self.records],
            self.iou_threshold,
            self.pixel_offset,
        )

    @cached_property
    def patients(self) -> np.ndarray:
        """The patient of each image; one that is unknown counts as a patient of its own."""
        return np.array(patients_of(self.records))

    @property
    def unknown_patients(self) -> int:
        """How many images are of an unknown patient."""
        return sum(r["patient"] is None for r in self.records)


def patients_of(records: Sequence[dict]) -> list:
    """The patient of each image; where any is unknown such an image has a patient of its own."""
    patients = [r["patient"] for r in records]
    if None not in patients:
        return patients
    return [f"image {i}" if p is None else f"patient {p}" for i, p in enumerate(patients)]


def detection_array(record: dict) -> np.ndarray:
    """(n, 5) x1, y1, x2, y2, score."""
    boxes = np.array(record["boxes"], float).reshape(-1, 4)
    return np.column_stack([boxes, np.array(record["scores"], float)])


def lesion_array(record: dict) -> np.ndarray:
    """(m, 4) x1, y1, x2, y2."""
    return np.array([x["bbox"] for x in record["lesions"]], float).reshape(-1, 4)


def write_results(
    path: Path,
    records: Sequence[dict],
    table_key_slices: int | None = None,
    views: Sequence[str] = (),
    model: Mapping[str, str] | None = None,
) -> None:
    """Writes a result file: JSON, gzipped when the name ends in .gz.

    `{"format": "deeplesion-results-1", "table_key_slices": ..., "images": [record, ...]}`; a record
    has `file_name`, `patient`, `height`, `width`, `spacing_mm`, `thickness_mm` (the last two and
    `patient` null if unknown), `lesions` (each `bbox`, `recist`, `mask`, `diameters_mm`,
    `lesion_type`, `lesion_idx`), `boxes` (n, 4), `scores` (n,) and, not in every file, `study`,
    `series`, `slice_range` and `masks` (n COCO run lengths). Boxes are x1, y1, x2, y2 of 0-based
    pixel centres in the image's own pixels. `table_key_slices` and `model` (see `Result`) and
    `lesion_idx` are not in files of old. Made with test-time augmentation, it has its `views` too.
    """
    images = [
        {**r, "thickness_mm": r["thickness_mm"] if math.isfinite(r["thickness_mm"]) else None}
        for r in records
    ]
    content = dict(format=RESULT_FORMAT, table_key_slices=table_key_slices)
    content |= _made_by(views, model)
    content["images"] = images
    text = json.dumps(content, separators=(",", ":"))
    write_whole(path, gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text)


def read_results(
    path: Path, name: str = "", iou_threshold: float = 0.5, pixel_offset: int = 1
) -> Result:
    """Reads what `write_results` wrote. Raises ValueError, naming the file, for anything else.

    The name of a result that was made with test-time augmentation says so, wherever it is shown.
    """
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        content = parse_json(data)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise DataError(f"{path} is not a result file of tools/test.py: {error}") from None
    if not isinstance(content, dict) or content.get("format") != RESULT_FORMAT:
        raise DataError(f"{path} is not a result file of tools/test.py (format {RESULT_FORMAT})")
    check_result_records(path, content.get("images"))
    for record in content["images"]:
        if record["thickness_mm"] is None:
            record["thickness_mm"] = math.nan
    expected = content.get("table_key_slices")
    if not (expected is None or (isinstance(expected, int) and expected > 0)):
        raise DataError(f"{path}: table_key_slices must be a number of key slices or null")
    views = content.get("views", [])
    if not isinstance(views, list) or not all(isinstance(view, str) for view in views):
        raise DataError(f"{path}: views must be a list of names")
    model = content.get("model")
    if not (model is None or _is_model(model)):
        raise DataError(f"{path}: model must be null, or the texts {', '.join(MODEL)}")
    name = f"{name} {made_with(views)}".strip() if views else name
    rule = (iou_threshold, pixel_offset)
    return Result(name, content["images"], *rule, expected, tuple(views), model)


def _is_model(model: object) -> bool:
    return isinstance(model, dict) and all(isinstance(model.get(key), str) for key in MODEL)


def _made_by(views: Sequence[str], model: Mapping[str, str] | None) -> dict:
    """What a result and its table say of how they were made, as far as it is known."""
    said = dict(model=model and dict(model), views=list(views))
    return {key: value for key, value in said.items() if value}


def made_with(views: Sequence[str]) -> str:
    """What tables say of a result that was made with test-time augmentation."""
    return f"(TTA: {', '.join(views)})"


def default_names(paths: Sequence[Path]) -> list[str]:
    """What to call results: by the folder of their files, where all files are called alike or as
    tools/test.py calls them."""
    stems = [path.name.split(".")[0] for path in paths]
    folders = [path.resolve().parent.name for path in paths]
    alike = len({*stems}) == 1 and (len(stems) > 1 or DEFAULT_STEM.fullmatch(stems[0]))
    return folders if alike else stems


def table_file(result_file: Path) -> Path:
    """Where the FROC table of a result file goes: results.json.gz -> results.froc.json."""
    return result_file.with_name(result_file.name.split(".")[0] + ".froc.json")


def write_table(path: Path, rows: Sequence[dict], result: Result) -> None:
    """Writes the rows of `froc_table` as JSON, with the numbers of key slices."""
    content = dict(
        key_slices=len(result.records), table_key_slices=result.table_key_slices, froc=list(rows)
    )
    content |= _made_by(result.views, result.model)
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def other_weights(result_file: Path, model: Mapping[str, str]) -> str:
    """The checkpoint that the result at a path is of, by the table beside it; '' if there is none,
    if it does not say so, or if its weights are those of `model`."""
    try:
        before = parse_json(table_file(result_file).read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    if not _is_model(before) or before["checkpoint_sha256"] == model["checkpoint_sha256"]:
        return ""
    return before["checkpoint"]
