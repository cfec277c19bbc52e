"""From a result file to the numbers of a results section: FROC over all images, thin and thick
ones, by lesion type, by size, by any column; intervals; the paired difference of two runs; AP50."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from deeplesion.average_precision import ap50
from deeplesion.columns import column_groups
from deeplesion.files import write_whole
from deeplesion.froc import FROC, SCORE_FPS, TABLE_FPS, box_iou, froc
from deeplesion.result_check import check_records

THIN_MM = 2.0
LESION_TYPES = {
    1: "bone",
    2: "abdomen",
    3: "mediastinum",
    4: "liver",
    5: "lung",
    6: "kidney",
    7: "soft tissue",
    8: "pelvis",
    -1: "unknown",
}
SMALL_MM, LARGE_MM = 10, 30
LESION_SIZES = (f"< {SMALL_MM} mm", f"{SMALL_MM}-{LARGE_MM} mm", f"> {LARGE_MM} mm")

POINTS = tuple(f"{fps:g}" for fps in TABLE_FPS)
AVERAGED = [TABLE_FPS.index(fps) for fps in SCORE_FPS]
QUANTILES = (0.025, 0.975)  # the ends of a 95 % interval
MIN_RESAMPLES = 100  # fewer say nothing about a 2.5 % quantile

RESULT_FORMAT = "deeplesion-results-1"


@dataclass(frozen=True, eq=False)
class Run:
    """The detections of one model, and what counts as a hit.

    Attributes:
        name: what tables and figures call it.
        records: of a result file (`read_results`), one an image.
        iou_threshold, pixel_offset: see `deeplesion.froc.froc`.
    """

    name: str
    records: list[dict]
    iou_threshold: float = 0.5
    pixel_offset: int = 1

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
        """The patient of each image."""
        return np.array([r["patient"] for r in self.records])


def evaluate(run: Run, by: Sequence[str] = (), resamples: int = 1000, seed: int = 0) -> dict:
    """Everything about one run, with 95 % intervals by bootstrap over patients.

    Args:
        run: detections and ground truth.
        by: keys of the records, each one more breakdown (see `by_column`).
        resamples, seed: of the bootstrap.

    Returns:
        what JSON can hold: `name`; `settings`; `froc`, the rows of `froc_table` with intervals;
        `breakdowns`, title -> rows of the same kind; `ap50`, see there; `diameters`, see
        `deeplesion.diameters.diameter_errors`.

    Raises:
        ValueError: too few resamples, or a column that is not there (the nearest name is given).
    """
    from deeplesion.diameters import diameter_errors  # which builds on `match`

    check_resamples(resamples)
    breakdowns = {"lesion type": by_type(run), "lesion diameter": by_diameter(run)}
    breakdowns.update({column: by_column(run, column) for column in by})
    rule = dict(iou_threshold=run.iou_threshold, pixel_offset=run.pixel_offset)
    return dict(
        name=run.name,
        settings=dict(**rule, resamples=resamples, seed=seed),
        froc=table(run, by_thickness(run), resamples, seed),
        breakdowns={
            title: table(run, groups, resamples, seed) for title, groups in breakdowns.items()
        },
        ap50=ap50(run.records),
        diameters=diameter_errors(run.records, **rule, resamples=resamples, seed=seed),
    )


def check_resamples(resamples: int) -> None:
    """Raises ValueError where the number of resamples is too small for a 95 % interval."""
    if resamples < MIN_RESAMPLES:
        raise ValueError(
            f"resamples must be at least {MIN_RESAMPLES} for a 95 % interval (1000 is usual), got "
            f"{resamples}"
        )


def froc_table(
    records: Sequence[dict], iou_threshold: float = 0.5, pixel_offset: int = 1
) -> list[dict]:
    """FROC sensitivities over all images, thin (<= 2 mm) and thick (> 2 mm) ones: rows of `table`.

    Images of unknown thickness are in 'all' only.
    """
    run = Run("", list(records), iou_threshold, pixel_offset)
    return table(run, by_thickness(run))


def table(run: Run, groups: Mapping[str, FROC], resamples: int = 0, seed: int = 0) -> list[dict]:
    """The rows of a table, one a group that has lesions.

    Args:
        run: whose curve the groups' curves are parts of.
        groups: name -> curve.
        resamples, seed: of the bootstrap over patients; without resamples no intervals.

    Returns:
        rows with `group`, `images`, `lesions`, `sensitivity` {operating point: %}, `average` (% at
        0.5, 1, 2, 4), `difference` (the group's average minus the one over all) and, with
        resamples, `interval`: {operating point, 'average' or 'difference': [low, high]}, 95 %.
    """
    overall = run.curve.sensitivity_at(TABLE_FPS)
    if resamples:
        overall_drawn = run.curve.bootstrap(run.patients, TABLE_FPS, resamples, seed)
    rows = []
    for group, curve in groups.items():
        if curve.num_lesions == 0:
            continue
        row = dict(group=group, images=curve.num_images, lesions=curve.num_lesions)
        values = _measures(curve.sensitivity_at(TABLE_FPS), overall).tolist()
        row["sensitivity"] = dict(zip(POINTS, values))
        row["average"], row["difference"] = values[len(POINTS) :]
        if resamples:
            drawn = curve.bootstrap(run.patients, TABLE_FPS, resamples, seed)
            drawn = _with_lesions(_measures(drawn, overall_drawn))
            ends = np.quantile(drawn, QUANTILES, axis=0).T.tolist()
            row["interval"] = dict(zip((*POINTS, "average", "difference"), ends))
        rows.append(row)
    return rows


def by_thickness(run: Run) -> dict[str, FROC]:
    """The curves of all, thin (<= 2 mm) and thick (> 2 mm) slices, each of its own images."""
    thickness = np.array([r["thickness_mm"] for r in run.records], float)
    return {
        "all": run.curve,
        "thin": run.curve.of_images(thickness <= THIN_MM),
        "thick": run.curve.of_images(thickness > THIN_MM),
    }


def by_type(run: Run) -> dict[str, FROC]:
    """The curves of each type of lesion, over the false positives of all images."""
    types = np.array([x.get("lesion_type", -1) for r in run.records for x in r["lesions"]])
    return {name: run.curve.of_lesions(types == key) for key, name in LESION_TYPES.items()}


def by_diameter(run: Run) -> dict[str, FROC]:
    """The curves of three ranges of the long diameter, over the false positives of all images."""
    sizes = np.array([size_group(x) for r in run.records for x in r["lesions"]])
    return {name: run.curve.of_lesions(sizes == name) for name in (*LESION_SIZES, "unknown")}


def size_group(lesion: dict) -> str:
    """Which of LESION_SIZES a lesion is of by its long diameter; 'unknown' without one."""
    if not lesion.get("diameters_mm"):
        return "unknown"
    long_mm = lesion["diameters_mm"][0]
    return LESION_SIZES[int(long_mm >= SMALL_MM) + int(long_mm > LARGE_MM)]


def by_column(run: Run, column: str) -> dict[str, FROC]:
    """The curves of each group of images that a key of the records makes, each of its own images.

    See `deeplesion.columns.column_groups`.
    """
    groups = column_groups(run.records, column)
    return {name: run.curve.of_images(chosen) for name, chosen in groups.items()}


def compare(first: Run, second: Run, resamples: int = 1000, seed: int = 0) -> dict:
    """The paired difference of two runs on the same images, second minus first.

    The same patients are drawn for both, so that what makes a case easy or hard for both cancels.

    Returns:
        `first`, `second`: the names; `rows`, one for all, thin and thick slices: `group` and, under
        each operating point and 'average', [difference, low, high, p]: the difference in points of
        %, its 95 % interval and its two-sided p-value, which is twice the share of draws on the
        rarer side of zero (draws at zero count on both sides), at least 2 / (resamples + 1).

    Raises:
        ValueError: the two are not of the same images with the same lesions; names the images.
    """
    check_resamples(resamples)
    second = replace(second, records=in_order_of(first, second))
    rows = []
    for (group, a), b in zip(by_thickness(first).items(), by_thickness(second).values()):
        if a.num_lesions == 0:
            continue
        value = _measures(b.sensitivity_at(TABLE_FPS)) - _measures(a.sensitivity_at(TABLE_FPS))
        drawn_a, drawn_b = (
            _measures(c.bootstrap(first.patients, TABLE_FPS, resamples, seed)) for c in (a, b)
        )
        drawn = _with_lesions(drawn_b - drawn_a)
        rarer = np.minimum((drawn <= 0).sum(axis=0), (drawn >= 0).sum(axis=0))
        p = np.minimum(2 * (rarer + 1) / (len(drawn) + 1), 1)
        numbers = np.stack([value, *np.quantile(drawn, QUANTILES, axis=0), p], axis=1)
        rows.append(dict(group=group, **dict(zip((*POINTS, "average"), numbers.tolist()))))
    return dict(first=first.name, second=second.name, rows=rows)


def in_order_of(first: Run, second: Run) -> list[dict]:
    """The records of `second` in the order of those of `first`.

    Raises:
        ValueError: the two are not of the same images with the same lesions; names the images.
    """
    record_of = {r["file_name"]: r for r in second.records}
    for run in (first, second):
        names = [r["file_name"] for r in run.records]
        if len(set(names)) < len(names):
            repeated = [name for name, times in Counter(names).items() if times > 1]
            raise ValueError(f"{run.name} holds images more than once: {_listed(repeated)}")
    for one, other in ((first, second), (second, first)):
        names = {r["file_name"] for r in other.records}
        lacking = [r["file_name"] for r in one.records if r["file_name"] not in names]
        if lacking:
            raise ValueError(
                f"{first.name} and {second.name} cannot be compared, they are of different images: "
                f"{other.name} lacks {_listed(lacking)}. Test both on the same split, or evaluate "
                "them one at a time."
            )
    records = [record_of[r["file_name"]] for r in first.records]
    changed = [
        a["file_name"]
        for a, b in zip(first.records, records)
        if not np.array_equal(lesion_array(a), lesion_array(b))
    ]
    if changed:
        raise ValueError(
            f"{first.name} and {second.name} cannot be compared, their ground truth differs in "
            f"{_listed(changed)}. Test both with the same annotation file."
        )
    return records


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


def band(
    curve: FROC, patients: np.ndarray, fps: Sequence[float], resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """(2, len(fps)): the 95 % interval of the sensitivity at these false positives per image.

    It reaches from the 2.5 to the 97.5 % quantile of a bootstrap over patients.
    """
    drawn = _with_lesions(curve.bootstrap(patients, fps, resamples, seed))
    return np.quantile(drawn, QUANTILES, axis=0)


def detection_array(record: dict) -> np.ndarray:
    """(n, 5) x1, y1, x2, y2, score."""
    boxes = np.array(record["boxes"], float).reshape(-1, 4)
    return np.column_stack([boxes, np.array(record["scores"], float)])


def lesion_array(record: dict) -> np.ndarray:
    """(m, 4) x1, y1, x2, y2."""
    return np.array([x["bbox"] for x in record["lesions"]], float).reshape(-1, 4)


def _measures(sensitivity: np.ndarray, overall: np.ndarray | None = None) -> np.ndarray:
    """(..., points) sensitivities -> in %: the points, their average, and, given the sensitivities
    of the whole set, how much higher the average is than theirs."""
    average = sensitivity[..., AVERAGED].mean(axis=-1, keepdims=True)
    columns = [sensitivity, average]
    if overall is not None:
        columns.append(average - overall[..., AVERAGED].mean(axis=-1, keepdims=True))
    return 100 * np.concatenate(columns, axis=-1)


def _with_lesions(drawn: np.ndarray) -> np.ndarray:
    """The draws that hold a lesion; the others are rows of NaN."""
    return drawn[~np.isnan(drawn).any(axis=1)]


def _listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of several names and how many there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_results(path: Path, records: Sequence[dict]) -> None:
    """Writes a result file: JSON, gzipped when the name ends in .gz.

    `{"format": "deeplesion-results-1", "images": [record, ...]}`; a record has `file_name`,
    `patient`, `height`, `width`, `spacing_mm`, `thickness_mm` (null if unknown), `lesions` (each
    `bbox`, `recist`, `mask`, `diameters_mm`, `lesion_type`), `boxes` (n, 4), `scores` (n,) and, not
    in every file, `study`, `series`, `slice_range` and `masks` (n COCO run lengths). Boxes are x1,
    y1, x2, y2 of 0-based pixel centres in the image's own pixels.
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
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise ValueError(f"{path} is not a result file of tools/test.py: {error}") from None
    if not isinstance(content, dict) or content.get("format") != RESULT_FORMAT:
        raise ValueError(f"{path} is not a result file of tools/test.py (format {RESULT_FORMAT})")
    check_records(path, content.get("images"))
    for record in content["images"]:
        if record["thickness_mm"] is None:
            record["thickness_mm"] = math.nan
    return content["images"]


def default_names(paths: Sequence[Path]) -> list[str]:
    """What to call the runs of result files: by their folder, where all files are called alike."""
    stems = [path.name.split(".")[0] for path in paths]
    folders = [path.resolve().parent.name for path in paths]
    return folders if set(stems) == {"results"} else stems


def table_file(result_file: Path) -> Path:
    """Where the FROC table of a result file goes: results.json.gz -> results.froc.json."""
    return result_file.with_name(result_file.name.split(".")[0] + ".froc.json")


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """Writes the rows of `froc_table` as JSON."""
    write_whole(path, json.dumps({"froc": list(rows)}, indent=2) + "\n")
