"""What the header of a DICOM file says about each image in it: where it lies, how its stored values
become Hounsfield units, and why it is no slice of a CT volume, if it is none."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    MediaStorageDirectoryStorage,
)

from ct_volumes.dicom_files import Place, parse
from ct_volumes.dicom_values import (
    FrameValues,
    integer,
    items,
    number,
    numbers,
    text,
    value_of,
    without_patient,
)
from ct_volumes.volume import MOST_OBLIQUE
from deeplesion.conventions import LARGEST_SIDE
from deeplesion.errors import DataError

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "enhanced CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "legacy converted enhanced CT",
}
MOST_FRAMES = 65_536

# How well an image serves. The best of a scan are the candidates.
ORIGINAL, DERIVED, ON_REQUEST, NEVER = range(4)

PROJECTIONS = {"MIP", "MINIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE", "VRT", "SSD", "VOLREND"}
MAPS = {"PERFUSION", "RCBF", "RCBV", "CBF", "CBV", "MTT", "RMTT", "TTP", "SUBTRACTION"}
LOCALISERS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"}

# Those of the decoders that are not NumPy alone.
COMPRESSED = {*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes}
LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)

# By these, in this order, images at the same place are told apart.
TIMES = (
    "TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase",
    "NominalPercentageOfRespiratoryPhase", "AcquisitionNumber", "FrameAcquisitionNumber",
    "AcquisitionDateTime", "FrameAcquisitionDateTime", "AcquisitionTime", "ContentTime",
)  # fmt: skip
_KEYWORDS = (
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality",
    "SeriesDescription", "PatientName", "PatientID", "ConvolutionKernel", "SliceThickness",
    "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "PixelSpacing",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope", "RescaleType",
    "ModalityLUTSequence", "LossyImageCompression", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", *TIMES,
)  # fmt: skip
TAGS = [int(pydicom.tag.Tag(keyword)) for keyword in dict.fromkeys(_KEYWORDS)]
TAGS += [0x60000102 + (0x20000 * i) for i in range(16)]  # OverlayBitPosition
_GROUPS = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
    "PixelValueTransformationSequence", "FrameContentSequence", "CTImageFrameTypeSequence",
    "CTReconstructionSequence", "TemporalPositionSequence", "CardiacSynchronizationSequence",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of a DICOM file; numbers that the header lacks, or that are none, are None.

    Attributes:
        place, frame: the file, and counted from 0 which of its frames, None of a single image.
        study, series, uid, frame_of_reference: UIDs, '' where missing.
        position, row, column: (3,) of pixel (0, 0), along increasing columns, along increasing
            rows (LPS, mm); unit vectors at right angles.
        spacing: (between rows, between columns) in mm.
        padding: the lowest and the highest stored value of pixels without a measurement.
        compressed: by JPEG of any kind.
        overlay: whether bits of the stored values hold an overlay.
        times: what may tell images at one place apart, by keyword.
        quality, reason: ORIGINAL ... NEVER, and why it is not ORIGINAL.
    """

    place: Place
    frame: int | None
    study: str
    series: str
    uid: str
    frame_of_reference: str
    number: int | None
    instance_number: int | None
    description: str
    kernel: str
    rows: int
    columns: int
    position: np.ndarray | None
    row: np.ndarray | None
    column: np.ndarray | None
    spacing: tuple[float, float] | None
    thickness: float | None
    slope: float
    intercept: float | None
    padding: tuple[int, int] | None
    bits: int
    signed: bool
    overlay: bool
    lossy: bool
    compressed: bool
    inverted: bool
    times: dict[str, str]
    quality: int
    reason: str | None


def frames_of(file: BinaryIO, place: Place) -> list[Frame] | None:
    """The images of an open file that looks like DICOM; None if it is none after all, or a
    DICOMDIR.

    A file without an image (a dose report) gives one `Frame` that says so. Raises
    DataError if it is damaged.
    """
    header = parse(file, place, TAGS)
    with warnings.catch_warnings():  # pydicom complains of values when they are asked for
        warnings.simplefilter("ignore")
        if text(header.file_meta, "MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None
        if any(k in header for k in ("SOPClassUID", "SOPInstanceUID", "Modality", "Rows")):
            return _frames(header, place, _pixel_bytes(file, header))
    if not header.preamble:
        return None
    raise DataError(f"{place} begins like a DICOM file but holds nothing. Copy it again")


def _pixel_bytes(file: BinaryIO, header: Dataset) -> int | None:
    """How many bytes follow the header, where the pixels begin; None if it is not known."""
    if text(header.file_meta, "TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return None
    return max(file.size - file.tell(), 0)


def _frames(header: Dataset, place: Place, pixel_bytes: int | None) -> list[Frame]:
    if "PerFrameFunctionalGroupsSequence" not in header:
        return [_frame(header, {}, place, None, pixel_bytes)]
    shared = _functional_groups(items(header, "SharedFunctionalGroupsSequence")[:1])
    described = items(header, "PerFrameFunctionalGroupsSequence")
    count = integer(header, "NumberOfFrames") or 1
    if count != len(described) or count > MOST_FRAMES:
        raise DataError(
            f"{place} says that it holds {count} frames and describes {len(described)}. Copy it"
            " again"
        )
    return [
        _frame(header, {**shared, **_functional_groups([item])}, place, i, pixel_bytes)
        for i, item in enumerate(described)
    ]


def _functional_groups(described: list[Dataset]) -> dict[str, Any]:
    """What the groups of a frame say, by keyword."""
    values = {}
    for item in described:
        for name in _GROUPS:
            for group in items(item, name)[:1]:
                for tag in [*group.keys()]:
                    values[pydicom.datadict.keyword_for_tag(tag)] = value_of(group, tag)
    return values


def _frame(
    header: Dataset, groups: dict[str, Any], place: Place, index: int | None, pixels: int | None
) -> Frame:
    values = FrameValues(header, groups)
    image_type = text(values, "FrameType") or text(values, "ImageType")
    orientation = _directions(numbers(values, "ImageOrientationPatient", 6))
    row, column = (None, None) if orientation is None else orientation
    spacing = numbers(values, "PixelSpacing", 2)
    if spacing is not None and not ((spacing > 1e-3) & (spacing < 1e3)).all():
        spacing = None
    position = numbers(values, "ImagePositionPatient", 3)
    slope = number(values, "RescaleSlope")
    thickness = number(values, "SliceThickness")
    allocated = _bits(header, "BitsAllocated", 16)
    bits = _bits(header, "BitsStored", allocated)
    signed = integer(header, "PixelRepresentation") == 1
    syntax = text(header.file_meta, "TransferSyntaxUID")
    lossy = text(header, "LossyImageCompression") == "01" or syntax in LOSSY
    rows, columns = (integer(header, k) or 0 for k in ("Rows", "Columns"))
    quality, reason = _quality(values, image_type.upper().split("\\"), index, pixels)
    if reason is None or quality < NEVER:
        wrong = _geometry(rows, columns, position, row, column, spacing)
        if wrong:
            quality, reason = NEVER, wrong
    return Frame(
        place=place,
        frame=index,
        study=text(header, "StudyInstanceUID"),
        series=text(header, "SeriesInstanceUID"),
        uid=text(header, "SOPInstanceUID"),
        frame_of_reference=text(header, "FrameOfReferenceUID"),
        number=integer(header, "SeriesNumber"),
        instance_number=integer(header, "InstanceNumber"),
        description=without_patient(text(header, "SeriesDescription"), header),
        kernel=without_patient(text(values, "ConvolutionKernel"), header),
        rows=rows,
        columns=columns,
        position=position,
        row=row,
        column=column,
        spacing=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        thickness=thickness if thickness is not None and 0 < thickness < 1e3 else None,
        slope=slope or 1.0,
        intercept=number(values, "RescaleIntercept"),
        padding=_padding(header, bits, allocated, signed),
        bits=bits,
        signed=signed,
        overlay=any(integer(header, tag) for tag in TAGS[-16:]),
        lossy=lossy,
        compressed=syntax in COMPRESSED,
        inverted=text(header, "PhotometricInterpretation") == "MONOCHROME1",
        times={k: text(values, k) for k in TIMES if text(values, k)},
        quality=quality,
        reason=reason,
    )


def _directions(orientation: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
    """ImageOrientationPatient -> unit vectors at right angles, None if it holds none.

    Headers hold few digits; what is off by more than that is no orientation.
    """
    if orientation is None:
        return None
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not all(0.99 < length < 1.01 for length in lengths):
        return None
    row, column = row / lengths[0], column / lengths[1]
    if abs(row @ column) > 0.01:
        return None
    column = column - (row @ column) * row
    return row, column / np.linalg.norm(column)


def _padding(header: Dataset, bits: int, allocated: int, signed: bool) -> tuple[int, int] | None:
    """PixelPaddingValue and PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2), in either order.

    They are stored values; many files write them with the sign that the pixels do not have.
    """
    ends = [integer(header, "PixelPaddingValue"), integer(header, "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    stored = [_as_stored(end, bits, allocated, signed) for end in ends if end is not None]
    return min(stored), max(stored)


def _bits(header: Dataset, keyword: str, default: int) -> int:
    bits = integer(header, keyword)
    return bits if bits is not None and 1 <= bits <= 64 else default


def _as_stored(value: int, bits: int, allocated: int, signed: bool) -> int:
    half = 1 << (bits - 1)
    if (-half <= value < half) if signed else (0 <= value < 2 * half):
        return value
    value %= 1 << allocated
    if not signed:
        return value
    if half <= value < 2 * half:  # bits of a number with a sign, written as one without
        return value - 2 * half
    return value - (1 << allocated) if value >= 1 << (allocated - 1) else value


def _quality(
    values: FrameValues, image_type: list[str], index: int | None, pixels: int | None
) -> tuple[int, str | None]:
    """How well an image serves by what its header says it is, and why it is not ORIGINAL."""
    header = values.header
    sop_class, modality = text(header, "SOPClassUID"), text(header, "Modality")
    if sop_class and sop_class not in CT_CLASSES:
        name = pydicom.uid.UID(sop_class).name
        if "SR" in name.split() or "Dose" in name:
            return NEVER, f"no image: a report ({name})"
        if "Secondary Capture" in name:
            return NEVER, "secondary capture: a picture of a screen, not the measured values"
        return NEVER, f"no CT image ({name})"
    if modality not in ("", "CT") or not (sop_class or modality):
        return NEVER, f"no CT image (modality {modality or 'not stated'})"
    if LOCALISERS & set(image_type):
        return NEVER, "localiser (" + "\\".join(image_type) + ")"
    if MAPS & set(image_type):
        return NEVER, "computed from several images (" + "\\".join(image_type) + ")"
    if (integer(header, "SamplesPerPixel") or 1) != 1:
        return NEVER, "colour image"
    if index is None and (integer(header, "NumberOfFrames") or 1) > 1:
        return NEVER, "several frames without positions of their own"
    if items(header, "ModalityLUTSequence"):
        return NEVER, "values through a look-up table, not by slope and intercept"
    kind = text(values, "RescaleType").upper()
    if kind not in ("", "HU", "US", "HU_MOD"):
        return NEVER, f"values in {kind}, not in Hounsfield units"
    if "DISTORTED" in text(values, "VolumetricProperties").upper():
        return NEVER, "a curved reformation"
    if pixels is not None and pixels < 8:
        return NEVER, "without pixels"
    if PROJECTIONS & set(image_type):
        return ON_REQUEST, "projection (" + "\\".join(image_type) + ")"
    if image_type[0].strip() == "DERIVED":
        return DERIVED, "derived (" + "\\".join(image_type) + ")"
    return ORIGINAL, None


def _geometry(rows, columns, position, row, column, spacing) -> str | None:
    """Why a CT image cannot be placed among axial slices."""
    if not (0 < rows <= LARGEST_SIDE and 0 < columns <= LARGEST_SIDE):
        return f"{rows} x {columns} pixels: the size is missing, or no CT's"
    if position is None:
        return "no ImagePositionPatient"
    if np.abs(position).max() > 1e5:
        return "ImagePositionPatient is more than 100 m away"
    if row is None:
        return "no ImageOrientationPatient, or one that is no pair of directions at right angles"
    if spacing is None:
        return "no PixelSpacing, or none that a CT has"
    normal = np.abs(np.cross(row, column))
    angle = math.degrees(math.acos(min(normal[2], 1.0)))
    if angle <= MOST_OBLIQUE:
        return None
    for axis, name in ((1, "coronal"), (0, "sagittal")):
        if math.degrees(math.acos(min(normal[axis], 1.0))) <= MOST_OBLIQUE:
            return f"{name}: detectors of axial slices cannot read it"
    return f"oblique by {angle:.0f} degrees (axial slices are tilted by up to {MOST_OBLIQUE:.0f})"
