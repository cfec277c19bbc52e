"""A synthetic DeepLesion in the official on-disk format: tests and demos run on it, no data needed.

On a key slice lesions and distractors come from one distribution, so no single slice tells them
apart. The neighbours do: a lesion stays where it is and shrinks, a distractor (an oblique vessel or
bowel loop) keeps its section and moves on.
"""

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from deeplesion.conventions import DL_INFO_COLUMNS, RECIST_MARGIN
from deeplesion.data.coco import read_json
from deeplesion.data.slices import slice_name, write_png, write_slice
from deeplesion.errors import UserError
from deeplesion.files import write_whole
from deeplesion.phantom.body import (
    BODY_LENGTH,
    LESION_TYPE,
    LUNG,
    Body,
)
from deeplesion.phantom.courses import DISTRACTORS
from deeplesion.phantom.findings import Finding, Scan, draw_finding, mask_and_recist
from deeplesion.phantom.render import add_noise, draw_noise_level, draw_spacing, render_slice
from deeplesion.phantom.unlabelled import hide
from deeplesion.processes import in_processes


@dataclass(frozen=True)
class Series:
    """What is decided about a series before anything is drawn."""

    patient: int
    study: int
    split: int  # 1 train, 2 val, 3 test
    thickness: float  # mm
    size: int
    seed: int
    gender: str
    age: str
    distractors: str = "oblique"

    @property
    def name(self) -> str:
        return f"{self.patient:06d}_{self.study:02d}_01"


@dataclass
class KeySlice:
    """A key slice, its findings with mask and RECIST points, and the range of slices around it."""

    index: int
    findings: list[tuple[Finding, np.ndarray, np.ndarray]]
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class DrawnSeries:
    """What the slices of a series are rendered from, and the generator that their noise follows."""

    scan: Scan
    body: Body
    keys: list[KeySlice]
    noise_level: np.ndarray  # (size, size) standard deviation, HU
    rng: np.random.Generator


def plan_series(patients: int, size: int, seed: int, distractors: str = "oblique") -> list[Series]:
    """The series of all patients: splits by patient, thin and thick alternating within a split."""
    rng = np.random.default_rng([seed, 0])
    held_out = max(1, round(0.15 * patients))
    split_of = rng.permutation(np.repeat([1, 2, 3], [patients - 2 * held_out, held_out, held_out]))
    is_thick = rng.random(4) < 0.5
    series = []
    for patient, split in enumerate(split_of.tolist(), 1):
        gender = str(rng.choice(["M", "F"]))
        age = "NaN" if rng.random() < 0.03 else str(rng.integers(18, 88))
        # A patient alone in a split gets two series, so that it too has thin and thick slices.
        studies = 2 if np.sum(split_of == split) == 1 or rng.random() < 0.2 else 1
        for study in range(1, studies + 1):
            thin = 2.0 if rng.random() < 0.15 else 1.0
            thickness = 5.0 if is_thick[split] else thin
            is_thick[split] = not is_thick[split]
            series.append(
                Series(patient, study, split, thickness, size, seed, gender, age, distractors)
            )
    return series


def draw_findings(
    rng: np.random.Generator,
    body: Body,
    scan: Scan,
    z: float,
    placed: list[Finding],
    distractors: str = "oblique",
) -> list[tuple[Finding, np.ndarray, np.ndarray]]:
    """Two, four or six findings with mask and RECIST, half of them lesions; fewer if none fit."""
    hu, tissue = body.plane(z)
    wanted = 2 * int(rng.choice([1, 2, 3], p=(0.65, 0.25, 0.1)))
    found = []
    for _ in range(12 * wanted):
        finding = draw_finding(rng, scan, hu, tissue, z, distractors)
        others = placed + [other for other, _, _ in found]
        if finding is None or any(finding.may_meet(other) for other in others):
            continue
        mask, recist = mask_and_recist(finding)
        long, short = np.linalg.norm(recist[1::2] - recist[::2], axis=1)
        # Of a crescent the longest perpendicular may miss the long axis: no reader draws that.
        if long >= 5 and short >= 2.5 and axes_cross(recist):
            found.append((finding, mask, recist))
        if len(found) == wanted:
            break
    found = found[: len(found) // 2 * 2]
    # Only now is it decided which are lesions: nothing drawn so far can depend on it.
    for (finding, _, _), is_lesion in zip(found, rng.permutation(len(found)) % 2, strict=True):
        finding.is_lesion = bool(is_lesion)
    return found


def _draw_key_slices(
    rng: np.random.Generator, body: Body, scan: Scan, distractors: str = "oblique"
) -> list[KeySlice]:
    """One to three key slices, so far apart that no object of one reaches another."""
    wanted = int(rng.choice([1, 2, 3], p=(0.6, 0.3, 0.1)))
    keys: list[KeySlice] = []
    z = rng.uniform(40, BODY_LENGTH - 80)
    while len(keys) < wanted and z < BODY_LENGTH - 30:
        index = round(z / scan.thickness)
        placed = [finding for key in keys for finding, _, _ in key.findings]
        findings = draw_findings(rng, body, scan, index * scan.thickness, placed, distractors)
        if findings:
            keys.append(KeySlice(index, findings))
            z += rng.uniform(28, 40) if rng.random() < 0.6 else rng.uniform(75, 110)
        else:
            z += rng.uniform(3, 10)
    if not keys:
        return _draw_key_slices(rng, body, scan, distractors)
    _choose_ranges(rng, keys, math.ceil((30 if scan.size >= 384 else 15) / scan.thickness))
    return keys


def _choose_ranges(rng: np.random.Generator, keys: list[KeySlice], reach: int) -> None:
    """`reach` slices on each side, fewer where the scan ends; ranges that touch become one."""
    ranges: list[list[int]] = []
    for key in keys:
        sides = [reach, reach]
        if rng.random() < 0.12:  # the scan ends close to the key slice
            sides[rng.integers(2)] = int(rng.integers(3))
        first, last = max(key.index - sides[0], 1), key.index + sides[1]
        if ranges and first <= ranges[-1][1] + 1:
            ranges[-1][1] = last
        else:
            ranges.append([first, last])
    for key in keys:
        key.first, key.last = next(r for r in ranges if r[0] <= key.index <= r[1])


def draw_series(series: Series) -> DrawnSeries:
    """Body, findings and noise level of a series; the same series gives the same ones."""
    # A patient's studies share the anatomy, so the body has a generator of its own.
    body_rng = np.random.default_rng([series.seed, series.patient, 0])
    rng = np.random.default_rng([series.seed, series.patient, series.study])
    spacing = draw_spacing(body_rng, series.size)
    body = Body(body_rng, series.size, spacing)
    scan = Scan(series.size, spacing, series.thickness)
    keys = _draw_key_slices(rng, body, scan, series.distractors)
    return DrawnSeries(scan, body, keys, draw_noise_level(rng, body, series.thickness), rng)


def make_series(root: Path, series: Series) -> dict:
    """Write slices and truth masks of a series, unless `once` knows of them; return {"rows": of the
    CSV, "truth": by key slice}."""
    record_file = root / "phantom_truth" / "series" / f"{series.name}.json"
    return once(record_file, lambda: _make_series(root, series))


def once(record_file: Path, make: Callable[[], dict]) -> dict:
    """What `make` returns. It is also left on disk, by which a later call knows that there is
    nothing to do."""
    if record_file.exists():
        return json.loads(record_file.read_text())
    record = make()
    write_whole(record_file, json.dumps(record))
    return record


def _make_series(root: Path, series: Series) -> dict:
    drawn = draw_series(series)
    body, keys, rng = drawn.body, drawn.keys, drawn.rng
    findings = [finding for key in keys for finding, _, _ in key.findings]
    for index in sorted({i for key in keys for i in range(key.first, key.last + 1)}):
        hu, _ = render_slice(body, index * series.thickness, series.thickness, findings)
        hu = add_noise(rng, hu, drawn.noise_level)
        write_slice(root / "Images_png" / slice_name(series.name, index), hu)
    record: dict = {"rows": [], "truth": {}}
    for key in keys:
        rows, truth, labels = _describe(rng, series, body, key)
        write_png(root / "phantom_truth" / "masks" / f"{series.name}_{key.index:03d}.png", labels)
        record["rows"] += rows
        record["truth"][f"{series.name}/{key.index:03d}.png"] = truth
    return record


def _describe(rng: np.random.Generator, series: Series, body: Body, key: KeySlice):
    """CSV rows of a key slice's lesions, the truth on all its findings, and their label image."""
    rows: list[list] = []
    truth: dict[str, list] = {"lesions": [], "distractors": []}
    labels = np.zeros((series.size, series.size), np.uint8)
    lung = any(finding.tissue == LUNG for finding, _, _ in key.findings if finding.is_lesion)
    for finding, mask, recist in key.findings:
        group = truth["lesions" if finding.is_lesion else "distractors"]
        labels[mask] = len(group) + (1 if finding.is_lesion else 101)
        group.append(
            {
                "shape": finding.outline.shape,
                "irregularity": finding.outline.irregularity,
                "diameters_mm": (_lengths(recist) * body.spacing).tolist(),
                "bbox": [*(recist.min(0) - RECIST_MARGIN), *(recist.max(0) + RECIST_MARGIN)],
                "speed_px_per_mm": float(np.hypot(*finding.velocity)),
            }
        )
        if series.distractors != "oblique":
            group[-1] |= {"course": finding.course.name, "ends_mm": list(finding.course.ends)}
        if not finding.is_lesion:
            continue
        noisy = rng.random() < 0.01
        points = _read_off(rng, recist, 8.0 if noisy else 0.7)
        points = np.clip(points, 0, series.size - 1) + 1  # DL_info.csv counts from 1
        place = ((finding.centre - body.centre) / (body.half_width, body.half_height) + 1) / 2
        rows.append(
            [
                f"{series.name}_{key.index:03d}.png",
                *(series.patient, series.study, 1, key.index),
                _numbers(points),
                _numbers([*(points.min(0) - RECIST_MARGIN), *(points.max(0) + RECIST_MARGIN)]),
                _numbers(_lengths(points)),
                _numbers([*place, finding.z / BODY_LENGTH]),
                -1 if series.split == 1 else LESION_TYPE.get(finding.tissue, finding.tissue),
                int(noisy),
                f"{key.first}, {key.last}",
                _numbers([body.spacing, body.spacing, series.thickness]),
                f"{series.size}, {series.size}",
                "-1500, 500" if lung else "-175, 275",
                *(series.gender, series.age, series.split),
            ]
        )
    return rows, truth, labels


def _read_off(rng: np.random.Generator, recist: np.ndarray, error: float) -> np.ndarray:
    """The points as a reader clicks them, each up to `error` px off; the axes still cross."""
    while True:
        angle = rng.uniform(0, 2 * np.pi, 4)
        shift = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        points = recist + rng.uniform(0, error, 4)[:, None] * shift
        if axes_cross(points):
            return points


def axes_cross(recist: np.ndarray) -> bool:
    """Whether the two axes of a (4, 2) measurement meet."""
    a, b, c, d = recist
    return _side(a, b, c) * _side(a, b, d) <= 0 and _side(c, d, a) * _side(c, d, b) <= 0


def _side(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> float:
    """Positive where p lies on one side of the line from a to b, negative on the other."""
    return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])


def _lengths(recist: np.ndarray) -> np.ndarray:
    return np.linalg.norm(recist[1::2] - recist[::2], axis=1)


def _numbers(values) -> str:
    return ", ".join(f"{value:.6g}" for value in np.ravel(values))


def claim(root: Path, note: Path, arguments: dict) -> None:
    """Make `root` the folder of the phantom that `note`, a file in it, tells of, or refuse it."""
    if note.exists():
        there = read_json(note, "what make_phantom noted of a phantom")
        if there != arguments:
            raise FileExistsError(
                f"{root} holds a phantom made with {there}, not {arguments}: "
                "repeat its arguments to continue it, or give another folder"
            )
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} is not empty and holds no phantom: give a new or empty folder"
        )
    else:
        write_whole(note, json.dumps(arguments).encode())


def check_options(*options: tuple[str, int, int, int]) -> None:
    """Raises UserError for one of (name, value, lowest, highest) that is out of its range."""
    for option, value, low, high in options:
        if not low <= value <= high:
            raise UserError(f"{option} is {value}: give a whole number from {low} to {high}")


def make_phantom(
    root: str | Path,
    patients: int,
    size: int = 512,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
    distractors: str = "oblique",
    unlabelled: float = 0.0,
) -> Path:
    """Write a synthetic DeepLesion of `patients` patients, slices of `size` px a side, to `root`.

    `distractors`: 'oblique', all of which move on at once, or 'varied', see `courses`.
    `unlabelled`: the share of the training split's lesions that are not in the table, see `hide`;
    images and masks stay as they are without it.

    Writes Images_png/, phantom_truth/ (masks and shapes of lesions and distractors) and, last,
    DL_info.csv; returns the path of that. The same patients, size and seed give the same bytes
    whatever the number of workers. After an interruption the same call continues the work.

    Raises ValueError for options out of range, FileExistsError if `root` holds anything else.
    """
    check_options(
        ("patients", patients, 3, 999_999),
        ("size", size, 128, 1024),
        ("seed", seed, 0, 2**32 - 1),
        ("workers", workers, 1, 1024),
    )
    if distractors not in DISTRACTORS:
        raise UserError(f"distractors is {distractors!r}: give one of {', '.join(DISTRACTORS)}")
    if not 0 <= unlabelled < 1:
        raise UserError(f"unlabelled is {unlabelled}: give a share from 0 to less than 1")
    root = Path(root)
    arguments = {"phantom_version": 2, "patients": patients, "size": size, "seed": seed}
    if distractors != "oblique":  # phantoms made before there was a choice have no such entry
        arguments["distractors"] = distractors
    if unlabelled:
        arguments["unlabelled"] = unlabelled
    claim(root, root / "phantom_truth" / "arguments.json", arguments)
    table = root / "DL_info.csv"
    if not table.exists():
        series = plan_series(patients, size, seed, distractors)
        bar = partial(tqdm, total=len(series), desc="series", disable=not progress)
        with closing(in_processes(partial(make_series, root), series, workers)) as made:
            records = list(bar(made))
        if unlabelled:
            records = hide(records, unlabelled, seed)
        truth = {name: entry for record in records for name, entry in record["truth"].items()}
        write_whole(root / "phantom_truth" / "truth.json", json.dumps(truth, indent=1).encode())
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(DL_INFO_COLUMNS)
        writer.writerows(row for record in records for row in record["rows"])
        write_whole(table, text.getvalue().encode())
    shutil.rmtree(root / "phantom_truth" / "series", ignore_errors=True)
    return table
