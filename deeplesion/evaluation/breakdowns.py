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
from deeplesion.errors import UserError
from deeplesion.evaluation.froc import FROC
from deeplesion.evaluation.results import Result

MAX_NUMBERS = 8  # more distinct numbers than these are cut at their quartiles
MAX_TEXTS = 200  # DeepLesion's lesions have 171 text-mined labels
UNKNOWN = "unknown"
FILE_NAME_COLUMNS = ("file_name", "File_name")
LESION_COLUMN = "lesion_idx"
KEY_COLUMNS = (*FILE_NAME_COLUMNS, LESION_COLUMN)  # they say the same in a file as in a result


def column_groups(entries: Sequence[dict], column: str) -> dict[str, np.ndarray]:
    """The groups of images or lesions by a column of theirs: name -> (entries,) bool.

    A text is a group of its own, and so is a number where the column has at most 8 different ones;
    more are cut into four ranges at their quartiles. Empty, NaN or missing is 'unknown', the last.
    An entry that has several values, a tuple, is in the group of each.

    Raises:
        ValueError: the column does not hold texts or numbers, or has more than 200 different texts.
    """
    several = [value if isinstance(value := e.get(column), tuple) else [value] for e in entries]
    several = [[_number_or_text(value, column) for value in each] for each in several]
    values = [value for each in several for value in each]
    known = {v for v in values if v is not None}
    if all(isinstance(v, float) for v in known):
        label = _ranges(values) if len(known) > MAX_NUMBERS else _name
        names = list(dict.fromkeys(label(v) for v in sorted(known)))
    elif len(known) > MAX_TEXTS:
        raise UserError(
            f"column {column!r} has {len(known)} different values; at most {MAX_TEXTS} make a table"
        )
    else:
        label = _name
        names = sorted(map(_name, known))
    labels = [{UNKNOWN if v is None else label(v) for v in each} for each in several]
    return {
        name: np.array([name in each for each in labels], bool)
        for name in dict.fromkeys([*names, UNKNOWN])
    }


def add_columns(records: Sequence[dict], path: Path, columns: Sequence[str]) -> list[dict]:
    """Records with columns of a CSV file, which has rows of lesions or rows of images.

    Rows of lesions: a column `lesion_idx` holds the number of the lesion's row in DL_info.csv, from
    0. A lesion with several rows, such as one for each of its labels, has all their values.

    Rows of images: a column `file_name` or `File_name` names them, as '000001_01_01/109.png' or as
    DL_info.csv does, '000001_01_01_109.png'. Rows of one image must agree.

    Columns that the records or their lesions have already are left as they are.

    Raises:
        FileNotFoundError, or ValueError: no such column (the nearest name is given), a column that
            the result has as well, none that it lacks, rows of one image that differ, or none of
            the lesions or images.
    """
    header, rows = _read_table(path)
    lesions = [lesion for record in records for lesion in record["lesions"]]
    own = {name for entry in [*records, *lesions] for name in entry}
    for name in columns:
        if name in own and name in header and name not in KEY_COLUMNS:
            raise UserError(
                f"column {name!r} is in {path} and in the result as well: give the file's another"
                " name, or leave the file out"
            )
    wanted = [name for name in columns if name not in own]
    if not wanted:
        raise UserError(
            f"{path} is not needed for {', '.join(columns)}, which the result has: leave the file"
            " out, or name a column of it"
        )
    for name in wanted:
        if name not in header:
            raise unknown_column(name, {*header, *_groupable([*records, *lesions])})
    if LESION_COLUMN in header:
        return _with_lesion_columns(records, path, rows, wanted)
    key = next((name for name in FILE_NAME_COLUMNS if name in header), None)
    if key is None:
        raise UserError(
            f"{path} has no column lesion_idx to know lesions by, or file_name or File_name to know"
            f" images by; its columns: {', '.join(header)}"
        )
    return _with_image_columns(records, path, rows, wanted, key)


def _read_table(path: Path) -> tuple[list[str], list[dict]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a comma-separated text file in UTF-8: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no rows")
    return [name for name in reader.fieldnames if name], rows


def _with_lesion_columns(
    records: Sequence[dict], path: Path, rows: list[dict], wanted: list[str]
) -> list[dict]:
    values: dict[int, dict[str, tuple]] = {}
    for row in rows:
        number = row[LESION_COLUMN] or ""
        if not number.strip().isdecimal():
            raise UserError(f"{path}: lesion_idx must be the number of a row, got {number!r}")
        of_lesion = values.setdefault(int(number), dict.fromkeys(wanted, ()))
        for name in wanted:
            if row[name] not in of_lesion[name]:
                of_lesion[name] += (row[name],)
    known = {x.get(LESION_COLUMN) for r in records for x in r["lesions"]}
    if known <= {None}:
        raise UserError(
            "the lesions of the result have no lesion_idx, which result files of old lack: prepare"
            " the data and test again to group by a column of lesions"
        )
    if not known & values.keys():
        raise UserError(
            f"{path} has none of the lesions of the result, such as {min(known - {None})}"
        )
    nothing = dict.fromkeys(wanted)
    return [
        {**r, "lesions": [{**x, **values.get(x.get(LESION_COLUMN), nothing)} for x in r["lesions"]]}
        for r in records
    ]


def _with_image_columns(
    records: Sequence[dict], path: Path, rows: list[dict], wanted: list[str], key: str
) -> list[dict]:
    cells: dict[str, tuple] = {}
    for row in rows:
        image = (row[key] or "").replace("/", "_")
        found = tuple(row[name] for name in wanted)
        if cells.setdefault(image, found) != found:
            name = next(n for n, a, b in zip(wanted, cells[image], found) if a != b)
            raise UserError(
                f"{path}: the rows of {row[key]} differ in {name!r}; a column to group images by "
                "has one value an image. One to group lesions by stands in a file with the column "
                "lesion_idx"
            )
    images = [r["file_name"].replace("/", "_") for r in records]
    if not any(image in cells for image in images):
        raise UserError(
            f"{path} has none of the images of the result, such as {records[0]['file_name']}"
        )
    nothing = (None,) * len(wanted)
    return [{**r, **dict(zip(wanted, cells.get(i, nothing)))} for r, i in zip(records, images)]


def unknown_column(column: str, names: set[str]) -> UserError:
    """The error for a column that is not there."""
    spelt = {name.lower(): name for name in sorted(names, reverse=True)}
    near = difflib.get_close_matches(column.lower(), spelt, n=1)
    hint = f"; did you mean {spelt[near[0]]!r}?" if near else "."
    return UserError(f"no column {column!r}{hint} There are {', '.join(sorted(names))}.")


def _groupable(records: Sequence[dict]) -> set[str]:
    """The keys that hold a text or a number."""
    return {k for r in records for k, v in r.items() if isinstance(v, str | int | float)}


def _number_or_text(value: object, column: str) -> float | str | None:
    if value is None or value == "":
        return None
    if isinstance(value, list | tuple | dict):
        raise UserError(f"column {column!r} holds {type(value).__name__}s: not a column of values")
    try:
        number = float(value)
    except ValueError:
        return str(value)
    return None if math.isnan(number) else number


def _name(value: float | str) -> str:
    """Different numbers have different names: 20200101 is not 2.02001e+07."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else value


def _ranges(values: Sequence[float | None]) -> Callable[[float], str]:
    """What to call the range that a number is in: four, parted by the quartiles of all."""
    known = [v for v in values if v is not None]
    edges = np.unique(np.quantile(known, (0.25, 0.5, 0.75), method="nearest"))
    bounds = [_name(edge) for edge in edges.tolist()]
    between = [f"> {low} to {high}" for low, high in pairwise(bounds)]
    names = [f"<= {bounds[0]}", *between, f"> {bounds[-1]}"]
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
    types = [x.get("lesion_type", -1) for r in result.records for x in r["lesions"]]
    types = np.array(types, int)
    return {name: result.curve.of_lesions(types == key) for key, name in LESION_TYPES.items()}


def by_diameter(result: Result) -> dict[str, FROC]:
    """The curves of three ranges of the long diameter, over the false positives of all images."""
    sizes = np.array([size_group(x) for r in result.records for x in r["lesions"]], str)
    return {name: result.curve.of_lesions(sizes == name) for name in (*LESION_SIZES, "unknown")}


def size_group(lesion: dict) -> str:
    """Which of LESION_SIZES a lesion is of by its long diameter; 'unknown' without one."""
    if not lesion.get("diameters_mm"):
        return "unknown"
    long_mm = lesion["diameters_mm"][0]
    return LESION_SIZES[int(long_mm >= SMALL_MM) + int(long_mm > LARGE_MM)]


def is_lesion_column(result: Result, column: str) -> bool:
    """Whether a column is one of the lesions, not of the images.

    Raises ValueError if it is neither (the nearest name is given).
    """
    if any(column in r for r in result.records):
        return False
    lesions = [lesion for r in result.records for lesion in r["lesions"]]
    if any(column in lesion for lesion in lesions):
        return True
    raise unknown_column(column, _groupable(result.records) | _groupable(lesions))


def by_column(result: Result, column: str) -> dict[str, FROC]:
    """The curves of each group that a column makes, see `column_groups`.

    Of groups of images: each of its own images. Of groups of lesions: over the false positives of
    all images.
    """
    if is_lesion_column(result, column):
        lesions = [lesion for r in result.records for lesion in r["lesions"]]
        groups = column_groups(lesions, column)
        return {name: result.curve.of_lesions(chosen) for name, chosen in groups.items()}
    groups = column_groups(result.records, column)
    return {name: result.curve.of_images(chosen) for name, chosen in groups.items()}
