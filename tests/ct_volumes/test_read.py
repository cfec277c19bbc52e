"""Folders, zips and DICOMDIRs; which of several series is read; the scans of a folder."""

import itertools
import os
import subprocess
import sys
import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset

from ct_volumes.dicom_choice import is_sharp
from ct_volumes.dicom_in import read_header
from ct_volumes.read import find_scans, list_series, read_volume
from deeplesion.errors import DataError, MissingDataError

from .scan_files import ROOT, anatomy, enhanced, nifti, origins, series, write

HU = anatomy()


def zipped(folder, path, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def other(number, slices=6, step=2.0, study="1", **tags):
    """A series of another number and UID."""
    return series(
        anatomy(slices, seed=number), origins(slices, step), SeriesNumber=number,
        SeriesInstanceUID=f"{ROOT}1.{number}", StudyInstanceUID=f"{ROOT}{study}", **tags,
    )  # fmt: skip


def test_a_nested_folder_with_files_that_are_no_dicom(tmp_path):
    images = series()
    write(tmp_path / "scan/DICOM/ST0/SE0", images[:3])
    write(tmp_path / "scan/DICOM/ST0/SE1", images[3:])
    (tmp_path / "scan/readme.txt").write_text("see the viewer")
    (tmp_path / "scan/.DS_Store").write_bytes(b"\0" * 300)
    (tmp_path / "scan/empty").touch()
    (tmp_path / "scan/DICOM/loop").symlink_to(tmp_path / "scan")
    (tmp_path / "scan/nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "scan/pipe")
    volume = read_volume(tmp_path / "scan")
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.source.notes == ()


def test_each_file_is_opened_once_for_its_header_and_once_for_its_pixels(tmp_path, monkeypatch):
    from ct_volumes.dicom_files import DicomFiles

    write(tmp_path / "scan", series() + other(7, 9, 1.0))
    opened = []
    once = DicomFiles.open
    monkeypatch.setattr(DicomFiles, "open", lambda s, p: opened.append(p) or once(s, p))
    volume = read_volume(tmp_path / "scan")
    counts = {place.path: opened.count(place) for place in opened}
    chosen = {instance.path for instance in volume.source.instances}
    assert len(counts) == 15
    assert all(count == 1 + (path in chosen) for path, count in counts.items())


def test_a_zip(tmp_path):
    path = zipped(write(tmp_path / "scan", series()), tmp_path / "scan.zip")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, HU)
    instance = volume.source.instances[0]
    assert (instance.path, instance.member) == (path, "IM0000")
    assert read_header(instance).SOPInstanceUID == instance.uid
    renamed = path.rename(tmp_path / "scan.bin")
    np.testing.assert_array_equal(read_volume(renamed).hu, HU)


def test_a_zip_of_an_enhanced_file(tmp_path):
    folder = write(tmp_path / "scan", [enhanced(order=[2, 1, 0, 3, 5, 4])])
    np.testing.assert_array_equal(read_volume(zipped(folder, tmp_path / "a.zip")).hu, HU)


def test_zips_that_cannot_be_read_are_refused(tmp_path):
    path = zipped(write(tmp_path / "scan", series()), tmp_path / "scan.zip")
    data = path.read_bytes()

    def refused(name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_volume(tmp_path / name)

    refused("short.zip", data[:-300], "damaged or was not copied whole")
    refused("text.zip", b"no zip at all", "damaged or was not copied whole")
    directory = data.index(b"PK\x01\x02")
    encrypted = bytearray(data)
    encrypted[directory + 8] |= 1
    refused("encrypted.zip", bytes(encrypted), "encrypted")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("scan.nii.gz", b"")
    with pytest.raises(DataError, match="no DICOM file"):
        read_volume(tmp_path / "other.zip")


def test_a_damaged_member_of_a_zip_is_missing_and_told(tmp_path):
    path = zipped(write(tmp_path / "scan", series()), tmp_path / "scan.zip")
    data = bytearray(path.read_bytes())
    start = data.index(b"IM0002") + len("IM0002")
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, np.delete(HU, 2, axis=0))
    assert "1 file that looked like DICOM and cannot be read" in " ".join(volume.source.notes)


def test_a_member_too_large_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("ct_volumes.dicom_files.LARGEST_MEMBER", 1000)
    path = zipped(write(tmp_path / "scan", series()), tmp_path / "scan.zip")
    with pytest.raises(DataError, match=r"IM0000 in it would have .* bytes"):
        read_volume(path)


def test_a_deflated_file_too_large_is_not_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr("ct_volumes.dicom_files.LARGEST_INFLATED", 500)
    images = series()
    for ds in images:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    with pytest.raises(DataError, match="more than 500 bytes"):
        read_volume(write(tmp_path / "scan", images))


def dicomdir(folder, files):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    meta.MediaStorageSOPInstanceUID = ROOT + "5"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    patient = Dataset()
    patient.DirectoryRecordType = "PATIENT"
    records = [patient]
    for file in files:
        record = Dataset()
        record.DirectoryRecordType = "IMAGE"
        record.ReferencedFileID = file.split("/")
        records.append(record)
    ds.DirectoryRecordSequence = records
    ds.save_as(folder / "DICOMDIR", enforce_file_format=True)
    return folder / "DICOMDIR"


def test_a_dicomdir_says_which_files(tmp_path):
    write(tmp_path / "CD/A", series(), "IM{}")
    write(tmp_path / "CD/B", other(9, 20, 1.0), "IM{}")
    path = dicomdir(tmp_path / "CD", [f"A/IM{i}" for i in range(6)])
    np.testing.assert_array_equal(read_volume(path).hu, HU)
    assert len(list_series(path)) == 1
    assert len(list_series(tmp_path / "CD")) == 2


def test_a_dicomdir_whose_files_are_missing_or_elsewhere(tmp_path):
    write(tmp_path / "CD/a", series(), "im{}")  # a copy in small letters
    path = dicomdir(tmp_path / "CD", [f"A/IM{i}" for i in range(8)])
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, HU)
    assert "2 files listed by the DICOMDIR and not there" in " ".join(volume.source.notes)
    with pytest.raises(MissingDataError, match="none of the 1 files"):
        read_volume(dicomdir(tmp_path / "CD", ["B/IM9"]))
    with pytest.raises(DataError, match="outside its folder"):
        read_volume(dicomdir(tmp_path / "CD", ["../IM9"]))


def test_one_file_of_a_series_is_one_slice(tmp_path):
    write(tmp_path / "scan", series())
    assert read_volume(tmp_path / "scan/IM0002").hu.shape[0] == 1


@pytest.mark.parametrize(
    "series_of, chosen",
    [
        # The thinnest.
        ([other(3, 6, 5.0), other(4, 26, 1.0)], 4),
        # But not of a sharp kernel,
        ([other(3, 6, 5.0), other(4, 26, 1.0, ConvolutionKernel="B70f")], 3),
        # and not a detail of the scan.
        ([other(3, 16, 5.0), other(4, 26, 1.0)], 3),
        # Of equally thin ones that with most slices, then the first.
        ([other(3, 9, 2.0), other(4, 10, 2.0)], 4),
        ([other(4, 9, 2.0), other(3, 9, 2.0)], 3),
        # An original one, whatever else.
        ([other(3, 6, 5.0), other(4, 30, 1.0, ImageType=["DERIVED", "PRIMARY", "MPR"])], 3),
        # A derived one where there is no other.
        ([other(3, 1), other(4, 30, 1.0, ImageType=["DERIVED", "PRIMARY", "MPR"])], 4),
        # Not a few slices.
        ([other(3, 6, 5.0), other(4, 4, 9.0)], 3),
    ],
)
def test_the_choice_of_a_series(tmp_path, series_of, chosen):
    volume = read_volume(write(tmp_path / "scan", itertools.chain(*series_of)))
    assert volume.source.number == chosen
    candidates = [e for e in list_series(tmp_path / "scan") if e.skipped is None]
    assert (len(candidates) > 1) == any("was chosen of" in n for n in volume.source.notes)


def test_a_series_is_named_by_number_or_uid(tmp_path):
    folder = write(tmp_path / "scan", other(3) + other(4, 9, 1.0))
    for name in ("3", 3, f"{ROOT}1.3"):
        volume = read_volume(folder, name)
        assert volume.source.number == 3
        np.testing.assert_array_equal(volume.hu, anatomy(seed=3))
        assert not any("chosen" in note for note in volume.source.notes)
    with pytest.raises(DataError, match=r"no series '5'.*\n  3: 6 images, Chest\n  4: 9 images"):
        read_volume(folder, "5")


def test_series_of_one_number_are_told_apart(tmp_path):
    second = other(3)
    for ds in second:
        ds.SeriesInstanceUID = ROOT + "1.33"
    folder = write(tmp_path / "scan", other(3) + second)
    assert [e.id for e in list_series(folder)] == ["3a", "3b"]
    with pytest.raises(DataError, match="several series '3'"):
        read_volume(folder, "3")
    assert read_volume(folder, "3b").source.series_uid == ROOT + "1.33"
    assert read_volume(folder, ROOT + "1.33").source.series_uid == ROOT + "1.33"


def test_what_is_left_out_by_itself_can_be_asked_for(tmp_path):
    mip = other(4, 8, 1.0, ImageType=["DERIVED", "SECONDARY", "MIP"])
    folder = write(tmp_path / "scan", other(3) + mip)
    assert read_volume(folder).source.number == 3
    volume = read_volume(folder, "4")
    assert volume.source.number == 4
    assert "asked for; by itself it is left out: projection" in " ".join(volume.source.notes)
    with pytest.raises(DataError, match="no axial CT"):
        read_volume(write(tmp_path / "mip", mip))


def test_several_studies_leave_open_what_is_meant(tmp_path):
    folder = write(tmp_path / "scan", other(3) + other(4, study="2"))
    with pytest.raises(DataError, match="several studies"):
        read_volume(folder)
    assert read_volume(folder, "4").source.number == 4


@pytest.mark.parametrize(
    "kernel, sharp",
    [
        ("B30f", False), ("B70f", True), ("Br40d\\3", False), ("Bl57d", True), ("I31f\\3", False),
        ("STANDARD", False), ("SOFT", False), ("LUNG", True), ("BONEPLUS", True), ("", False),
        ("FC08", False), ("FC51", True), ("B", False), ("L", True), ("YA", True), ("11", False),
    ],
)  # fmt: skip
def test_kernels_of_lung_and_bone_are_sharp(kernel, sharp):
    assert is_sharp(kernel) == sharp


def test_a_list_says_what_there_is(tmp_path):
    scout = other(1, 2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    folder = write(tmp_path / "scan", scout + other(2, 6, 1.25, SliceThickness=2.5))
    first, second = list_series(folder)
    assert first.skipped.startswith("localiser") and first.size == (2, 10, 9)
    assert second.skipped is None
    assert (second.id, second.uid, second.number) == ("2", f"{ROOT}1.2", 2)
    assert (second.description, second.kernel) == ("Chest", "B30f")
    assert second.size == (6, 10, 9)
    assert (second.interval_mm, second.slice_thickness_mm) == (1.25, 2.5)


def test_nothing_there_and_nothing_to_read(tmp_path):
    with pytest.raises(MissingDataError, match="is not there"):
        read_volume(tmp_path / "gone")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="no DICOM file"):
        read_volume(tmp_path / "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no DICOM file"):
        read_volume(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_volume(tmp_path / "pipe")


def test_a_folder_with_one_nifti_file_is_that_file(tmp_path):
    nifti(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path).hu, HU)
    nifti(tmp_path / "second.nii")
    with pytest.raises(DataError, match="2 NIfTI files"):
        read_volume(tmp_path)


def test_the_scans_of_a_folder(tmp_path):
    nifti(tmp_path / "a.nii.gz")
    nifti(tmp_path / "b.nii")
    zipped(write(tmp_path / "b", series()), tmp_path / "z.zip")
    write(tmp_path / "two/first", other(3, study="7"))
    write(tmp_path / "two/second", other(4, study="7"))
    write(tmp_path / "three/CT/early", other(5, study="8"))
    write(tmp_path / "three/CT/late", other(6, study="9"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("no scan")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    assert dict(find_scans(tmp_path)) == {
        "a": tmp_path / "a.nii.gz",
        "b": tmp_path / "b",
        "b.nii": tmp_path / "b.nii",
        "broken": tmp_path / "broken.zip",
        "three_CT_early": tmp_path / "three/CT/early",
        "three_CT_late": tmp_path / "three/CT/late",
        "two": tmp_path / "two",
        "z": tmp_path / "z.zip",
    }


def test_a_folder_of_one_study_is_one_scan(tmp_path):
    for number in (3, 4):
        write(tmp_path / f"study/S{number}", other(number))
    dicomdir(tmp_path / "study", ["S3/IM0000"])
    assert find_scans(tmp_path / "study") == [("study", tmp_path / "study")]
    flat = write(tmp_path / "flat", other(3) + other(4))
    assert find_scans(flat) == [("flat", flat)]
    assert find_scans(flat / "IM0000") == [("IM0000", flat / "IM0000")]


def test_studies_without_a_uid_stay_apart(tmp_path):
    for name in ("one", "two"):
        images = series()
        for ds in images:
            ds.StudyInstanceUID = ""
        write(tmp_path / name, images)
    assert [name for name, _ in find_scans(tmp_path)] == ["one", "two"]


def test_names_of_scans_are_unique(tmp_path):
    nifti(tmp_path / "a_b.nii")
    write(tmp_path / "a/b", other(3, study="1"))
    write(tmp_path / "A/c", other(4, study="2"))
    write(tmp_path / "a_b", other(5, study="3"))
    names = [name for name, _ in find_scans(tmp_path)]
    assert len({name.casefold() for name in names}) == len(names) == 4


def test_a_folder_without_a_scan(tmp_path):
    with pytest.raises(DataError, match="holds no scan"):
        find_scans(tmp_path)
    with pytest.raises(MissingDataError):
        find_scans(tmp_path / "gone")


def test_without_the_libraries_it_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules['pydicom'] = None
from ct_volumes.read import read_volume
try:
    read_volume(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("UserError") and "deeplesion-mmdet[ct]" in done.stdout
