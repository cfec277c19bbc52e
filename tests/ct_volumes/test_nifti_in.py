"""NIfTI -> CTVolume: all orders of axes, scaling, geometry that is missing or contradicts itself,
and damaged files."""

import gzip
import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from ct_volumes import nifti_in
from ct_volumes.read import list_series, read_volume
from deeplesion.errors import DataError, MissingDataError

from .scan_files import affine_of, anatomy, assert_same, nifti, notes, origins

HU = anatomy()
SIGNS = list(itertools.product((1, -1), repeat=3))


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", SIGNS)
def test_the_same_anatomy_comes_out_of_all_orders_of_axes(tmp_path, axes, flips):
    path = nifti(tmp_path / "scan.nii.gz", axes=axes, flips=flips)
    volume = read_volume(path)
    assert_same(volume)
    assert volume.source.notes == ()
    # Back in the source: nibabel's own array, each voxel placed by its own affine.
    plain = nib.load(path)
    np.testing.assert_array_equal(volume.in_source(volume.hu), np.asarray(plain.dataobj))
    i, j, k = volume.points_in_source(2, 3, 4)
    world = plain.affine @ [i, j, k, 1]
    np.testing.assert_allclose(world[:3] * [-1, -1, 1], volume.to_world(2, 3, 4), atol=1e-4)


def test_deeplesions_own_script_comes_out_unflipped(tmp_path):
    """Its arrays are (row, column, slice) as in the PNGs, head to feet."""
    sy, sx, sz = 0.8, 0.6, 5.0
    affine = np.array([[0, -sy, 0, 0], [-sx, 0, 0, 0], [0, 0, -sz, 0], [0, 0, 0, 1.0]])
    path = tmp_path / "000001_01_01_103-115.nii.gz"
    nib.save(nib.Nifti1Image(HU.transpose(1, 2, 0), affine), path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.source.flipped == (False, False, False)
    assert volume.spacing_mm == pytest.approx((sx, sy), rel=1e-6)
    np.testing.assert_allclose(volume.interval_mm, sz)


@pytest.mark.parametrize("angle", [5, 25, 41])
def test_an_oblique_affine(tmp_path, angle):
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.eye(4)
    turn[:3, :3] = [[1, 0, 0], [0, c, -s], [0, s, c]]
    affine = turn @ affine_of(origins())
    path = tmp_path / "scan.nii"
    nib.save(nib.Nifti1Image(HU.transpose(2, 1, 0), affine), path)
    if angle > 35:
        with pytest.raises(DataError, match="oblique by 41 degrees"):
            read_volume(path)
        return
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, HU)
    for x, y, k in [(0, 0, 0), (3, 5, 2), (8, 9, 5)]:
        world = (affine @ [x, y, k, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(volume.to_world(x, y, k), world, atol=1e-4)
    np.testing.assert_allclose(volume.interval_mm, 2, rtol=1e-5)


def test_a_tilted_gantry_keeps_its_slices(tmp_path):
    volume = read_volume(nifti(tmp_path / "scan.nii", where=origins(tilt=0.5)))
    assert_same(volume, where=origins(tilt=0.5))
    assert "tilted by 14.0 degrees" in notes(volume)


def test_axes_that_are_not_at_right_angles_are_refused(tmp_path):
    affine = affine_of(origins())
    affine[:3, 1] += 0.5 * affine[:3, 0]
    nib.save(nib.Nifti1Image(HU.transpose(2, 1, 0), affine), tmp_path / "scan.nii")
    with pytest.raises(DataError, match="right angles"):
        read_volume(tmp_path / "scan.nii")


def save(path, values, affine=None, **header):
    image = nib.Nifti1Image(values, affine_of(origins()) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def rewrite(path, **fields):
    """Changes fields of the header on disk."""
    packed = path.suffix == ".gz"
    data = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for key, value in fields.items():
        header[key] = value
    data[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(data)) if packed else bytes(data))
    return path


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_number_types_of_either_byte_order(tmp_path, dtype, endian):
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(endian))
    image = nib.Nifti1Image(HU.transpose(2, 1, 0).astype(dtype), affine_of(origins()), header)
    nib.save(image, tmp_path / "scan.nii")
    assert_same(read_volume(tmp_path / "scan.nii"))


def test_nifti_2(tmp_path):
    nib.save(nib.Nifti2Image(HU.transpose(2, 1, 0), affine_of(origins())), tmp_path / "scan.nii")
    assert_same(read_volume(tmp_path / "scan.nii"))


@pytest.mark.parametrize("slope, intercept", [(2, -1024), (0.5, -1000), (1, -1024)])
def test_scl_slope_and_scl_inter(tmp_path, slope, intercept):
    stored = np.rint((HU.astype(float) - intercept) / slope).astype(np.int16)
    path = save(tmp_path / "scan.nii.gz", stored.transpose(2, 1, 0))
    rewrite(path, scl_slope=slope, scl_inter=intercept)
    assert_same(read_volume(path), np.rint(stored * slope + intercept))


@pytest.mark.parametrize("slope, intercept", [(0, 500), (np.nan, np.nan), (1, np.nan)])
def test_a_slope_of_zero_or_nan_means_none(tmp_path, slope, intercept):
    path = save(tmp_path / "scan.nii", HU.transpose(2, 1, 0))
    rewrite(path, scl_slope=slope, scl_inter=intercept)
    assert_same(read_volume(path))


def test_four_dimensions_with_one_volume_are_three(tmp_path):
    path = save(tmp_path / "scan.nii", HU.transpose(2, 1, 0)[..., None])
    assert_same(read_volume(path))


def test_several_volumes_are_refused(tmp_path):
    path = save(tmp_path / "scan.nii", np.stack([HU.transpose(2, 1, 0)] * 3, axis=-1))
    with pytest.raises(DataError, match="holds 3 volumes"):
        read_volume(path)


def test_an_image_of_two_dimensions_is_one_slice(tmp_path):
    path = save(tmp_path / "scan.nii", HU[2].T)
    np.testing.assert_array_equal(read_volume(path).hu, HU[2:3])


def test_the_sform_counts_and_a_different_qform_is_told(tmp_path):
    image = nib.Nifti1Image(HU.transpose(2, 1, 0), affine_of(origins()))
    other = affine_of(origins())
    other[0, 3] += 10
    image.set_sform(affine_of(origins()), 1)
    image.set_qform(other, 1)
    nib.save(image, tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert_same(volume)
    assert "up to 10 mm apart" in notes(volume)


def test_the_qform_counts_where_there_is_no_sform(tmp_path):
    image = nib.Nifti1Image(HU.transpose(2, 1, 0), None)
    image.set_qform(affine_of(origins()), 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert_same(volume)
    assert volume.source.notes == ()


def test_no_geometry_is_refused(tmp_path):
    path = save(tmp_path / "scan.nii", HU.transpose(2, 1, 0))
    rewrite(path, sform_code=0, qform_code=0)
    with pytest.raises(DataError, match="does not say where"):
        read_volume(path)
    with pytest.raises(DataError, match="identity"):
        read_volume(save(tmp_path / "identity.nii", HU.transpose(2, 1, 0), np.eye(4)))


@pytest.mark.parametrize("fields", [dict(srow_x=[np.nan] * 4), dict(srow_z=[0] * 4)])
def test_an_affine_that_no_scan_has_is_refused(tmp_path, fields):
    path = rewrite(save(tmp_path / "scan.nii", HU.transpose(2, 1, 0)), **fields)
    with pytest.raises(DataError, match="no geometry"):
        read_volume(path)


@pytest.mark.parametrize("offset", [1024, 32768])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_an_offset_is_found_and_told(tmp_path, offset, ending):
    values = (HU.astype(np.int32) + offset).astype(np.uint16)
    volume = read_volume(save(tmp_path / f"scan{ending}", values.transpose(2, 1, 0)))
    assert_same(volume)
    assert f"{offset} was subtracted" in notes(volume)


def test_an_offset_in_floats(tmp_path):
    path = save(tmp_path / "scan.nii", (HU.transpose(2, 1, 0) + 1024).astype(np.float32))
    assert_same(read_volume(path))


@pytest.mark.parametrize(
    "values",
    [
        HU // 8 + 128,  # grey values of a picture
        (HU + 1000) / 2000.0,  # normalised
        np.zeros_like(HU),
        HU * 0 + np.arange(9, dtype=np.int16) % 4,  # a label map
    ],
    ids=["grey", "normalised", "empty", "labels"],
)
def test_values_that_are_no_hu_are_refused(tmp_path, values):
    dtype = np.float32 if values.dtype.kind == "f" else np.int16
    with pytest.raises(DataError, match="no Hounsfield units"):
        read_volume(save(tmp_path / "scan.nii", values.transpose(2, 1, 0).astype(dtype)))


def test_unsigned_hu_beyond_int16_are_clipped_after_the_offset(tmp_path):
    values = (HU.astype(np.int32) + 1024).astype(np.uint16)
    values[0, 0, 0] = 60000
    volume = read_volume(save(tmp_path / "scan.nii", values.transpose(2, 1, 0)))
    assert volume.hu[0, 0, 0] == 32767 and "clipped" in notes(volume)
    np.testing.assert_array_equal(volume.hu.ravel()[1:], HU.ravel()[1:])


def test_voxels_that_are_no_number_are_air(tmp_path):
    values = HU.astype(np.float32)
    values[0, 0, 0] = np.nan
    values[0, 0, 1] = np.inf
    volume = read_volume(save(tmp_path / "scan.nii", values.transpose(2, 1, 0)))
    assert volume.hu[0, 0, :2].tolist() == [-1024, 32767]
    assert "no number" in notes(volume) and "clipped" in notes(volume)


def test_a_coronal_scan_is_told(tmp_path):
    affine = affine_of(origins(step=0.7), spacing=(5.0, 0.7))
    volume = read_volume(save(tmp_path / "scan.nii", HU.transpose(2, 1, 0), affine))
    np.testing.assert_array_equal(volume.hu, HU)
    assert "looks like a coronal" in notes(volume)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0, 100, 300, 400, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, ending, kept):
    path = save(tmp_path / f"scan{ending}", HU.transpose(2, 1, 0))
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(DataError, match=r"not copied whole|no NIfTI|damaged"):
        read_volume(path)


def test_a_gzip_with_a_wrong_checksum_is_refused(tmp_path):
    path = save(tmp_path / "scan.nii.gz", HU.transpose(2, 1, 0))
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged gzip"):
        read_volume(path)


def test_what_is_packed_is_told_from_its_bytes_not_its_name(tmp_path):
    plain = save(tmp_path / "scan.nii", HU.transpose(2, 1, 0)).read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    assert_same(read_volume(tmp_path / "plain.nii.gz"))
    assert_same(read_volume(tmp_path / "packed.nii"))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(dim=[3, 8000, 8000, 8000, 1, 1, 1, 1]), "not copied whole"),
        (dict(dim=[3, 30000, 10, 6, 1, 1, 1, 1]), "shape"),
        (dict(dim=[3, -9, 10, 6, 1, 1, 1, 1]), "shape"),
        (dict(dim=[9, 9, 10, 6, 1, 1, 1, 1]), "shape"),
        (dict(dim=[1, 9, 10, 6, 1, 1, 1, 1]), "shape"),
        (dict(datatype=128), "type 128"),
        (dict(datatype=32), "type 32"),
        (dict(datatype=1234), "type 1234"),
        (dict(vox_offset=-5), "vox_offset"),
        (dict(vox_offset=np.nan), "vox_offset"),
        (dict(vox_offset=1e9), "not copied whole"),
        (dict(magic=b"ni1"), "half of a pair"),
    ],
)
def test_damaged_headers_are_refused_and_take_no_memory(tmp_path, fields, message):
    path = rewrite(save(tmp_path / "scan.nii", HU.transpose(2, 1, 0)), **fields)
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        read_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_memory_is_that_of_the_volume_and_a_slab(tmp_path, monkeypatch):
    """Of floats of 64 bits, packed: four times the volume if they were held."""
    monkeypatch.setattr(nifti_in, "LARGEST_SLAB", 1 << 18)
    hu = np.tile(HU, (10, 10, 10))[:, :96, :88]
    path = save(tmp_path / "scan.nii.gz", hu.transpose(2, 1, 0).astype(np.float64))
    read_volume(path)
    tracemalloc.start()
    volume = read_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(volume.hu, hu)
    assert peak < hu.nbytes + 3e6 < hu.size * 8


def test_the_list_has_one_entry(tmp_path):
    path = nifti(tmp_path / "scan.nii.gz", axes=(2, 0, 1))
    (entry,) = list_series(path)
    assert entry.size == (6, 10, 9) and entry.interval_mm == pytest.approx(2)
    assert_same(read_volume(path, entry.id))
    with pytest.raises(DataError, match="no series '7'"):
        read_volume(path, "7")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MissingDataError, match="not there"):
        read_volume(tmp_path / "scan.nii.gz")
