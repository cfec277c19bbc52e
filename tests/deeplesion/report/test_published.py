"""The papers' numbers against one another: a slip of the pen would show."""

from collections import Counter

import numpy as np
import pytest

from deeplesion.report.published import ACS, PUBLISHED, VA


def name(row):
    return f"{row.method}, {row.slices}, {row.thickness}, {row.sources[-1]}"


@pytest.mark.parametrize("row", PUBLISHED, ids=name)
def test_a_row_fits_itself(row):
    assert len(row.sensitivity) == 6
    known = [s for s in row.sensitivity if s is not None]
    assert known == sorted(known) and all(50 < s < 100 for s in known)
    assert row.sources and row.trained_on and row.thickness in ("all", "thin", "thick")
    if row.average is not None and None not in row.sensitivity[:4]:
        # Five figures rounded to 0.01.
        assert row.average == pytest.approx(np.mean(row.sensitivity[:4]), abs=0.01)
    numbers = [*known, row.average, row.difference, row.ap50]
    assert all(n is None or round(n, row.decimals) == n for n in numbers)


def test_differences_are_those_of_the_averages():
    whole = {(r.method, r.slices): r.average for r in PUBLISHED if r.thickness == "all"}
    parts = [r for r in PUBLISHED if r.thickness != "all"]
    assert len(parts) == 12
    for row in parts:
        expected = row.average - whole[row.method, row.slices]
        assert row.difference == pytest.approx(expected, abs=0.0101)


def test_no_row_stands_twice_and_all_tables_are_there():
    rows = Counter(
        (r.method, r.slices, r.thickness, paper.split(",")[0])
        for r in PUBLISHED
        for paper in r.sources
    )
    assert set(rows.values()) == {1}
    tables = Counter(
        (source.split(" (")[0], table)
        for r in PUBLISHED
        for source in r.sources
        for table in source.split("Table")[1].lstrip("s ").split(" and ")
    )
    assert tables == {
        ("AlignShift", "2"): 14,
        ("AlignShift", "3"): 18,
        ("A3D", "2"): 14,
        ("A3D", "3"): 15,
        ("ACS", "VII"): 20,
        ("Volumetric Attention", "3"): 8,
        ("Volumetric Attention", "4"): 8,
    }


def test_papers_that_disagree_are_marked():
    """The same method on as many slices with other numbers, or other methods with the same."""
    by_numbers = {}
    for row in PUBLISHED:
        if row.average is not None and None not in row.sensitivity:
            by_numbers.setdefault(row.sensitivity, []).append(row)
    for rows in by_numbers.values():
        methods = {r.method.split(",")[0] for r in rows}
        assert (
            len(rows) == 1
            or methods == {"ACS"}
            or methods == {"3D", "I3D"}
            or any(r.note and r.sources[0].startswith(ACS) for r in rows)
        ), rows
    assert all(r.trained_on.startswith("training and val") for r in PUBLISHED if r.ap50)
    assert all(r.sources[0].startswith(VA) for r in PUBLISHED if r.decimals == 1)
