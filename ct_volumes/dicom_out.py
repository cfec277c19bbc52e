"""What DICOM SEG (seg_out.py) and SR (sr_out.py) share: the headers of the images that they refer
to, made fit for highdicom; who found the lesions; the way from the volume's pixels to an image's.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from pydicom.charset import python_encoding
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, generate_uid
from pydicom.valuerep import DA, TM

from ct_volumes.dicom_in import read_header
from ct_volumes.lesions import Algorithm
from ct_volumes.volume import CTVolume
from deeplesion.errors import DataError
from deeplesion.files import write_whole

LESION = codes.SCT.Lesion
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
MANUFACTURER = "deeplesion-mmdet"
DESCRIPTION = "Lesions (research, not a medical device)"
OTHER_FILES = " The other files (JSON, NIfTI, the page) can be had"
LATIN_1, UTF_8 = "ISO_IR 100", "ISO_IR 192"
SEG_SERIES, SR_SERIES = 9001, 9002  # numbers that no scanner gives

# What highdicom copies and does not find in every file; all may be empty (type 2).
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def new_object(series: int, algorithm: Algorithm) -> dict:
    """What highdicom's constructors are told of a new object, in a series of its own, and of what
    made it."""
    return dict(
        series_instance_uid=highdicom.UID(),
        series_number=series,
        series_description=DESCRIPTION,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=short_text(algorithm.name),
        software_versions=short_text(algorithm.version),
        device_serial_number=short_text(algorithm.checkpoint_sha256),
    )


def source_headers(
    volume: CTVolume, slices: Sequence[int]
) -> tuple[list[Dataset], str | list[str]]:
    """The headers of slices, one of each file, without pixels, as highdicom can read them, and the
    character set in which to write what is made of them.

    What is missing and may be empty becomes empty; what is no date, time or sex too. A missing
    frame of reference becomes one made from the UID of the series, the same in every file written.

    Raises:
        DataError: a volume that is not DICOM, or whose files name no study, no series or no
            instance of their own: nothing can refer to them.
    """
    if volume.source.format != "dicom":
        raise DataError(
            f"{volume.source.path} is not DICOM: SEG and SR refer to DICOM images. Lesions of a"
            " NIfTI scan go to the NIfTI label map"
        )
    headers: dict[str, Dataset] = {}
    files = {}
    for index in slices:
        instance = volume.source.instances[index]
        file = instance.path, instance.member
        if not instance.uid or files.setdefault(instance.uid, file) != file:
            raise DataError(
                f"{instance.member or instance.path} has no SOPInstanceUID of its own: no SEG and"
                f" no SR can refer to it.{OTHER_FILES}"
            )
        if instance.uid not in headers:
            headers[instance.uid] = _made_fit(read_header(instance), volume, index)
    found = list(headers.values())
    return found, _character_set(found)


@contextlib.contextmanager
def refusals_explained(volume: CTVolume) -> Iterator[None]:
    """What highdicom does not take of a source's header becomes a DataError that says so."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        reason = str(error).rstrip(".")
        raise DataError(
            f"no SEG or SR can be made of the headers of {volume.source.path}: {reason}."
            f"{OTHER_FILES}"
        ) from error


def is_multiframe(volume: CTVolume) -> bool:
    return volume.source.instances[0].frame is not None


def plane_in_source(volume: CTVolume, plane: np.ndarray) -> np.ndarray:
    """An (H, W) array of one slice of the volume -> (rows, columns) of the image, a view."""
    _, flip_rows, flip_columns = volume.source.flipped
    plane = plane[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return plane.T if volume.source.axes[1] > volume.source.axes[2] else plane


def image_points(volume: CTVolume, points: np.ndarray, index: int) -> np.ndarray:
    """(n, 2) x, y of the volume's pixel centres -> (n, 2) column, row as SCOORD counts them.

    SCOORD counts from the corner of the first pixel, whose centre is at 0.5 (PS3.3, C.18.6), and
    must lie within the image; a RECIST end point at the border may reach half a pixel beyond.
    """
    points = volume.points_in_source(points[:, 0], points[:, 1], index)[:, :0:-1] + 0.5
    return np.clip(points, 0, volume.source.shape[:0:-1])


def algorithm_parameters(algorithm: Algorithm) -> dict[str, str]:
    """What stands beside the algorithm's name and version: the checkpoint's hash, the options."""
    options = {name: json.dumps(value) for name, value in algorithm.options.items()}
    return {"checkpoint_sha256": algorithm.checkpoint_sha256, **options}


def short_text(text: str) -> str:
    """A name of ours that fits DICOM's shorter fields and every character set."""
    return text.encode("ascii", "replace").decode()[:64]


def save(path: Path, dataset: Dataset, character_set: str | list[str]) -> None:
    """Writes a DICOM file, as a whole or not at all."""
    dataset.SpecificCharacterSet = character_set
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Values of the source that break a rule of DICOM are passed on as they are.
        warnings.simplefilter("ignore", UserWarning)
        pydicom.dcmwrite(content, dataset, enforce_file_format=True)
    write_whole(Path(path), content.getvalue())


def _made_fit(header: Dataset, volume: CTVolume, index: int) -> Dataset:
    source = volume.source
    for name in ("StudyInstanceUID", "SeriesInstanceUID"):
        if not header.get(name):
            raise DataError(
                f"{source.instances[index].path} has no {name}: no SEG and no SR can refer to it."
                f"{OTHER_FILES}"
            )
    header.SOPInstanceUID = source.instances[index].uid
    if not header.get("SOPClassUID"):
        header.SOPClassUID = EnhancedCTImageStorage if is_multiframe(volume) else CTImageStorage
    if source.frame_of_reference_uid:  # one for all, where slices name several
        header.FrameOfReferenceUID = source.frame_of_reference_uid
    if not header.get("FrameOfReferenceUID"):
        header.FrameOfReferenceUID = generate_uid(entropy_srcs=[header.SeriesInstanceUID])
    if not header.get("Modality"):
        header.Modality = "CT"
    if not header.get("SliceThickness"):
        header.SliceThickness = source.slice_thickness_mm or float(volume.extent_mm[index])
    for name in _MAY_BE_EMPTY:
        if header.get(name) is None:
            setattr(header, name, "")
    for name, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        if not _is_a(kind, header.get(name)):
            setattr(header, name, "")
    if header.get("PatientIdentityRemoved") == "YES" and not (
        header.get("DeidentificationMethod") or header.get("DeidentificationMethodCodeSequence")
    ):
        header.DeidentificationMethod = "Not stated by the source"  # required beside it
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""
    return header


def _character_set(headers: list[Dataset]) -> str | list[str]:
    """That of the headers, so that the bytes of names stay; highdicom, which does not know all of
    them, is told UTF-8 and sees decoded text.

    A file that names none has ASCII or, against the rules, mostly Latin-1, as pydicom reads it. Of
    names that do not exist nothing can be kept: UTF-8.
    """
    named = headers[0].get("SpecificCharacterSet") or LATIN_1
    known = all(each in python_encoding for each in ([named] if isinstance(named, str) else named))
    for header in headers:
        header.decode()  # by its own character set
        for name in ("PatientName", "ReferringPhysicianName"):
            if not known:  # a name keeps its bytes otherwise
                setattr(header, name, str(header[name].value))
        header.SpecificCharacterSet = UTF_8
    return named if known else UTF_8


def _is_a(kind: type, value: object) -> bool:
    try:
        kind(str(value))
    except (ValueError, TypeError):
        return False
    return True
