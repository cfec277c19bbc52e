"""LiTS's cases as arrays on disk: the same as read from the files, and anew when these change."""

import os

import numpy as np
import pytest

pytest.importorskip("nibabel", reason="needs nibabel, the extra [ct]")
from ct_volumes import lits_arrays
from ct_volumes.lits import find_cases, read_case
from ct_volumes.lits_arrays import arrays_of


@pytest.fixture
def files(phantom_lits, tmp_path):
    """Links to a case of the phantom, so that its times can be changed."""
    case = find_cases(phantom_lits / "files").cases[0]
    for path in (case.volume, case.segmentation):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / path.name).write_bytes(path.read_bytes())
    return find_cases(tmp_path / "files").cases[0]


@pytest.fixture
def read(monkeypatch):
    """The numbers of the cases that were read from their files."""
    numbers = []

    def read(files):
        numbers.append(files.number)
        return read_case(files)

    monkeypatch.setattr(lits_arrays, "read_case", read)
    return numbers


def check(arrays, files):
    case = read_case(files)
    for array, expected in zip(arrays, (case.volume.hu, case.labels), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_arrays_are_those_of_the_files(files, read, tmp_path):
    check(arrays_of(files), files)
    assert read == [0]
    for _ in range(2):
        arrays = arrays_of(files, tmp_path / "cache")
        check(arrays, files)
        assert all(isinstance(array, np.memmap) for array in arrays)
    assert read == [0, 0]
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0, 0, 0] = 1


def test_changed_files_and_damaged_arrays_are_read_anew(files, read, tmp_path):
    cache = tmp_path / "cache"
    arrays_of(files, cache)
    os.utime(files.segmentation, ns=(1, 1))
    check(arrays_of(files, cache), files)
    assert len(read) == 2
    path = cache / "case_000.labels.npy"
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:5], b""):
        path.write_bytes(damaged)
        check(arrays_of(files, cache), files)
        assert path.read_bytes() == whole
    path.unlink()
    check(arrays_of(files, cache), files)
    (cache / "case_000.json").write_text("{")
    check(arrays_of(files, cache), files)
    assert len(read) == 7
    arrays_of(files, cache)
    assert len(read) == 7
