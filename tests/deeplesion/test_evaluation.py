"""Tables and result files."""

import json
import math

import numpy as np
import pytest

from deeplesion.evaluation import (
    froc_table,
    read_results,
    table_file,
    write_results,
    write_table,
)
from deeplesion.tables import format_table


def record(thickness, hit, name="a/001.png", false_positives=0):
    """One lesion; found with score 0.9 or not, after so many false positives of score 0.95."""
    boxes = [[60.0, 60, 70, 70]] * false_positives + ([[10.0, 10, 30, 30]] if hit else [])
    return dict(
        file_name=name,
        patient=1,
        height=96,
        width=96,
        spacing_mm=0.8,
        thickness_mm=thickness,
        lesions=[dict(bbox=[10.0, 10, 30, 30], mask=None, recist=None, diameters_mm=None)],
        boxes=boxes,
        scores=[0.95] * false_positives + [0.9] * hit,
    )


def test_thin_and_thick_are_told_apart_at_2_mm():
    records = [record(1.0, True), record(2.0, True), record(2.5, False), record(5.0, True)]
    rows = {row["group"]: row for row in froc_table(records)}
    assert [rows[g]["images"] for g in ("all", "thin", "thick")] == [4, 2, 2]
    assert rows["all"]["average"] == pytest.approx(75)
    assert rows["thin"]["average"] == pytest.approx(100)
    assert rows["thick"]["average"] == pytest.approx(50)
    assert rows["thick"]["difference"] == pytest.approx(-25)
    assert list(rows["all"]["sensitivity"]) == ["0.5", "1", "2", "4", "8", "16"]


def test_sensitivity_between_points_by_hand():
    """Two images, one false positive above both hits: the curve jumps at 0.5 an image."""
    rows = froc_table([record(1.0, True, false_positives=1), record(1.0, True)])
    assert rows[0]["sensitivity"]["0.5"] == pytest.approx(100)
    rows = froc_table([record(1.0, True, false_positives=2), record(1.0, False)])
    assert rows[0]["sensitivity"]["0.5"] == pytest.approx(0)
    assert rows[0]["sensitivity"]["1"] == pytest.approx(50)


def test_unknown_thickness_counts_in_all_only():
    rows = froc_table([record(math.nan, True), record(1.0, False)])
    assert [(r["group"], r["images"]) for r in rows] == [("all", 2), ("thin", 1)]


def test_table_lines_up():
    rows = froc_table([record(1.0, True), record(5.0, False)])
    lines = format_table(rows).splitlines()
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in (lines[1], *lines[3:])]
    assert all(b == bars[0] and len(b) == 2 for b in bars)
    assert "-50.00" in lines[-1] and "50.00" in lines[3]


@pytest.mark.parametrize("name", ["results.json", "results.json.gz"])
def test_result_file_round_trip(tmp_path, name):
    records = [record(1.0, True), record(math.nan, False)]
    write_results(tmp_path / "new" / name, records)
    back = read_results(tmp_path / "new" / name)
    assert math.isnan(back[1].pop("thickness_mm")) and math.isnan(records[1].pop("thickness_mm"))
    assert back == records
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", b"{"),
        ("a.json", b"[]"),
        ("a.json", b'{"images": []}'),
        ("a.json.gz", b"not gzip"),
        ("a.json.gz", b"\x1f\x8b\x08\x00"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_results(tmp_path / name)


def test_table_goes_beside_the_result_file(tmp_path):
    assert table_file(tmp_path / "results.json.gz") == tmp_path / "results.froc.json"
    rows = froc_table([record(1.0, True)])
    write_table(tmp_path / "x.froc.json", rows)
    assert json.loads((tmp_path / "x.froc.json").read_text())["froc"] == rows
    assert np.isfinite(rows[0]["average"])
