"""DICOM -> CTVolume: the series of a folder, zip, DICOMDIR or file, and the slices of one of them
turned into DeepLesion's orientation."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from tqdm import tqdm

from ct_volumes.dicom_choice import choose
from ct_volumes.dicom_decode import Decoder, decoded, reason_of, with_defaults
from ct_volumes.dicom_files import Clamped, DicomFiles, Place, looks_like_dicom, parse
from ct_volumes.dicom_headers import Frame, frames_of
from ct_volumes.dicom_series import Series, count_of, geometry_notes, group
from ct_volumes.hounsfield import PADDING_HU, offset_of, room_for, to_hu
from ct_volumes.volume import CTVolume, Instance, Source
from deeplesion.errors import DataError

LARGEST_SLICE_FILE = 1 << 30  # bytes; a file of one image that is larger is no slice of a CT


class Kept(NamedTuple):
    """What happened to the pixels of an image: padding became air, values were clipped to int16,
    values had more bits than stated."""

    padded: bool = False
    clipped: bool = False
    wide: bool = False

    def __or__(self, other: Kept) -> Kept:
        return Kept(*(a or b for a, b in zip(self, other)))


def scan_series(path: Path) -> tuple[list[Series], list[str]]:
    """The series under `path`, each a volume or images left out for one reason; and what files are
    missing or cannot be read.

    Reads the header of every file once; pixels only of images that may be there twice. Files that
    are not DICOM are passed over. Raises DataError if there is no DICOM file at all.
    """
    with DicomFiles(path) as files, Decoder() as decoder:
        return _scan(files, decoder)


def _scan(files: DicomFiles, decoder: Decoder) -> tuple[list[Series], list[str]]:
    frames, unreadable, first = [], 0, None
    for place in tqdm(files.places, "headers", unit=" files", leave=False, delay=2, disable=None):
        try:
            with files.open(place) as file:
                found = frames_of(file, place) if looks_like_dicom(file) else None
        except DataError as error:
            unreadable, first = unreadable + 1, first or error
            continue
        frames += found or []
    if not frames:
        if first:
            raise first
        raise DataError(
            f"{files.path} holds no DICOM file. Expected a folder, a zip or a DICOMDIR of CT images"
        )

    def digest(frame: Frame) -> bytes:
        (hu, _), *_ = _decoded(files, decoder, [frame])
        return hashlib.sha256(hu.tobytes()).digest()

    series = group(frames, digest)
    # Notes leave the names of files out: they may hold the patient's.
    notes, lost = [], []
    if unreadable:
        notes.append(f"{count_of(unreadable, 'file')} that looked like DICOM and cannot be read")
        lost.append(f"{count_of(unreadable, 'file')} cannot be read: {first}")
    if files.missing:
        notes.append(f"{count_of(len(files.missing), 'file')} listed by the DICOMDIR and not there")
        lost.append(f"{count_of(len(files.missing), 'file')} not there: {files.missing[0]}")
    for each in series:
        each.notes += [f"{note}; slices of this series may be missing." for note in notes]
    return series, lost


def read_dicom(path: Path, wanted: str | None = None) -> CTVolume:
    """The volume of one series under `path`: the one `wanted` (an id, number or UID), or the one
    that `choose` takes. Raises DataError."""
    with DicomFiles(path) as files, Decoder() as decoder:
        series = choose(_scan(files, decoder)[0], wanted, str(path))
        return _volume(files, decoder, series)


def read_header(instance: Instance) -> pydicom.Dataset:
    """The whole header of the file of a slice, without pixels. Raises DataError."""
    with DicomFiles(instance.path) as files:
        place = Place(instance.path, instance.member)
        with files.open(place) as file:
            return parse(file, place)


def study_of(path: Path) -> str | None:
    """StudyInstanceUID of a file, '' where it states none; None if it is no DICOM file, is damaged,
    or is a DICOMDIR, which is of no study."""
    if path.name.upper() == "DICOMDIR":
        return None
    try:
        with path.open("rb") as plain:
            file = Clamped(plain)
            found = frames_of(file, Place(path)) if looks_like_dicom(file) else None
    except (DataError, OSError):
        return None
    return found[0].study if found else None


def _volume(files: DicomFiles, decoder: Decoder, series: Series) -> CTVolume:
    frames, first = series.frames, series.first
    # Which axis of an image runs to the patient's left, and which way.
    transposed = abs(first.row[0]) < abs(first.column[0])
    left, back = (first.column, first.row) if transposed else (first.row, first.column)
    flipped = (False, bool(back[1] < 0), bool(left[0] < 0))
    shape = (first.rows, first.columns)
    height, width = shape[::-1] if transposed else shape
    spacing = first.spacing[::-1] if transposed else first.spacing
    corner = flipped[1] * (height - 1) * spacing[0] * back
    corner = corner + flipped[2] * (width - 1) * spacing[1] * left
    signs = 1 - 2 * np.array(flipped)

    hu, kept = None, Kept()
    where = {(f.place, f.frame): i for i, f in enumerate(frames)}
    progress = tqdm(total=len(frames), desc="slices", leave=False, delay=2, disable=None)
    with progress:
        ordered = _file_order(frames)
        for frame, (image, what) in zip(ordered, _decoded(files, decoder, ordered)):
            if hu is None:  # after the first image is there: room is made for what exists
                hu = room_for((len(frames), height, width), files.path)
            image = image.T if transposed else image
            hu[where[frame.place, frame.frame]] = image[:: signs[1], :: signs[2]]
            kept |= what
            progress.update()

    notes = series.notes + geometry_notes(series) + _pixel_notes(frames, kept)
    if not any(f.intercept for f in frames):
        notes += _subtract_offset(hu, kept.padded, f"series {series.id} of {files.path}")
    source = Source(
        path=files.path,
        format="dicom",
        shape=(len(frames), *shape),
        axes=(0, 2, 1) if transposed else (0, 1, 2),
        flipped=flipped,
        instances=tuple(Instance(f.place.path, f.uid, f.place.member, f.frame) for f in frames),
        series_uid=first.series or None,
        frame_of_reference_uid=first.frame_of_reference or None,
        number=first.number,
        description=first.description,
        kernel=first.kernel,
        slice_thickness_mm=first.thickness,
        notes=tuple(dict.fromkeys(notes)),
    )
    try:
        return CTVolume(
            hu,
            np.stack([f.position for f in frames]) + corner,
            left * signs[2],
            back * signs[1],
            spacing,
            source,
        )
    except ValueError as error:
        raise DataError(f"series {series.id} of {files.path} is no axial volume: {error}") from None


def _subtract_offset(hu: np.ndarray, padded: bool, name: str) -> list[str]:
    """Makes HU of stored values whose header gives no intercept, in place; says so."""
    measured = hu != PADDING_HU if padded else slice(None)
    values = hu[measured]
    if not values.size or values.min() < 0:
        return []
    try:
        offset = offset_of(values)
        if offset > np.iinfo(np.int16).max:
            raise ValueError(f"the values go up to {values.max()}")
    except ValueError as error:
        raise DataError(
            f"{name} holds no Hounsfield units: {error}. Expected a RescaleIntercept in its headers"
        ) from None
    hu[measured] -= np.int16(offset)
    return [
        f"The header states no RescaleIntercept; {offset} was subtracted, which puts air and soft"
        " tissue where they belong."
    ]


def _file_order(frames: list[Frame]) -> list[Frame]:
    """Frames of one file next to each other, in its order: each file is parsed once."""
    order = {place: i for i, place in enumerate(dict.fromkeys(f.place for f in frames))}
    return sorted(frames, key=lambda f: (order[f.place], f.frame or 0))


def _decoded(
    files: DicomFiles, decoder: Decoder, frames: list[Frame]
) -> Iterator[tuple[np.ndarray, Kept]]:
    """The HU of each frame, (rows, columns) int16, and what had to be done to it.

    `frames` are in `_file_order`. Raises DataError for pixels that are missing, truncated or not
    to be decoded.
    """
    at = 0
    while at < len(frames):
        end = at + 1
        while end < len(frames) and frames[end].place == frames[at].place:
            end += 1
        for frame, image in zip(frames[at:end], _images(files, decoder, frames[at:end])):
            if image.shape != (frame.rows, frame.columns):
                raise DataError(
                    f"{frame.place} holds an image of {image.shape}, its header says"
                    f" ({frame.rows}, {frame.columns}). Copy it again"
                )
            yield _hu(image, frame)
        at = end


def _images(files: DicomFiles, decoder: Decoder, frames: list[Frame]) -> Iterator[np.ndarray]:
    """The stored values of frames of one file."""
    place, first = frames[0].place, frames[0]
    indices = [f.frame or 0 for f in frames]
    with files.open_seekable(place) as file:
        if first.frame is None and file.size > LARGEST_SLICE_FILE:
            raise DataError(f"{place} has {file.size:,} bytes: it is no slice of a CT")
        try:
            if first.compressed:
                yield from _decompressed(decoder, file, place, first.frame is None, indices)
            elif first.frame is None:
                yield from decoded(with_defaults(parse(file, place, pixels=True)), indices)
            else:
                yield from decoded(file, indices)
        except (DataError, OSError):
            raise
        except Exception as error:  # pydicom raises whatever is wrong
            raise DataError(
                f"the pixels of {place} cannot be decoded ({reason_of(error)}). Copy it again"
            ) from None


def _decompressed(
    decoder: Decoder, file: Clamped, place: Place, single: bool, indices: list[int]
) -> Iterator[np.ndarray]:
    """The decoder is given the content of a small file, and the path of one of many frames."""
    if single:
        yield from decoder.images(file.read(), indices)
    elif place.member is None:
        yield from decoder.images(place.path, indices)
    else:
        with tempfile.NamedTemporaryFile(suffix=".dcm") as unpacked:
            shutil.copyfileobj(file, unpacked, 1 << 20)
            unpacked.flush()
            yield from decoder.images(Path(unpacked.name), indices)


def _hu(image: np.ndarray, frame: Frame) -> tuple[np.ndarray, Kept]:
    stored, wide = _stored(image, frame)
    padding = None
    if frame.padding is not None:
        padding = (stored >= frame.padding[0]) & (stored <= frame.padding[1])
        padding = padding if padding.any() else None
    hu, clipped = to_hu(stored, frame.slope, frame.intercept or 0.0, padding)
    return hu, Kept(padding is not None, clipped, wide)


def _stored(image: np.ndarray, frame: Frame) -> tuple[np.ndarray, bool]:
    """Values of `bits` bits -> the same without an overlay above them and with their sign.

    Returns them and whether bits above are set that are neither: then the header is taken to be
    wrong about the number of bits, and they stay.
    """
    size = image.dtype.itemsize * 8
    if image.dtype.kind not in "iu" or frame.bits >= size:
        return image, False
    image = image.astype(image.dtype.newbyteorder("="), copy=False)  # of big-endian files as well
    plain = image.view(f"u{image.dtype.itemsize}")
    above = plain >> frame.bits
    if not frame.overlay and above.any():
        negative = (plain >> (frame.bits - 1)) & 1
        extended = frame.signed and (above == negative * ((1 << (size - frame.bits)) - 1)).all()
        return image, not extended
    kept = (plain & ((1 << frame.bits) - 1)).astype(np.int32)
    if frame.signed:
        half = 1 << (frame.bits - 1)
        kept = (kept ^ half) - half
    return kept, False


def _pixel_notes(frames: list[Frame], kept: Kept) -> list[str]:
    notes = []
    if any(f.lossy for f in frames):
        notes.append("The images were compressed with loss.")
    if any(f.inverted for f in frames):
        notes.append("MONOCHROME1 turns the display around, not the values: they stay.")
    if kept.padded and any(
        f.padding and f.padding[1] * f.slope + (f.intercept or 0) > -900 for f in frames
    ):
        notes.append(f"Pixels of PixelPaddingValue are taken as air ({PADDING_HU} HU).")
    if kept.clipped:
        notes.append("Values beyond those of int16 were clipped.")
    if kept.wide:
        notes.append("Stored values have more bits than BitsStored says; they stay as they are.")
    return notes
