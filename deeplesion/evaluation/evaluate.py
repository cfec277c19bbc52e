"""From a result file to the numbers of a results section: FROC over all images, thin and thick
ones, by lesion type, by size, by any column; intervals; paired differences; AP50."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from deeplesion.errors import UserError
from deeplesion.evaluation.average_precision import ap50
from deeplesion.evaluation.breakdowns import (
    by_column,
    by_diameter,
    by_thickness,
    by_type,
    is_lesion_column,
)
from deeplesion.evaluation.diameters import diameter_errors
from deeplesion.evaluation.froc import AVERAGE_FPS, FROC, TABLE_FPS
from deeplesion.evaluation.intervals import (
    MIN_PATIENTS,
    QUANTILES,
    check_resamples,
    with_lesions,
)
from deeplesion.evaluation.results import Result, lesion_array

POINTS = tuple(f"{fps:g}" for fps in TABLE_FPS)
# At what scores false positives are counted where there are no lesions, hence no operating points.
FALSE_POSITIVE_SCORES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9)
AVERAGED = [TABLE_FPS.index(fps) for fps in AVERAGE_FPS]
# The tables that are made of results, with the columns that say what a row is of; and what a file
# of all tables says of each number. No breakdown may be called so: two columns would have one name.
TABLES = {
    "slices": ("model", "slices", "images", "lesions"),
    "AP50": ("model",),
    "diameters": ("model", "axis", "lesions"),
    "published": ("model", "slices seen", "slices"),
}
NUMBER_COLUMNS = ("table", "measure", "value", "low", "high", "p", "source", "note")
TAKEN = {*TABLES, *NUMBER_COLUMNS, *(label for labels in TABLES.values() for label in labels)}


def evaluate(result: Result, by: Sequence[str] = (), resamples: int = 1000, seed: int = 0) -> dict:
    """Everything about one result, with 95 % intervals by bootstrap over patients.

    Args:
        result: detections and ground truth.
        by: keys of the records, each one more breakdown (see `by_column`).
        resamples, seed: of the bootstrap.

    Returns:
        what JSON can hold: `name`; `settings`; `key_slices` and `table_key_slices` (see `Result`);
        `froc`, the rows of `froc_table` with intervals; `breakdowns`, title -> rows of the same
        kind; `by_lesion`, the titles of those that are of groups of lesions; `ap50`, see there;
        `diameters`, see `deeplesion.evaluation.diameters.diameter_errors`.

    Raises:
        ValueError: too few resamples, a column that is not there (the nearest name is given), or
            one called as a table that is always made, or as a column of the tables.
    """
    check_resamples(resamples)
    breakdowns, by_lesion = {}, []
    if result.curve.num_lesions:
        breakdowns = {"lesion type": by_type(result), "lesion diameter": by_diameter(result)}
        by_lesion = [*breakdowns, *(column for column in by if is_lesion_column(result, column))]
    if taken := [column for column in by if column in breakdowns]:
        raise UserError(f"a table of {taken[0]!r} is always made: give the column another name")
    if taken := [column for column in by if column in TAKEN]:
        raise UserError(
            f"a table by {taken[0]!r} cannot be made, since the tables use that name themselves:"
            " give the column another name"
        )
    breakdowns.update({column: by_column(result, column) for column in by})
    rule = dict(iou_threshold=result.iou_threshold, pixel_offset=result.pixel_offset)
    return dict(
        name=result.name,
        settings=dict(**rule, resamples=resamples, seed=seed, resampled=resampled(result)),
        key_slices=len(result.records),
        table_key_slices=result.table_key_slices,
        froc=table(result, by_thickness(result), resamples, seed),
        breakdowns={
            title: table(result, groups, resamples, seed) for title, groups in breakdowns.items()
        },
        by_lesion=by_lesion,
        ap50=ap50(result.records),
        diameters=diameter_errors(result.records, **rule, resamples=resamples, seed=seed),
    )


def froc_table(
    records: Sequence[dict], iou_threshold: float = 0.5, pixel_offset: int = 1
) -> list[dict]:
    """FROC sensitivities over all images, thin (<= 2 mm) and thick (> 2 mm) ones: rows of `table`.

    Images of unknown thickness are in 'all' only.
    """
    result = Result("", list(records), iou_threshold, pixel_offset)
    return table(result, by_thickness(result))


def table(
    result: Result, groups: Mapping[str, FROC], resamples: int = 0, seed: int = 0
) -> list[dict]:
    """The rows of a table, one a group that has lesions; without any lesion one a group of images.

    Args:
        result: whose curve the groups' curves are parts of.
        groups: name -> curve.
        resamples, seed: of the bootstrap over patients; without resamples no intervals.

    Returns:
        rows with `group`, `images`, `lesions`, `sensitivity` {operating point: %}, `average` (% at
        0.5, 1, 2, 4), `difference` (the group's average minus the one over all) and, with
        resamples, `interval`: {operating point, 'average' or 'difference': [low, high]}, 95 %, of
        groups with lesions of more than one patient. Without any lesion there is no sensitivity
        (None) but `false_positives` {score: false positives per image of at least this score}.
    """
    if not result.curve.num_lesions:
        return [_without_lesions(name, c) for name, c in groups.items() if c.num_images]
    overall = result.curve.sensitivity_at(TABLE_FPS)
    if resamples:
        overall_drawn = result.curve.bootstrap(result.patients, TABLE_FPS, resamples, seed)
    rows = []
    for group, curve in groups.items():
        if curve.num_lesions == 0:
            continue
        row = dict(group=group, images=curve.num_images, lesions=curve.num_lesions)
        values = _percentages(curve.sensitivity_at(TABLE_FPS), overall).tolist()
        row["sensitivity"] = dict(zip(POINTS, values))
        row["average"], row["difference"] = values[len(POINTS) :]
        if resamples and _patients(result, curve) >= MIN_PATIENTS:
            drawn = curve.bootstrap(result.patients, TABLE_FPS, resamples, seed)
            drawn = with_lesions(_percentages(drawn, overall_drawn))
            ends = np.quantile(drawn, QUANTILES, axis=0).T.tolist()
            row["interval"] = dict(zip((*POINTS, "average", "difference"), ends))
        rows.append(row)
    return rows


def _without_lesions(group: str, curve: FROC) -> dict:
    false_positives = curve.fps_per_image_at(FALSE_POSITIVE_SCORES).tolist()
    return dict(
        group=group,
        images=curve.num_images,
        lesions=0,
        sensitivity=dict.fromkeys(POINTS),
        average=None,
        difference=None,
        false_positives={f"{s:g}": n for s, n in zip(FALSE_POSITIVE_SCORES, false_positives)},
    )


def _patients(result: Result, curve: FROC) -> int:
    """How many patients the lesions of a part of a result are of."""
    images = curve.lesion_images[curve.counted[curve.lesion_images]]
    return len(np.unique(result.patients[images]))


def resampled(result: Result) -> str:
    """What the bootstrap draws."""
    if not (unknown := result.unknown_patients):
        return "patients"
    if unknown == len(result.records):
        return "images, as patients are unknown"
    return f"patients, {unknown:,} images of unknown ones each as one"


def compare(first: Result, second: Result, resamples: int = 1000, seed: int = 0) -> dict:
    """The paired difference of two results on the same images, second minus first.

    The same patients are drawn for both, so that what makes a case easy or hard for both cancels.

    Returns:
        `first`, `second`: the names; `rows`, one for all, thin and thick slices: `group` and, under
        each operating point and 'average', [difference, low, high, p]: the difference in points of
        %, its 95 % interval and its two-sided p-value, which is twice the share of draws on the
        rarer side of zero (draws at zero count on both sides), at least 2 / (resamples + 1). The
        last three are None where the lesions are of one patient. `resampled`: what was drawn.

    Raises:
        ValueError: the two are not of the same images with the same lesions; names the images.
    """
    check_resamples(resamples)
    second = replace(second, records=in_order_of(first, second))
    rows = []
    for (group, a), b in zip(by_thickness(first).items(), by_thickness(second).values()):
        if a.num_lesions == 0:
            continue
        value = _percentages(b.sensitivity_at(TABLE_FPS)) - _percentages(
            a.sensitivity_at(TABLE_FPS)
        )
        if _patients(first, a) < MIN_PATIENTS:
            numbers = [[each, None, None, None] for each in value.tolist()]
            rows.append(dict(group=group, **dict(zip((*POINTS, "average"), numbers))))
            continue
        drawn_a, drawn_b = (
            _percentages(c.bootstrap(first.patients, TABLE_FPS, resamples, seed)) for c in (a, b)
        )
        drawn = with_lesions(drawn_b - drawn_a)
        rarer = np.minimum((drawn <= 0).sum(axis=0), (drawn >= 0).sum(axis=0))
        p = np.minimum(2 * (rarer + 1) / (len(drawn) + 1), 1)
        numbers = np.stack([value, *np.quantile(drawn, QUANTILES, axis=0), p], axis=1)
        rows.append(dict(group=group, **dict(zip((*POINTS, "average"), numbers.tolist()))))
    names = dict(first=first.name, second=second.name)
    return dict(**names, rows=rows, resampled=resampled(first))


def in_order_of(first: Result, second: Result) -> list[dict]:
    """The records of `second` in the order of those of `first`, with their patients and thickness:
    both are drawn and grouped alike, even where one annotation file did not know them.

    Raises:
        ValueError: the two are not of the same images with the same lesions; names the images.
    """
    record_of = {r["file_name"]: r for r in second.records}
    for result in (first, second):
        names = [r["file_name"] for r in result.records]
        if len(set(names)) < len(names):
            repeated = [name for name, times in Counter(names).items() if times > 1]
            raise UserError(f"{result.name} holds images more than once: {_listed(repeated)}")
    for one, other in ((first, second), (second, first)):
        names = {r["file_name"] for r in other.records}
        lacking = [r["file_name"] for r in one.records if r["file_name"] not in names]
        if lacking:
            raise UserError(
                f"{first.name} and {second.name} cannot be compared, they are of different images: "
                f"{other.name} lacks {_listed(lacking)}. Test both on the same split, or evaluate "
                "them one at a time."
            )
    of_image = ("patient", "thickness_mm")
    records = [
        {**record_of[r["file_name"]], **{key: r[key] for key in of_image}} for r in first.records
    ]
    changed = [
        a["file_name"]
        for a, b in zip(first.records, records)
        if not np.array_equal(lesion_array(a), lesion_array(b))
    ]
    if changed:
        raise UserError(
            f"{first.name} and {second.name} cannot be compared, their ground truth differs in "
            f"{_listed(changed)}. Test both with the same annotation file."
        )
    return records


def band(
    curve: FROC, patients: np.ndarray, fps: Sequence[float], resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """(2, len(fps)): the 95 % interval of the sensitivity at these false positives per image.

    It reaches from the 2.5 to the 97.5 % quantile of a bootstrap over patients; NaN of one patient.
    """
    if len(np.unique(patients)) < MIN_PATIENTS:
        return np.full((2, len(fps)), np.nan)
    drawn = with_lesions(curve.bootstrap(patients, fps, resamples, seed))
    return np.quantile(drawn, QUANTILES, axis=0)


def _percentages(sensitivity: np.ndarray, overall: np.ndarray | None = None) -> np.ndarray:
    """(..., points) sensitivities -> in %: the points, their average, and, given the sensitivities
    of the whole set, how much higher the average is than theirs."""
    average = sensitivity[..., AVERAGED].mean(axis=-1, keepdims=True)
    columns = [sensitivity, average]
    if overall is not None:
        columns.append(average - overall[..., AVERAGED].mean(axis=-1, keepdims=True))
    return 100 * np.concatenate(columns, axis=-1)


def _listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of several names and how many there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
