"""Small CT scans as files of any kind, for the tests of the readers: DICOM series, enhanced DICOM
and NIfTI of one asymmetrical anatomy."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

SPACING = (0.75, 0.5)  # of rows, of columns: not square
NAME, PATIENT = "Doe^Jane", "PAT-4711"
ROOT = "1.2.826.0.1.3680043.10.999."


def anatomy(slices=6, rows=10, columns=9, seed=0) -> np.ndarray:
    """(S, H, W) int16 HU, head to feet, no two voxels alike by any turn: noise around a gradient,
    air beside soft tissue."""
    hu = np.random.default_rng(seed).integers(-120, 160, (slices, rows, columns))
    hu[:, : rows // 3] -= 900
    return (hu + np.arange(slices)[:, None, None] * 3).astype(np.int16)


def origins(slices=6, step=2.0, tilt=0.0) -> np.ndarray:
    """(S, 3) mm, of slices head to feet; each is shifted by `tilt` to posterior."""
    below = np.arange(slices)
    return np.stack([-20 + 0.0 * below, -30 + tilt * below, 100 - step * below], axis=1)


def image(hu, origin, row=(1, 0, 0), column=(0, 1, 0), spacing=SPACING, **tags) -> FileDataset:
    """A CT image of an (H, W) slice; `tags` are set last, by keyword, None takes one out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, pydicom.uid.generate_uid()
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality, ds.PatientName, ds.PatientID = "CT", NAME, PATIENT
    ds.PatientBirthDate, ds.PatientSex, ds.StudyID, ds.AccessionNumber = "", "", "", ""
    ds.StudyInstanceUID, ds.SeriesInstanceUID = ROOT + "1", ROOT + "1.2"
    ds.FrameOfReferenceUID = ROOT + "1.9"
    ds.SeriesNumber, ds.SeriesDescription, ds.ConvolutionKernel = 2, "Chest", "B30f"
    ds.SliceThickness = 2.0
    ds.ImagePositionPatient = [float(v) for v in origin]
    ds.ImageOrientationPatient = [float(v) for v in (*row, *column)]
    ds.PixelSpacing = [float(v) for v in spacing]
    ds.Rows, ds.Columns = hu.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = (np.asarray(hu, np.int32) + 1024).astype(np.uint16).tobytes()
    change(ds, tags)
    return ds


def change(ds: Dataset, tags: dict) -> None:
    for keyword, value in tags.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)


def turned(hu, origins, transposed=False, flip_rows=False, flip_columns=False):
    """(S, H, W) and origins in the volume's orientation -> the same with the images turned, as
    keyword arguments of `series`."""
    row, column = np.eye(3)[:2]
    spacing = SPACING
    height, width = hu.shape[1:]
    if flip_rows:
        hu, origins, column = hu[:, ::-1], origins + column * (height - 1) * SPACING[0], -column
    if flip_columns:
        hu, origins, row = hu[:, :, ::-1], origins + row * (width - 1) * SPACING[1], -row
    if transposed:
        hu, row, column, spacing = hu.transpose(0, 2, 1), column, row, SPACING[::-1]
    return dict(hu=hu, where=origins, row=row, column=column, spacing=spacing)


def series(hu=None, where=None, **tags) -> list[FileDataset]:
    """The images of a series, numbered from the head."""
    hu = anatomy() if hu is None else hu
    where = origins(len(hu)) if where is None else where
    return [image(h, o, **{"InstanceNumber": i, **tags}) for i, (h, o) in enumerate(zip(hu, where))]


def write(folder: Path, images, name="IM{:04d}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, ds in enumerate(images):
        ds.save_as(folder / name.format(i), enforce_file_format=ds.preamble is not None)
    return folder


def write_bare(path: Path, ds: FileDataset) -> None:
    """Without preamble and file meta information, in implicit little endian."""
    ds.file_meta, ds.preamble = FileMetaDataset(), None
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, implicit_vr=True, little_endian=True, enforce_file_format=False)


def enhanced(hu=None, where=None, order=None, **tags) -> FileDataset:
    """One multi-frame file; `order`: of the slices in it."""
    hu = anatomy() if hu is None else hu
    where = origins(len(hu)) if where is None else where
    order = range(len(hu)) if order is None else order
    ds = image(np.concatenate([hu[i] for i in order]), where[0])
    for keyword in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
        "RescaleSlope", "RescaleIntercept", "ConvolutionKernel", "ImageType",
    ):  # fmt: skip
        del ds[keyword]
    ds.SOPClassUID, ds.ImageType = EnhancedCTImageStorage, ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.NumberOfFrames, ds.Rows = len(hu), hu.shape[1]
    orientation = Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING), 2.0
    values = Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1024, "HU"
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence = [values]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for i in order:
        position = Dataset()
        position.ImagePositionPatient = [float(v) for v in where[i]]
        frame = Dataset()
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    change(ds, tags)
    return ds


def dicomdir(folder: Path, files: list[str]) -> Path:
    """A DICOMDIR in a folder that lists `files`, by their paths below it."""
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


def affine_of(where, spacing=SPACING) -> np.ndarray:
    """RAS affine of an array (column, row, slice) in the volume's orientation."""
    in_lps = np.eye(4)
    in_lps[:3, 0], in_lps[:3, 1] = [spacing[1], 0, 0], [0, spacing[0], 0]
    in_lps[:3, 2], in_lps[:3, 3] = where[1] - where[0], where[0]
    return np.diag([-1, -1, 1, 1]) @ in_lps


def nifti(path: Path, hu=None, where=None, axes=(0, 1, 2), flips=(1, 1, 1), dtype=np.int16) -> Path:
    """A NIfTI file of an (S, H, W) volume, whose axes (column, row, slice) are put into the order
    `axes`, those of `flips` -1 turned around."""
    hu = anatomy() if hu is None else hu
    where = origins(len(hu)) if where is None else where
    moved = nib.Nifti1Image(hu.transpose(2, 1, 0).astype(dtype), affine_of(where))
    moved = moved.as_reoriented(np.stack([axes, flips], axis=1))
    nib.save(moved, path)
    return path


def assert_same(volume, hu=None, where=None):
    """The anatomy, or these values, at its millimetres."""
    hu = anatomy() if hu is None else hu
    np.testing.assert_array_equal(volume.hu, hu)
    where = origins(len(hu)) if where is None else where
    index, y, x = np.indices(hu.shape)
    expected = where[index] + np.stack([x * SPACING[1], y * SPACING[0], 0 * x], axis=-1)
    np.testing.assert_allclose(volume.to_world(x, y, index), expected, atol=1e-4)


def notes(volume):
    return " ".join(volume.source.notes)
