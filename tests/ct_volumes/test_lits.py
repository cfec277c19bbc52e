"""LiTS: files found, scan and labels turned alike, resampling and the way back, the split."""

import nibabel as nib
import numpy as np
import pytest

from ct_volumes.lits import CASES, Case, find_cases, read_case, resample, split
from deeplesion.errors import DataError, MissingDataError

SHAPE = (5, 6, 4)  # i, j, k
RAS = np.diag([0.7, 0.8, 2.5, 1.0])
LAS = np.array([[-0.7, 0, 0, 90], [0, -0.8, 0, 80], [0, 0, 2.5, -40], [0, 0, 0, 1.0]])
VALIDATION = (
    6,
    8,
    9,
    12,
    17,
    20,
    29,
    30,
    34,
    36,
    39,
    48,
    56,
    63,
    69,
    70,
    72,
    76,
    83,
    87,
    96,
    101,
    102,
    103,
    110,
    120,
)
TURNED = np.array([[0, 0.8, 0, 3], [0, 0, -0.7, 4], [2.5, 0, 0, 5], [0, 0, 0, 1.0]])


def write(folder, number, affine=RAS, labels=None, seg_affine=None, ending=".nii"):
    """A scan whose labels follow from its HU, so that each shows how the other was turned."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    hu = rng.integers(-1000, 1000, SHAPE).astype(np.int16)
    labels = (hu % 3).astype(np.uint8) if labels is None else labels
    seg_affine = affine if seg_affine is None else seg_affine
    nib.save(nib.Nifti1Image(hu, affine), folder / f"volume-{number}{ending}")
    nib.save(nib.Nifti1Image(labels, seg_affine), folder / f"segmentation-{number}{ending}")
    return hu, labels


def read(folder, number=0):
    return read_case(find_cases(folder).cases[number])


def test_cases_are_found_in_subfolders_and_the_missing_are_named(tmp_path):
    write(tmp_path / "Training Batch 1", 3)
    write(tmp_path / "Training Batch 2", 130, ending=".nii.gz")
    (tmp_path / "Training Batch 2" / "test-volume-4.nii").touch()
    (tmp_path / "Training Batch 1" / "volume-7.nii").touch()
    found = find_cases(tmp_path)
    assert list(found.cases) == [3, 130]
    assert found.without_volume == tuple(n for n in range(131) if n not in (3, 7, 130))
    assert found.without_segmentation == tuple(n for n in range(131) if n not in (3, 130))
    assert str(found).startswith(f"{tmp_path}: 2 of 131 cases; no volume of 0 to 2, 4 to 6, 8 to ")
    assert read(tmp_path, 130).number == 130


def test_folders_that_cannot_be_lits_are_refused(tmp_path):
    with pytest.raises(MissingDataError, match="no folder"):
        find_cases(tmp_path / "none")
    with pytest.raises(MissingDataError, match="no case"):
        find_cases(tmp_path)
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 1)
    with pytest.raises(DataError, match="twice"):
        find_cases(tmp_path)
    write(tmp_path / "c", 131)
    with pytest.raises(DataError, match="none of LiTS's cases"):
        find_cases(tmp_path / "c")


@pytest.mark.parametrize("affine", [RAS, LAS, TURNED, np.eye(4)], ids=["RAS", "LAS", "turned", "1"])
def test_scan_and_labels_are_turned_alike(tmp_path, affine):
    hu, labels = write(tmp_path, 0, affine)
    case = read(tmp_path)
    assert case.labels.dtype == np.uint8
    np.testing.assert_array_equal(case.labels, case.volume.hu % 3)
    np.testing.assert_array_equal(case.volume.in_source(case.labels), labels)
    np.testing.assert_array_equal(case.volume.in_source(case.volume.hu), hu)
    # Every voxel lies where nibabel's affine puts it.
    for s, y, x in np.ndindex(case.labels.shape):
        ijk = case.volume.points_in_source(x, y, s)
        np.testing.assert_allclose(
            case.volume.to_world(x, y, s) * (-1, -1, 1), affine[:3, :3] @ ijk + affine[:3, 3],
            atol=1e-4,
        )  # fmt: skip


def test_an_identity_affine_is_read_and_named(tmp_path):
    write(tmp_path, 28, np.eye(4))
    write(tmp_path, 1)
    case = read(tmp_path, 28)
    assert not case.known_geometry and "lengths in mm" in case.volume.source.notes[0]
    assert case.volume.spacing_mm == (1.0, 1.0)
    assert read(tmp_path, 1).known_geometry
    # All axes run against ours, and voxels are those of any other file: offset, or no number.
    hu, labels = write(tmp_path, 29, np.eye(4))
    stored = (hu.astype(int) + 1024).astype(np.uint16)
    unknown = np.where(np.arange(hu.size).reshape(SHAPE) == 7, np.nan, hu).astype(np.float32)
    for values in (hu, stored, unknown):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "volume-29.nii")
        case = read(tmp_path, 29)
        expected = np.where(np.isnan(values), -1024, hu).transpose(2, 1, 0)[::-1, ::-1, ::-1]
        np.testing.assert_array_equal(case.volume.hu, expected)
        np.testing.assert_array_equal(case.labels, labels.transpose(2, 1, 0)[::-1, ::-1, ::-1])
    assert "no number" in case.volume.source.notes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=np.full(SHAPE, 3, np.uint8)), r"labels \[3\]"),
        (dict(labels=np.full(SHAPE, 0.5, np.float32)), r"labels \[0.5\]"),
        (dict(labels=np.zeros((5, 6, 3), np.uint8)), "has the shape"),
        (dict(seg_affine=LAS), "placed differently"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, change, message):
    write(tmp_path, 0, **change)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_files_cut_short_are_refused(tmp_path):
    write(tmp_path, 0)
    path = tmp_path / "segmentation-0.nii"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="copied whole"):
        read(tmp_path)
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match="no NIfTI"):
        read(tmp_path)


@pytest.mark.parametrize("step", [0.4, 1.0, 1.5, 2.5, 4.0, 100.0])
def test_resampling_is_linear_for_hu_and_nearest_for_labels(tmp_path, step):
    write(tmp_path, 0)
    case = read(tmp_path)
    new = resample(case, step)
    old = case.volume.positions_mm
    np.testing.assert_allclose(np.diff(new.volume.positions_mm), step)
    assert abs(new.volume.positions_mm[-1] - old[-1]) <= step / 2 + 1e-9
    for k, place in enumerate(new.volume.positions_mm):
        for y, x in np.ndindex(case.labels.shape[1:]):
            expected = np.interp(place, old, case.volume.hu[:, y, x])
            assert abs(new.volume.hu[k, y, x] - expected) <= 0.501
        distance = [abs(place - p) for p in old]
        slices = [s for s in range(len(old)) if distance[s] <= min(distance) + 1e-9]
        assert any((new.labels[k] == case.labels[s]).all() for s in slices)


@pytest.mark.parametrize("step", [0.4, 1.0, 1.5, 2.4])
def test_labels_come_back_whole_if_the_step_is_finer_than_the_slices(tmp_path, step):
    write(tmp_path, 0)
    case = read(tmp_path)
    new = resample(case, step)
    np.testing.assert_array_equal(new.back(new.labels), case.labels)
    assert new.back(new.labels > 0).dtype == bool
    with pytest.raises(ValueError, match="must be"):
        new.back(case.labels[:1])


def test_predictions_come_back_from_the_nearest_slice(tmp_path):
    write(tmp_path, 0)
    new = resample(read(tmp_path), 4.0)  # at 0, 4, 8 mm; the slices at 0, 2.5, 5, 7.5
    numbers = np.broadcast_to(np.arange(3)[:, None, None], new.volume.hu.shape)
    assert new.back(numbers)[:, 0, 0].tolist() == [0, 1, 1, 2]


def test_a_single_slice_stays_as_it_is(tmp_path):
    write(tmp_path, 0)
    case = read(tmp_path)
    volume = type(case.volume)(
        case.volume.hu[:1], case.volume.origins_mm[:1], (1, 0, 0), (0, 1, 0), (0.8, 0.7),
        case.volume.source,
    )  # fmt: skip
    new = resample(Case(0, volume, case.labels[:1]))
    np.testing.assert_array_equal(new.volume.hu, volume.hu)
    np.testing.assert_array_equal(new.back(new.labels), case.labels[:1])
    with pytest.raises(ValueError, match="positive"):
        resample(case, 0.0)


def test_the_split_is_whole_and_fixed():
    training, validation = split()
    assert sorted(training + validation) == list(range(CASES))
    assert validation == VALIDATION  # numbers that runs were made with must not move
