"""NIfTI label maps: read back by nibabel, every voxel lies where the volume says, in mm."""

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ct_volumes.lesions import Algorithm, Lesion, LesionSlice, Patch
from ct_volumes.nifti_grid import points_in_nifti
from ct_volumes.nifti_out import write_nifti
from ct_volumes.volume import CTVolume, Instance, Source
from deeplesion.errors import WriteError

ALGORITHM = Algorithm("alignshift_3slice", "0.1.0", "ab" * 32, {"interval_mm": 2.0})
SHAPE = (5, 6, 7)
IN_PLANE = list(itertools.product([(0, 1, 2), (0, 2, 1)], [False, True], [False, True]))
ORIENTATIONS = list(
    itertools.product(itertools.permutations(range(3)), itertools.product([False, True], repeat=3))
)


def dicom_volume(steps=(2.5,) * 4, shift=0.0, shape=SHAPE, axes=(0, 1, 2), flipped=(False,) * 3):
    """Slices `steps` mm apart, each moved by `shift` mm a mm to posterior as by a tilted gantry."""
    below = np.append(0, np.cumsum(steps))[: shape[0]]
    origins = np.stack([0 * below - 20, below * shift - 30, 100 - below], axis=1)
    turn = 0.02  # of the patient on the table
    row, column = (np.cos(turn), np.sin(turn), 0), (-np.sin(turn), np.cos(turn), 0)
    instances = tuple(Instance(Path(f"{k}"), f"1.2.{k}") for k in range(shape[0]))
    of_source = tuple(shape[axes.index(a)] for a in range(3))
    source = Source(Path("Doe^Jane"), "dicom", of_source, axes, flipped, instances)
    return CTVolume(np.zeros(shape, np.int16), origins, row, column, (0.8, 0.5), source)


def nifti_volume(axes, flipped):
    """A volume of a NIfTI in any of the 48 orientations; its affine follows from the volume."""
    of_source = tuple(SHAPE[axes.index(a)] for a in range(3))
    origins = np.stack([np.full(5, -20.0), np.full(5, -30.0), 100 - 2.5 * np.arange(5)], axis=1)
    parts = np.zeros(SHAPE, np.int16), origins, (1, 0, 0), (0, 1, 0), (0.8, 0.5)
    bare = CTVolume(*parts, Source(Path("scan"), "nifti", of_source, axes, flipped))
    index, y, x = np.indices(SHAPE).reshape(3, -1)
    voxels = np.c_[bare.points_in_source(x, y, index), np.ones(x.size)]
    world = bare.to_world(x, y, index) * (-1, -1, 1)
    affine = np.eye(4)
    affine[:3] = np.linalg.lstsq(voxels, world, rcond=None)[0].T
    return CTVolume(*parts, Source(Path("scan"), "nifti", of_source, axes, flipped, affine=affine))


def lesion(score, first, masks):
    """A lesion of (H, W) masks on slices from `first` on."""
    slices = tuple(
        LesionSlice(first + k, np.array([0.0, 0.0, 1.0, 1.0]), score, Patch.of(mask))
        for k, mask in enumerate(masks)
    )
    return Lesion(score, slices, 1.0, np.zeros(3), np.zeros((4, 2)), first, np.ones(2))


def lesions():
    """Two without symmetry that share no voxel."""
    random = np.random.default_rng(0)
    masks = random.random((3, *SHAPE[1:])) < 0.3
    masks[:, 0, 0] = True
    other = (random.random((2, *SHAPE[1:])) < 0.3) & ~masks[:2]
    other[:, 5, 6] = ~masks[:2, 5, 6]
    return [lesion(0.9, 1, masks), lesion(0.4, 1, other)]


def places(points):
    return sorted(map(tuple, np.round(points, 2) + 0.0))


def check_places(path, volume, found):
    """Read back, every lesion is the same set of places."""
    image = nibabel.load(path)
    labels = np.asarray(image.dataobj)
    assert labels.dtype == np.uint16
    for number, each in enumerate(found, 1):
        index, y, x = np.nonzero(each.labels(volume.hu.shape))
        voxels = np.argwhere(labels == number)
        there = nibabel.affines.apply_affine(image.affine, voxels) * (-1, -1, 1)
        assert places(there) == places(volume.to_world(x, y, index))
        assert sorted(map(tuple, voxels)) == sorted(
            map(tuple, points_in_nifti(volume, x, y, index).astype(int))
        )
    return image


@pytest.mark.parametrize("axes, flip_rows, flip_columns", IN_PLANE)
def test_of_dicom_every_voxel_lies_where_it_was(tmp_path, axes, flip_rows, flip_columns):
    volume = dicom_volume(axes=axes, flipped=(False, flip_rows, flip_columns))
    path = tmp_path / "lesions.nii.gz"
    assert write_nifti(path, lesions(), volume, ALGORITHM) == ()
    image = check_places(path, volume, lesions())
    # Right-handed in LPS, and so in RAS, as ITK has it; both ways to say the geometry agree.
    assert np.linalg.det(image.affine[:3, :3]) > 0
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    assert (image.header["qform_code"], image.header["sform_code"]) == (1, 1)


@pytest.mark.parametrize("axes, flipped", ORIENTATIONS)
def test_of_nifti_shape_and_affine_are_the_scans(tmp_path, axes, flipped):
    volume = nifti_volume(axes, flipped)
    path = tmp_path / "lesions.nii.gz"
    write_nifti(path, lesions(), volume, ALGORITHM)
    image = check_places(path, volume, lesions())
    assert image.shape == volume.source.shape
    np.testing.assert_allclose(image.affine, volume.source.affine.astype(np.float32), rtol=0)


def test_a_single_slice_is_as_thick_as_it_is(tmp_path):
    volume = dicom_volume(shape=(1, 6, 7))
    mask = np.zeros((6, 7), bool)
    mask[2:4, 3] = True
    write_nifti(tmp_path / "one.nii", [lesion(0.5, 0, [mask])], volume, ALGORITHM)
    image = check_places(tmp_path / "one.nii", volume, [lesion(0.5, 0, [mask])])
    assert image.header.get_zooms() == pytest.approx((0.5, 0.8, 1.0))


def test_a_tilt_stands_in_the_sform_alone_and_is_exact(tmp_path):
    volume = dicom_volume(shift=0.3)
    (note,) = write_nifti(tmp_path / "a.nii.gz", lesions(), volume, ALGORITHM)
    assert "tilted" in note
    image = check_places(tmp_path / "a.nii.gz", volume, lesions())
    assert (image.header["qform_code"], image.header["sform_code"]) == (0, 1)


def test_uneven_slices_lie_on_a_line_and_the_error_is_told(tmp_path):
    volume = dicom_volume(steps=(2, 2, 5, 2))
    (note,) = write_nifti(tmp_path / "a.nii.gz", lesions(), volume, ALGORITHM)
    image = nibabel.load(tmp_path / "a.nii.gz")
    index = np.arange(5)
    there = nibabel.affines.apply_affine(image.affine, np.stack([0 * index, 0 * index, index], 1))
    world = volume.to_world(0, 0, index[::-1]) * (-1, -1, 1)
    worst = np.linalg.norm(there - world, axis=1).max()
    assert f"up to {worst:.1f} mm" in note and worst > 0.5
    assert f"{worst:.1f} mm" in image.header["descrip"].item().decode()
    line = np.polynomial.Polynomial.fit(index, world[:, 2], 1).convert().coef
    assert image.affine[2, 2] == pytest.approx(line[1])


def test_where_lesions_overlap_the_higher_score_stays(tmp_path):
    volume = dicom_volume()
    low, high = np.zeros((2, 6, 7), bool)
    low[1:4, 1:4] = high[2:5, 2:5] = True
    found = [lesion(0.3, 1, [low]), lesion(0.8, 1, [high]), lesion(0.8, 1, [high])]
    write_nifti(tmp_path / "a.nii.gz", found, volume, ALGORITHM)
    labels = np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj)
    assert [(labels == n).sum() for n in (1, 2, 3)] == [9 - 4, 9, 0]


def test_no_lesions_are_an_empty_map_and_equal_lesions_equal_bytes(tmp_path):
    volume = dicom_volume()
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, [], volume, ALGORITHM)
    assert not np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj).any()
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert b"Doe" not in content
    write_nifti(tmp_path / "c.nii", [], volume, ALGORITHM)
    assert b"Doe" not in (tmp_path / "c.nii").read_bytes()


def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "lesions.nii.gz"
    path.write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(WriteError, match="full"):
        write_nifti(path, lesions(), dicom_volume(), ALGORITHM)
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_more_lesions_than_uint16_are_refused(tmp_path):
    each = lesion(0.5, 0, [np.ones((6, 7), bool)])
    with pytest.raises(ValueError, match="65535"):
        write_nifti(tmp_path / "a.nii.gz", [each] * 65536, dicom_volume(), ALGORITHM)
