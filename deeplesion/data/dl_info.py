"""Lesion annotations: `DL_info.csv` as NIH distributes it -> one checked table, a
row a lesion."""

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from deeplesion.conventions import (
    DL_INFO_COLUMNS,
    LESION_TYPES,
    SPACING_MM,
    SPLITS,
    THICKNESS_MM,
)
from deeplesion.errors import DataError

_INDICES = ("Patient_index", "Study_index", "Series_ID", "Key_slice_index", "Slice_range")
_MAY_BE_MISSING = ("Patient_age", "Normalized_lesion_location")
# The file gives six digits, after which the two differ by less than 0.002 px; more than this is a
# row that was mixed up.
_DIAMETER_TOLERANCE_PX = 0.5
_MAX_LISTED = 20
_LARGEST = 1e9  # of px, HU and mm, far beyond any; the square of 1e200 is infinite


def read_dl_info(path: str | Path) -> pd.DataFrame:
    """Read and check `DL_info.csv`; one row a lesion, in file order, noisy rows included.

    Coordinates are 0-based pixel centres, (x, y): those of the file, which count from 1, minus 1.

    Columns:
        `lesion_idx`: int, the number of the row in the file, from 0, by which public label sets
            name a lesion;
        `file_name`: the key slice below `Images_png`, '000001_01_01/109.png';
        `patient`, `study`, `series`, `key_slice`: int;
        `bbox`: (4,) float64, x1, y1, x2, y2;
        `recist`: (4, 2) float64, the end points of the long, then of the short axis;
        `diameters_px`, `diameters_mm`: (2,) float64, long and short axis;
        `location`: (3,) float64, relative to the body, may be NaN;
        `lesion_type`: 1 bone, 2 abdomen, 3 mediastinum, 4 liver, 5 lung, 6 kidney, 7 soft tissue,
            8 pelvis, -1 unknown;
        `noisy`: bool;
        `slice_range`: (2,) int, first and last slice of the volume, inclusive;
        `spacing_mm`: in-plane;
        `thickness_mm`: distance between slices, NaN if missing or not positive;
        `height`, `width`: int, pixels;
        `display_window`: (2,) float64, HU;
        `gender`: str;
        `age`: years, may be NaN;
        `split`: 'train', 'val' or 'test';
        `clipped`: bool, the box reached outside the image.

    A box that reaches outside its image is clipped to it, with a warning; three official rows do.
    The RECIST end points are the radiologist's measurement and stay as they are.

    Raises FileNotFoundError, or ValueError with file, line, column and value of what is wrong: a
    missing column, a cell that is not the numbers it should be, File_name that is not made of the
    indices, a box that is not ordered or not in the image, diameters that are not above 0 or not
    those of the RECIST, a slice range without its key slice, a patient in two splits, a value out
    of its set, a spacing or thickness in other units than mm, a lesion twice, rows of one key slice
    that differ in its spacing, thickness or size, no lesion at all. Of noisy rows boxes and
    diameters may be anything, and they may contradict others.

    Warns of boxes that reach outside their image, which are clipped, and of rows of one key slice
    whose slice ranges differ: the first one counts for the slice.
    """
    path = Path(path)
    rows, lines, problems = _read_rows(path)
    if not rows and not problems:
        raise DataError(
            f"{path} holds no lesions, only the names of its columns. Download DL_info.csv again"
            " from NIH"
        )
    text = {name: [row[name] for row in rows] for name in DL_INFO_COLUMNS}
    number, bad_cells = {}, []
    for name, count in DL_INFO_COLUMNS.items():
        if count:
            number[name], bad = _parse_numbers(text[name], count, name)
            bad_cells += bad
    bad_cells += _inconsistencies(text, number) + _repetitions(text, number, lines)
    different = _contradictions(text, number, lines, {(i, name) for i, name, _ in bad_cells})
    bad_cells += [cell for cell in different if cell[1] != "Slice_range"]
    problems += [(lines[i], name, text[name][i], expected) for i, name, expected in bad_cells]
    if problems:
        raise DataError(_describe(path, problems))

    bbox, inside = _boxes(number)
    recist = number["Measurement_coordinates"].reshape(-1, 4, 2) - 1
    diameters, spacing = number["Lesion_diameters_Pixel_"], number["Spacing_mm_px_"]
    size, split = number["Image_size"], number["Train_Val_Test"][:, 0]
    clipped = (inside != bbox).any(1)
    if clipped.any():
        listed = ", ".join(text["File_name"][i] for i in np.flatnonzero(clipped)[:_MAX_LISTED])
        warnings.warn(
            f"{path}: {clipped.sum()} boxes reach outside their image and were clipped to it:"
            f" {listed}",
            stacklevel=2,
        )
    # Slices are there or not, whatever a row says; of a size or spacing only one can be right.
    ranges = [(i, text[name][i]) for i, name, _ in different if name == "Slice_range"]
    if ranges:
        listed = "; ".join(f"line {lines[i]}: {range_}" for i, range_ in ranges[:_MAX_LISTED])
        warnings.warn(
            f"{path}: {len(ranges)} rows have another Slice_range than an earlier row of the same"
            f" key slice, which counts: {listed}",
            stacklevel=2,
        )
    whole = {name: number[name].astype(int) for name in DL_INFO_COLUMNS if name in _INDICES}
    return pd.DataFrame(
        {
            "lesion_idx": range(len(rows)),
            "file_name": ["/".join(name.rsplit("_", 1)) for name in text["File_name"]],
            "patient": whole["Patient_index"][:, 0],
            "study": whole["Study_index"][:, 0],
            "series": whole["Series_ID"][:, 0],
            "key_slice": whole["Key_slice_index"][:, 0],
            "bbox": list(inside),
            "recist": list(recist),
            "diameters_px": list(diameters),
            "diameters_mm": list(diameters * spacing[:, :1]),
            "location": list(number["Normalized_lesion_location"]),
            "lesion_type": number["Coarse_lesion_type"][:, 0].astype(int),
            "noisy": number["Possibly_noisy"][:, 0] == 1,
            "slice_range": list(whole["Slice_range"]),
            "spacing_mm": spacing[:, 0],
            "thickness_mm": _thickness(spacing),
            "height": size[:, 0].astype(int),
            "width": size[:, 1].astype(int),
            "display_window": list(number["DICOM_windows"]),
            "gender": text["Patient_gender"],
            "age": number["Patient_age"][:, 0],
            "split": [SPLITS[int(value)] for value in split],
            "clipped": clipped,
        }
    )


def _read_rows(path: Path) -> tuple[list[dict], list[int], list[tuple]]:
    """Cells by column name, line numbers, and the lines with too few or too many cells."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in DL_INFO_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path} lacks the columns {missing}; expected DL_info.csv as NIH distributes"
                    f" it (comma-separated), found {reader.fieldnames}"
                )
            numbered = [(row, reader.line_num) for row in reader]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"annotation table not found: {path}. Expected DL_info.csv of DeepLesion there"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a comma-separated text file in UTF-8: {error}") from None
    rows, lines, problems = [], [], []
    for row, line in numbered:
        if None in row or None in row.values():
            cells = sum(cell is not None for cell in row.values()) - (None in row)
            cells += len(row.get(None, ()))
            problems.append((line, "all", f"{cells} cells", f"expected {len(reader.fieldnames)}"))
        else:
            rows.append(row)
            lines.append(line)
    return rows, lines, problems


def _boxes(number: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) boxes in 0-based pixel centres: as they are given, and clipped to their image."""
    bbox = number["Bounding_boxes"] - 1
    return bbox, np.clip(bbox, 0, np.tile(number["Image_size"][:, ::-1] - 1, 2))


def _parse_numbers(cells: list[str], count: int, name: str) -> tuple[np.ndarray, list[tuple]]:
    """Cells -> (N, count) float64, NaN where there is no number; (row, name, expected) if bad."""
    numbers = np.full((len(cells), count), np.nan)
    problems = []
    # Thickness, the last number of the spacing, is missing in some rows: empty, NaN, or not there.
    needed = {"Spacing_mm_px_": 2}.get(name, 0 if name in _MAY_BE_MISSING else count)
    for i, cell in enumerate(cells):
        try:
            values = [float(part) if part.strip() else math.nan for part in cell.split(",")]
        except ValueError:
            values = []
        right_count = needed <= len(values) <= count and values
        if right_count and all(abs(value) <= _LARGEST for value in values[:needed]):
            numbers[i, : len(values)] = values
        else:
            problems.append((i, name, f"expected {count} number{'s' if count > 1 else ''}"))
    return numbers, problems


def _inconsistencies(
    text: dict[str, list[str]], number: dict[str, np.ndarray]
) -> list[tuple[int, str, str]]:
    """Numbers out of their range or at odds with one another: (row, column, what was expected)."""
    problems = []

    # A cell that could not be parsed is NaN by now and compares False: nothing is said twice.
    def flag(bad: np.ndarray, name: str, expected: str) -> None:
        problems.extend((i, name, expected) for i in np.flatnonzero(bad))

    def flag_not_whole(name: str, low: int, high: int) -> None:
        value = number[name]
        bad = (value < low) | (value > high) | (value % 1 > 0)
        flag(bad.any(1), name, f"expected whole numbers from {low} to {high}")

    def flag_not_in(name: str, values: tuple[int, ...]) -> None:
        value = number[name][:, 0]
        flag(np.isfinite(value) & ~np.isin(value, values), name, f"expected one of {values}")

    for name in _INDICES:
        flag_not_whole(name, 0, 999_999)
    flag_not_whole("Image_size", 1, 65_535)
    flag_not_in("Coarse_lesion_type", tuple(sorted(LESION_TYPES)))
    flag_not_in("Possibly_noisy", (0, 1))
    flag_not_in("Train_Val_Test", tuple(SPLITS))

    index = np.hstack([number[name] for name in _INDICES[:4]])
    names = [None if np.isnan(row).any() else _official_name(*map(int, row)) for row in index]
    flag(
        [name not in (None, given) for name, given in zip(names, text["File_name"])],
        "File_name",
        "expected <patient>_<study>_<series>_<key slice>.png made of the indices in the row",
    )
    key_slice, slice_range = index[:, 3], number["Slice_range"]
    flag(
        (key_slice < slice_range[:, 0]) | (key_slice > slice_range[:, 1]),
        "Slice_range",
        "expected first, last with the key slice in between",
    )
    spacing = number["Spacing_mm_px_"]
    flag(
        (spacing[:, :2] <= 0).any(1) | (np.abs(spacing[:, 0] - spacing[:, 1]) > 1e-3),
        "Spacing_mm_px_",
        "expected two equal positive in-plane spacings, then the thickness (mm)",
    )

    low, high = SPACING_MM
    flag(
        (spacing[:, 0] > 0) & ((spacing[:, 0] < low) | (spacing[:, 0] > high)),
        "Spacing_mm_px_",
        f"expected in-plane spacings from {low:g} to {high:g} mm",
    )
    low, high = THICKNESS_MM
    thickness = np.where(np.isfinite(spacing[:, 2]), spacing[:, 2], np.nan)
    flag(
        (thickness > 0) & ((thickness < low) | (thickness > high)),
        "Spacing_mm_px_",
        f"expected a thickness, its last number, from {low:g} to {high:g} mm",
    )

    # A noisy measurement may be any nonsense, and nobody is to use it.
    used = number["Possibly_noisy"][:, 0] != 1
    bbox, inside = _boxes(number)
    disordered = (bbox[:, 0] >= bbox[:, 2]) | (bbox[:, 1] >= bbox[:, 3])
    flag(disordered & used, "Bounding_boxes", "expected x1 < x2 and y1 < y2")
    invisible = (inside[:, 0] >= inside[:, 2]) | (inside[:, 1] >= inside[:, 3])
    flag(invisible & ~disordered & used, "Bounding_boxes", "expected a box in the image")
    ends = number["Measurement_coordinates"].reshape(-1, 4, 2)
    measured = np.linalg.norm(ends[:, 1::2] - ends[:, ::2], axis=2)
    diameters = number["Lesion_diameters_Pixel_"]
    without = (diameters <= 0).any(1)
    flag(without & used, "Lesion_diameters_Pixel_", "expected two lengths above 0")
    off = np.abs(measured - diameters) > _DIAMETER_TOLERANCE_PX
    flag(
        off.any(1) & ~without & used,
        "Lesion_diameters_Pixel_",
        "expected the lengths of the two axes of Measurement_coordinates",
    )

    patient, split = index[:, 0], number["Train_Val_Test"][:, 0]
    known = np.isfinite(patient) & np.isin(split, tuple(SPLITS))
    first_split = dict(zip(patient[known][::-1], split[known][::-1]))
    flag(
        [ok and first_split[p] != s for ok, p, s in zip(known, patient, split)],
        "Train_Val_Test",
        "expected the split of the patient's earlier rows",
    )
    return problems


def _repetitions(
    text: dict[str, list[str]], number: dict[str, np.ndarray], lines: list[int]
) -> list[tuple[int, str, str]]:
    """Clean rows with the box of one that is there before: that lesion would be counted twice."""
    noisy = number["Possibly_noisy"][:, 0] == 1
    boxes = _boxes(number)[1].tolist()
    problems, first = [], {}
    for i, (name, box) in enumerate(zip(text["File_name"], boxes)):
        row = (name, *box)
        if not noisy[i] and first.setdefault(row, i) != i:
            expected = f"expected each lesion once, this is the one of line {lines[first[row]]}"
            problems.append((i, "File_name", expected))
    return problems


def _contradictions(
    text: dict[str, list[str]],
    number: dict[str, np.ndarray],
    lines: list[int],
    flagged: set[tuple[int, str]],
) -> list[tuple[int, str, str]]:
    """Clean rows that say something else of their key slice than the first clean row of it does.
    Cells that are `flagged` as (row, column) are not compared: what is wrong is said of them."""
    noisy = number["Possibly_noisy"][:, 0] == 1
    spacing = number["Spacing_mm_px_"]
    said = {name: number[name].tolist() for name in ("Slice_range", "Image_size")}
    unknown_as_0 = np.nan_to_num(_thickness(spacing))  # NaN is not even equal to itself
    said["Spacing_mm_px_"] = list(zip(spacing[:, 0], unknown_as_0))
    problems, first = [], {}
    for name, values in said.items():
        for i, file_name in enumerate(text["File_name"]):
            if noisy[i] or (i, name) in flagged:
                continue
            earlier = first.setdefault((name, file_name), i)
            if values[i] != values[earlier]:
                expected = f"expected that of line {lines[earlier]}, which is of the same key slice"
                problems.append((i, name, expected))
    return problems


def _thickness(spacing: np.ndarray) -> np.ndarray:
    """(N,) mm of (N, 3) spacings, NaN where it is missing or not positive."""
    thickness = spacing[:, 2]
    return np.where(np.isfinite(thickness) & (thickness > 0), thickness, np.nan)


def _official_name(patient: int, study: int, series: int, key_slice: int) -> str:
    return f"{patient:06d}_{study:02d}_{series:02d}_{key_slice:03d}.png"


def _describe(path: Path, problems: list[tuple]) -> str:
    problems = sorted(problems, key=lambda problem: problem[0])
    listed = "\n".join(
        f"  line {line}, {column} = {value!r}: {expected}"
        for line, column, value, expected in problems[:_MAX_LISTED]
    )
    more = len(problems) - _MAX_LISTED
    return (
        f"{path}: {len(problems)} bad values in {len({p[0] for p in problems})} lines\n{listed}"
        + (f"\n  and {more} more" if more > 0 else "")
        + "\nCorrect these lines, or download DL_info.csv again from NIH."
    )
