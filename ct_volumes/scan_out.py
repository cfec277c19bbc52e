"""A CT volume as a scanner or a data set would hand it over: a DICOM series, a NIfTI file.

Phantoms leave by it, and CT that is at hand as arrays (DeepLesion's own PNG slices, for one).
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ct_volumes.volume import CTVolume
from deeplesion.errors import UserError
from deeplesion.files import explained, write_whole

# Under it the UUIDs are made from which UIDs are derived (DICOM PS3.5, B.2).
NAMESPACE = uuid.UUID("a3a1d2a8-2a33-4d17-9f0e-2c53a6f1b4e9")
EVEN_MM = 0.01  # slices this close to a straight, even row of them count as one
WINDOW = (40, 400)  # centre and width that viewers open with, HU


def write_dicom_series(
    volume: CTVolume,
    folder: str | Path,
    *,
    patient_name: str = "",
    patient_id: str = "",
    description: str = "",
    kernel: str = "",
    series_number: int = 1,
    thickness_mm: float | None = None,
    seed: int | str = 0,
) -> None:
    """Writes a volume as a series of CT Image Storage (PS3.3, A.3), one uncompressed file a slice.

    HU are stored as they are: signed 16 bits, slope 1, intercept 0. ImagePositionPatient holds each
    slice's own origin, so tilt and uneven spacing are kept. Files are numbered head to feet.

    Args:
        folder: new or empty; it is there with all files, or not at all.
        patient_name: as DICOM writes names, such as 'Doe^Jane'.
        kernel: ConvolutionKernel.
        thickness_mm: SliceThickness; by default what the volume's source said, else the median
            distance of slices.
        seed: UIDs come from it, patient_id and the volume, so equal calls write equal files. Two
            volumes of one seed and patient_id are two series of one study and, unless their sources
            say another, one frame of reference.

    Raises:
        FileExistsError: `folder` holds something.
        UserError: a text that DICOM cannot hold.
        WriteError: the system refuses.
    """
    import pydicom

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: give a new folder for the DICOM series")
    for name, text in (("description", description), ("kernel", kernel), ("patient_id", patient_id),
                       ("patient_name", patient_name)):  # fmt: skip
        limit = 16 if name == "kernel" else 64
        if len(text) > limit or "\\" in text or not text.isprintable():
            raise UserError(
                f"{name} is {text!r}: DICOM takes at most {limit} printable characters there and no"
                " backslash"
            )
    common = _common(volume, patient_name, patient_id, description, kernel, series_number, seed)
    if thickness_mm is None:
        thickness_mm = volume.source.slice_thickness_mm
    steps = np.diff(volume.positions_mm)
    if thickness_mm is None and len(steps):
        thickness_mm = float(np.median(steps))
    common.SliceThickness = None if thickness_mm is None else _decimal(thickness_mm)
    if len(steps) and np.ptp(steps) <= EVEN_MM:
        common.SpacingBetweenSlices = _decimal(steps.mean())

    # Beside `folder`, and renamed when all files are there: half a series looks like a whole one.
    unfinished = folder.with_name(folder.name + ".part")
    with explained(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        for number, (hu, origin) in enumerate(zip(volume.hu, volume.origins_mm), 1):
            dataset = pydicom.Dataset(common)
            dataset.SOPInstanceUID = _uid(common.SeriesInstanceUID, number)
            dataset.InstanceNumber = number
            dataset.ImagePositionPatient = [_decimal(v) for v in origin]
            dataset.PixelData = hu.astype("<i2").tobytes()
            dataset["PixelData"].VR = "OW"
            dataset.file_meta = _file_meta(dataset)
            write_whole(unfinished / f"{number:04d}.dcm", _saved(dataset))
        unfinished.replace(folder)


def write_nifti_scan(volume: CTVolume, path: str | Path) -> None:
    """Writes a volume as NIfTI: int16 HU, `.nii.gz` or `.nii`.

    Axes i, j, k are x, y and the slice, so `array[x, y, z]` is the voxel that boxes and lesions
    mean; sform and qform lead to the mm of the volume (in RAS, as NIfTI has it).

    Raises:
        UserError: unevenly spaced slices, a tilted gantry: NIfTI has one affine for all slices; a
            name that does not end in .nii or .nii.gz.
        WriteError: the system refuses.
    """
    _write_nifti(volume.hu, volume, Path(path))


def write_nifti_labels(labels: np.ndarray, volume: CTVolume, path: str | Path) -> None:
    """The same of a label map (S, H, W) of unsigned integers on the volume's grid."""
    if labels.shape != volume.hu.shape or labels.dtype.kind != "u":
        raise ValueError(
            f"labels must be unsigned integers of shape {volume.hu.shape}, got"
            f" {labels.dtype} {labels.shape}"
        )
    _write_nifti(labels, volume, Path(path))


def _common(
    volume: CTVolume,
    patient_name: str,
    patient_id: str,
    description: str,
    kernel: str,
    series_number: int,
    seed: int | str,
) -> Any:
    """The attributes that all files of the series share; what nobody knows is empty."""
    import pydicom
    from pydicom.uid import CTImageStorage

    digest = hashlib.sha256()
    for array in (volume.hu, volume.origins_mm):
        digest.update(np.ascontiguousarray(array))
    of_volume = (digest.hexdigest(), description, kernel, series_number)
    ds = pydicom.Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.Modality = "CT"
    ds.Manufacturer = ""
    ds.SeriesDescription = description
    ds.PatientName, ds.PatientID = patient_name, patient_id
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.KVP = None
    ds.ConvolutionKernel = kernel or None
    ds.PatientPosition = "HFS"
    ds.Laterality = ""
    ds.StudyInstanceUID = _uid(seed, patient_id, "study")
    ds.SeriesInstanceUID = _uid(seed, patient_id, "series", *of_volume)
    ds.StudyID = "1"
    ds.SeriesNumber = series_number
    ds.AcquisitionNumber = 1
    ds.ImageOrientationPatient = [
        _decimal(v) for v in (*volume.row_direction, *volume.column_direction)
    ]
    frame = volume.source.frame_of_reference_uid
    ds.FrameOfReferenceUID = frame or _uid(seed, patient_id, "frame of reference")
    ds.PositionReferenceIndicator = ""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = volume.hu.shape[1:]
    ds.PixelSpacing = [_decimal(v) for v in volume.spacing_mm]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.WindowCenter, ds.WindowWidth = WINDOW
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "HU"
    return ds


def _file_meta(dataset: Any) -> Any:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return meta


def _saved(dataset: Any) -> Callable[[BinaryIO], None]:
    return lambda file: dataset.save_as(file, enforce_file_format=True)


def _uid(*of: object) -> str:
    """A UID that follows from its arguments: that of a name-based UUID (PS3.5, B.2)."""
    return f"2.25.{uuid.uuid5(NAMESPACE, repr(of)).int}"


def _decimal(value: float) -> Any:
    """A number as a decimal string (DS), whose 16 characters hold it as closely as they can."""
    from pydicom.valuerep import DSfloat

    return DSfloat(float(value), auto_format=True)


def _write_nifti(array: np.ndarray, volume: CTVolume, path: Path) -> None:
    import nibabel

    if not path.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: the name of a NIfTI file ends in .nii.gz or .nii")
    affine = _affine(volume, path)
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine, dtype=array.dtype)
    image.set_sform(affine, "scanner")
    image.set_qform(affine, "scanner")
    image.header.set_xyzt_units("mm")

    def write(file: BinaryIO) -> None:
        if path.name.endswith(".nii"):
            image.to_stream(file)
            return
        # No name and no time in it: equal scans are equal files.
        with gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
            image.to_stream(packed)

    write_whole(path, write)


def _affine(volume: CTVolume, path: Path) -> np.ndarray:
    """(4, 4) from x, y and the slice to mm in RAS."""
    origins, count = volume.origins_mm, len(volume.hu)
    if count > 1:
        step = volume.normal * (volume.positions_mm[-1] - volume.positions_mm[0]) / (count - 1)
    else:
        step = volume.normal * float(volume.extent_mm[0])
    off = np.linalg.norm(origins - origins[0] - np.arange(count)[:, None] * step, axis=1).max()
    if off > EVEN_MM:
        uneven = np.ptp(np.diff(volume.positions_mm)) > EVEN_MM
        raise UserError(
            f"{path}: NIfTI cannot hold this scan, whose"
            + (" slices are unevenly spaced" if uneven else " gantry was tilted")
            + f" ({off:.2f} mm off an even row of slices): write it as DICOM"
        )
    row, column = volume.spacing_mm
    affine = np.eye(4)
    affine[:3, :3] = np.stack(
        [volume.row_direction * column, volume.column_direction * row, step], axis=1
    )
    affine[:3, 3] = origins[0]
    affine[:2] *= -1  # LPS to RAS
    return affine
