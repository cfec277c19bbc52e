"""Where the DICOM files of a scan lie (a folder, a zip, what a DICOMDIR lists, one file), and
parsing one of them, so that a damaged header costs no more memory than the file is large."""

from __future__ import annotations

import os
import stat
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pydicom

from deeplesion.errors import DataError, MissingDataError

MOST_MEMBERS = 200_000  # of a zip: some thousand scans
LARGEST_MEMBER = 8 << 30  # bytes; a CT of 8,000 slices in one file has half of that
LARGEST_INFLATED = 1 << 30  # bytes of a file that is deflated as a whole, which is held in memory
IN_MEMORY = 64 << 20  # bytes; a larger member of a zip is unpacked to a temporary file
DEFLATED = b"1.2.840.10008.1.2.1.99"
# What a file without preamble may begin with: an element of group 2 or 8, little endian.
FIRST_ELEMENTS = {(2, 0), (2, 1), (2, 2), (2, 16), *((8, e) for e in (0, 1, 5, 6, 8, 18, 20, 22))}


class Place(NamedTuple):
    """A file: `path`, or the `member` of the zip `path`."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}" if self.member is None else f"{self.member} in {self.path}"


class DicomFiles:
    """The files under a path that may be DICOM, and opening them; a context manager.

    Attributes:
        places: every file of a folder and of the folders in it, every member of a zip, what a
            DICOMDIR lists, or the one file.
        missing: the paths that a DICOMDIR lists and that are not there.

    Raises MissingDataError if nothing is at `path`, DataError for a zip that cannot be read.
    """

    def __init__(self, path: Path):
        self.path, self.missing = path, []
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            self.places = [Place(file) for file in files_in(path)]
        elif not path.exists():
            raise MissingDataError(
                f"{path} is not there. Expected a DICOM folder, a zip of one, a DICOMDIR, a DICOM"
                " file, or a .nii or .nii.gz file"
            )
        elif not path.is_file():
            raise DataError(f"{path} is neither a file nor a folder")
        elif is_zip(path):
            self._zip, self.places = _open_zip(path)
        elif path.name.upper() == "DICOMDIR":
            listed = _listed(path)
            self.places = [Place(file) for file in listed if file.is_file()]
            self.missing = [file for file in listed if not file.is_file()]
        else:
            self.places = [Place(path)]

    def __enter__(self) -> DicomFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip:
            self._zip.close()

    @contextmanager
    def open(self, place: Place) -> Iterator[BinaryIO]:
        """An open file that can be read and sought in. Raises DataError."""
        try:
            if place.member is None:
                with place.path.open("rb") as file:
                    yield Clamped(file)
                return
            with self._zip.open(place.member) as file:
                yield Clamped(file, self._zip.getinfo(place.member).file_size)
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"cannot read {place}: {error.strerror or error}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise DataError(f"cannot unpack {place}: {error}. Copy or pack it again") from None

    @contextmanager
    def open_seekable(self, place: Place) -> Iterator[BinaryIO]:
        """As `open`, and seeking back costs nothing in a zip either: the member is unpacked."""
        with self.open(place) as file:
            if place.member is None:
                yield file
                return
            with tempfile.SpooledTemporaryFile(IN_MEMORY) as unpacked:
                while block := file.read(1 << 20):
                    unpacked.write(block)
                unpacked.seek(0)
                yield Clamped(unpacked)


class Clamped:
    """A file that is never asked for more bytes than it has: Python would make room for them."""

    def __init__(self, file: BinaryIO, size: int | None = None):
        self._file = file
        self.size = file.seek(0, os.SEEK_END) if size is None else size
        if size is None:
            file.seek(0)
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        left = max(self.size - self.tell(), 0)
        return self._file.read(left if count is None or count < 0 else min(count, left))


def files_in(folder: Path) -> Iterator[Path]:
    """Every plain file in a folder and the folders in it, in order of their names.

    Links are followed, each folder is entered once. Raises DataError if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from None

    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            try:
                if stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for a writer
                    yield path
            except OSError:  # a link to nowhere
                continue


def is_zip(path: Path) -> bool:
    """Whether a file says of itself, by its name or its first bytes, that it is a zip."""
    if path.suffix.lower() == ".zip":
        return True
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _open_zip(path: Path) -> tuple[zipfile.ZipFile, list[Place]]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # BadZipFile, and what a damaged directory makes of struct, decode
        raise DataError(
            f"{path} cannot be read as a zip ({error}): it is damaged or was not copied whole."
            " Copy it again"
        ) from None
    members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
    problem = None
    if any(m.flag_bits & 1 for m in members):
        problem = "it is encrypted"
    elif len(members) > MOST_MEMBERS:
        problem = f"it holds {len(members):,} files"
    elif large := [m for m in members if m.file_size > LARGEST_MEMBER]:
        problem = f"{large[0].filename} in it would have {large[0].file_size:,} bytes"
    if problem:
        archive.close()
        raise DataError(f"{path} is not unpacked here: {problem}. Unpack it yourself, then name"
                        " the folder")  # fmt: skip
    return archive, [Place(path, m.filename) for m in members]


def _listed(dicomdir: Path) -> list[Path]:
    """The files that a DICOMDIR lists; standard PS3.10: names of at most eight letters a level."""
    with dicomdir.open("rb") as file:
        records = parse(Clamped(file), dicomdir).get("DirectoryRecordSequence")
    if records is None:
        raise DataError(f"{dicomdir} lists no files: name the folder that it lies in")
    listed = {}
    try:
        for record in records:
            parts = record.get("ReferencedFileID") or ()
            parts = [parts] if isinstance(parts, str) else [str(part) for part in parts]
            if not parts:
                continue
            if any(part in ("", ".", "..") or set(part) & set("/\\:\0") for part in parts):
                raise DataError(f"{dicomdir} lists a file outside its folder: {'/'.join(parts)}")
            listed.setdefault(_with_any_case(dicomdir.parent, parts))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged record makes of pydicom
        raise DataError(f"{dicomdir} is damaged ({error}): name the folder instead") from None
    if listed and not any(path.is_file() for path in listed):
        raise MissingDataError(
            f"none of the {len(listed)} files that {dicomdir} lists is there. Copy the folders"
            " beside it as well"
        )
    return list(listed)


def _with_any_case(folder: Path, parts: Sequence[str]) -> Path:
    """The path, also where a copy from a disc has turned the names into small letters."""
    exact = folder.joinpath(*parts)
    if exact.exists():
        return exact
    small = folder.joinpath(*(part.lower() for part in parts))
    return small if small.exists() else exact


def looks_like_dicom(file: BinaryIO) -> bool:
    """Whether the first bytes are those of a DICOM file, with preamble or without."""
    start = file.read(132)
    file.seek(0)
    if start[128:] == b"DICM":
        return True
    return len(start) >= 8 and struct.unpack("<HH", start[:4]) in FIRST_ELEMENTS


def parse(
    file: BinaryIO, name: Place | Path, tags: list[int] | None = None, pixels: bool = False
) -> pydicom.FileDataset:
    """What `looks_like_dicom` -> its data set, without pixels unless they are asked for.

    Raises DataError, which names the file, if it is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_inflated(file)
            return pydicom.dcmread(
                file, stop_before_pixels=not pixels, force=True, specific_tags=tags
            )
    except (OSError, zipfile.BadZipFile):  # the disk's or the zip's, see `open`
        raise
    except Exception as error:  # pydicom raises whatever a damaged byte leads to
        text = f"{error}".splitlines()[0:1] or [type(error).__name__]
        raise DataError(
            f"{name} begins like a DICOM file but cannot be read ({text[0]}). Copy it again"
        ) from None


def _check_inflated(file: BinaryIO) -> None:
    """Refuses a deflated file that would take more memory than any CT (PS3.5 A.5)."""
    start = file.read(2048)
    file.seek(0)
    if start[128:132] != b"DICM" or DEFLATED not in start:
        return
    if start[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        raise ValueError("it is deflated and does not say where")
    file.seek(144 + struct.unpack("<I", start[140:144])[0])
    inflate, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not inflate.eof and (block := inflate.unconsumed_tail or file.read(1 << 16)):
        count += len(inflate.decompress(block, 1 << 20))
        if count > LARGEST_INFLATED:
            raise ValueError(f"unpacked it would have more than {LARGEST_INFLATED:,} bytes")
    file.seek(0)
