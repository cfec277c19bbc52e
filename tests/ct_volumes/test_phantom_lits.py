"""The phantom LiTS: what was drawn is what the data set's reader reads, however the files lie."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from ct_volumes import phantom_lits as phantom_lits_module
from ct_volumes.lits import CASES, find_cases, read_case, split
from ct_volumes.phantom_lits import (
    IDENTITY,
    ORIENTATIONS,
    case_numbers,
    make_lits,
    write_case,
)
from deeplesion.errors import UserError
from deeplesion.phantom import liver
from deeplesion.phantom.findings import Scan
from deeplesion.phantom.liver import LiverScan, draw_liver_scan

nib = pytest.importorskip("nibabel")
TOOL = Path(__file__).parents[2] / "tools" / "make_phantom.py"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As the fixture `phantom_lits` is made."""
    monkeypatch.setattr(liver, "sub_heights", lambda thickness: [0.0])
    monkeypatch.setattr(phantom_lits_module, "THICKNESSES", (7.0, 6.0, 6.5, 8.0, 7.5))


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_cases_are_numbered_so_that_both_parts_and_missing_geometry_are_there():
    training, validation = map(set, split())
    assert case_numbers(1) == [28] and case_numbers(CASES) == list(range(CASES))
    for count in range(2, CASES + 1):
        numbers = case_numbers(count)
        assert len(set(numbers)) == count and numbers == sorted(numbers)
        assert training & {*numbers} and validation & {*numbers} and {*IDENTITY} & {*numbers}


def test_what_was_drawn_is_read_again(phantom_lits):
    found = find_cases(phantom_lits / "files")
    assert list(found.cases) == [0, 28, 29]
    drawn, case = draw_liver_scan(0, 128, 1, 7.0), read_case(found.cases[0])
    np.testing.assert_array_equal(case.volume.hu, drawn.hu)
    np.testing.assert_array_equal(case.labels, drawn.labels)
    assert nib.load(found.cases[0].volume).get_data_dtype() == np.int16
    np.testing.assert_allclose(case.volume.interval_mm, 7.0, atol=1e-4)
    np.testing.assert_allclose(case.volume.spacing_mm, drawn.scan.spacing, rtol=1e-5)
    # The image's middle at 0, the first slice below the top of the chest.
    middle = case.volume.to_world(63.5, 63.5, 0)
    np.testing.assert_allclose(middle, [0, 0, -drawn.first_mm], atol=1e-3)
    assert [read_case(found.cases[n]).known_geometry for n in (0, 28, 29)] == [True, False, False]


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 30])
def test_files_lie_in_five_orientations_and_are_read_alike(tmp_path, monkeypatch, number):
    rng = np.random.default_rng(number)
    hu = rng.integers(-900, 900, (4, 5, 5)).astype(np.int16)
    scan = LiverScan(Scan(5, 0.8, 2.5), hu, (hu % 3).astype(np.uint8), 100.0)
    monkeypatch.setattr(phantom_lits_module, "draw_liver_scan", lambda *_: scan)
    write_case(tmp_path, 5, 0, number)
    (files,) = find_cases(tmp_path).cases.values()
    case = read_case(files)
    np.testing.assert_array_equal(case.volume.hu, hu)
    np.testing.assert_array_equal(case.labels, scan.labels)
    expected = "RAS" if number in IDENTITY else ORIENTATIONS[number % 5]
    assert "".join(nib.aff2axcodes(nib.load(files.volume).affine)) == expected


def test_livers_and_lesions_are_what_the_labels_say(phantom_lits):
    cases = [read_case(f) for f in find_cases(phantom_lits / "files").cases.values()]
    scans = [(case.volume.hu, case.labels) for case in cases]
    healthy = draw_liver_scan(2, 128, 0, 8.0)
    assert np.unique(healthy.labels).tolist() == [0, 1], "some patients have no lesion"
    for hu, labels in [*scans, (healthy.hu, healthy.labels)]:
        assert 60 < np.median(hu[labels == 1]) < 130
        assert not labels[[0, -1]].any(), "the scan goes on beyond the liver"
        assert 0.02 < (labels > 0).mean() < 0.2
    for hu, labels in scans:
        middle = np.median(hu[labels == 1])
        away = [np.median(abs(hu[labels == label] - middle)) for label in (1, 2)]
        assert away[1] > 1.3 * away[0], "lesions stand out"


def test_equal_arguments_give_equal_bytes_and_what_is_there_is_kept(phantom_lits, tmp_path):
    root = tmp_path / "again"
    kept = contents(phantom_lits / "files")
    root.mkdir()
    for name in ("arguments.json", "volume-0.nii", "segmentation-0.nii", "volume-28.nii"):
        (root / name).write_bytes(kept[Path(name)])
    before = (root / "segmentation-0.nii").stat().st_mtime_ns
    assert make_lits(root, 3, size=128, seed=1, progress=False) == root
    assert contents(root) == kept
    assert (root / "segmentation-0.nii").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="repeat its arguments"):
        make_lits(root, 3, size=128, seed=2, progress=False)
    with pytest.raises(UserError, match="cases is 132"):
        make_lits(tmp_path / "more", 132)


def test_the_command_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phantom_lits_module, "write_case", lambda *_: None)
    arguments = ["make_phantom", "--lits", str(tmp_path / "l"), "--patients", "2", "--size", "128"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(TOOL), run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path / 'l'} written\n"
