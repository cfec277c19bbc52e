"""Parts of a result: by slice thickness, lesion type and size, and by any column of its records or
of a user's CSV file."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from deeplesion.conventions import LESION_TYPES, THIN_MM
from deeplesion.evaluation.froc import FROC
from deeplesion.evaluation.results import Result

MAX_NUMBERS = 8  # more distinct numbers than these are cut at their quartiles
MAX_TEXTS = 50
UNKNOWN = "unknown"
FILE_NAME_COLUMNS = ("file_name", "File_name")


def column_groups(records: Sequence[dict], column: str) -> dict[str, np.ndarray]:
    """The groups of images by what their records say under `column`: name -> (images,) bool.

    A text is a group of its own, and so is a number where the column has at most 8 different ones;
    more are cut into four ranges at their quartiles. Empty, NaN or missing is 'unknown', the last.

    Raises:
        ValueError: no record has the column (the nearest name is given), it does not hold texts or
            numbers, or has more than 50 different texts.
    """
    if not any(column in r for r in records):
        raise unknown_column(column, _groupable(records))
    values = [_number_or_text(r.get(column), column) for r in records]
    known = {v for v in values if v is not None}
    if all(isinstance(v, float) for v in known):
        label = _ranges(values) if len(known) > MAX_NUMBERS else _name
        names = list(dict.fromkeys(label(v) for v in sorted(known)))
    elif len(known) > MAX_TEXTS:
        raise ValueError(
            f"column {column!r} has {len(known)} different values; at most {MAX_TEXTS} make a table"
        )
    else:
        label = _name
        names = sorted(map(_name, known))
    labels = np.array([UNKNOWN if v is None else label(v) for v in values])
    return {name: labels == name for name in dict.fromkeys([*names, UNKNOWN])}


def add_columns(records: Sequence[dict], path: Path, columns: Sequence[str]) -> list[dict]:
    """Records with columns of a CSV file that has a row (or several that agree) an image.

    The file names its images in a column `file_name` or `File_name`, as '000001_01_01/109.png' or
    as DeepLesion's DL_info.csv does, '000001_01_01_109.png'. Columns that the records have already
    are left as they are.

    Raises:
        FileNotFoundError, or ValueError: no such column (the nearest name is given), rows of one
            image that differ, or none of the images.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a comma-separated text file in UTF-8: {error}") from None
    header = list(rows[0]) if rows else []
    key = next((name for name in FILE_NAME_COLUMNS if name in header), None)
    if key is None:
        raise ValueError(
            f"{path} has no column file_name or File_name to know the images by; its columns: "
            f"{', '.join(map(str, header))}"
        )
    own = {name for r in records for name in r}
    wanted = [name for name in columns if name not in own]
    for name in wanted:
        if name not in header:
            raise unknown_column(name, {*filter(None, header), *_groupable(records)})

    cells: dict[str, tuple] = {}
    for row in rows:
        image = (row[key] or "").replace("/", "_")
        found = tuple(row[name] for name in wanted)
        if cells.setdefault(image, found) != found:
            name = next(n for n, a, b in zip(wanted, cells[image], found) if a != b)
            raise ValueError(
                f"{path}: the rows of {row[key]} differ in {name!r}; a column to group images by "
                "has one value an image"
            )
    images = [r["file_name"].replace("/", "_") for r in records]
    if not any(image in cells for image in images):
        raise ValueError(
            f"{path} has none of the images of the result, such as {records[0]['file_name']}"
        )
    nothing = (None,) * len(wanted)
    return [{**r, **dict(zip(wanted, cells.get(i, nothing)))} for r, i in zip(records, images)]


def unknown_column(column: str, names: set[str]) -> ValueError:
    """The error for a column that is not there."""
    near = difflib.get_close_matches(column.lower(), {n.lower(): n for n in names}, n=1, cutoff=0.4)
    nearest = next((n for n in sorted(names) if near and n.lower() == near[0]), None)
    hint = f"; did you mean {nearest!r}?" if nearest else "."
    return ValueError(f"no column {column!r}{hint} There are {', '.join(sorted(names))}.")


def _groupable(records: Sequence[dict]) -> set[str]:
    """The keys that hold a text or a number."""
    return {k for r in records for k, v in r.items() if isinstance(v, str | int | float)}


def _number_or_text(value: object, column: str) -> float | str | None:
    if value is None or value == "":
        return None
    if isinstance(value, list | tuple | dict):
        raise ValueError(f"column {column!r} holds {type(value).__name__}s: not a column of values")
    try:
        number = float(value)
    except ValueError:
        return str(value)
    return None if math.isnan(number) else number


def _name(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else value


def _ranges(values: Sequence[float | None]) -> Callable[[float], str]:
    """What to call the range that a number is in: four, parted by the quartiles of all."""
    known = [v for v in values if v is not None]
    edges = np.unique(np.quantile(known, (0.25, 0.5, 0.75), method="nearest"))
    between = [f"> {low:g} to {high:g}" for low, high in pairwise(edges)]
    names = [f"<= {edges[0]:g}", *between, f"> {edges[-1]:g}"]
    return lambda value: names[np.searchsorted(edges, value)]


SMALL_MM, LARGE_MM = 10, 30

LESION_SIZES = (f"< {SMALL_MM} mm", f"{SMALL_MM}-{LARGE_MM} mm", f"> {LARGE_MM} mm")


def by_thickness(result: Result) -> dict[str, FROC]:
    """The curves of all, thin (<= 2 mm) and thick (> 2 mm) slices, each of its own images."""
    thickness = np.array([r["thickness_mm"] for r in result.records], float)
    return {
        "all": result.curve,
        "thin": result.curve.of_images(thickness <= THIN_MM),
        "thick": result.curve.of_images(thickness > THIN_MM),
    }


def by_type(result: Result) -> dict[str, FROC]:
    """The curves of each type of lesion, over the false positives of all images."""
    types = np.array([x.get("lesion_type", -1) for r in result.records for x in r["lesions"]])
    return {name: result.curve.of_lesions(types == key) for key, name in LESION_TYPES.items()}


def by_diameter(result: Result) -> dict[str, FROC]:
    """The curves of three ranges of the long diameter, over the false positives of all images."""
    sizes = np.array([size_group(x) for r in result.records for x in r["lesions"]])
    return {name: result.curve.of_lesions(sizes == name) for name in (*LESION_SIZES, "unknown")}


def size_group(lesion: dict) -> str:
    """Which of LESION_SIZES a lesion is of by its long diameter; 'unknown' without one."""
    if not lesion.get("diameters_mm"):
        return "unknown"
    long_mm = lesion["diameters_mm"][0]
    return LESION_SIZES[int(long_mm >= SMALL_MM) + int(long_mm > LARGE_MM)]


def by_column(result: Result, column: str) -> dict[str, FROC]:
    """The curves of each group of images that a key of the records makes, each of its own images.

    See `column_groups`.
    """
    groups = column_groups(result.records, column)
    return {name: result.curve.of_images(chosen) for name, chosen in groups.items()}
