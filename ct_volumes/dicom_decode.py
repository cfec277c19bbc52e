"""Decoding of compressed images in a process of its own: on some damaged files the libraries that
decode them end the whole process, or do not come back."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import iter_pixels

MOST_SECONDS = 60  # for one image; a large one takes less than a second
MOST_MEMORY = 8 << 30  # bytes of address space of the process that decodes
PACKAGES = Path(__file__).resolve().parent.parent


class DecodingError(Exception):
    """The pixels cannot be decoded; the message says why."""


class Decoder:
    """Decodes in a process that starts when it is needed and ends with the context.

    It is started anew after it was ended by a damaged file.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._ours: Connection | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._ours.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def images(self, source: bytes | Path, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames `indices` of a DICOM file, given by its content or its path; stored values.

        Raises DecodingError.
        """
        if not self._process:
            self._start()
        done = False
        try:
            self._ours.send((source, indices))
            for _ in indices:
                if not self._ours.poll(MOST_SECONDS):
                    raise DecodingError(f"decoding took more than {MOST_SECONDS} s")
                image = self._ours.recv()
                if isinstance(image, str):
                    done = True
                    raise DecodingError(image)
                yield image
            done = True
        except (EOFError, OSError):
            raise DecodingError("the decoder broke off") from None
        finally:
            if not done:  # broken, or with frames to come that nobody waits for
                self.__exit__()

    def _start(self) -> None:
        self._ours, theirs = Pipe()
        code = (
            f"import sys; sys.path.insert(0, {str(PACKAGES)!r})\n"
            f"from ct_volumes.dicom_decode import serve; serve({theirs.fileno()})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the libraries complain there, in their own words
        )
        theirs.close()


def serve(descriptor: int) -> None:
    """What the process does: takes a file and the numbers of its frames, sends each frame, or a
    text that says what is wrong, until the other end closes."""
    _limit_memory()
    connection = Connection(descriptor)
    while True:
        try:
            source, indices = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if isinstance(source, bytes):
                source = with_defaults(pydicom.dcmread(pydicom.filebase.DicomBytesIO(source)))
            for image in decoded(source, indices):
                connection.send(image)
        except BrokenPipeError:
            return
        except Exception as error:  # pydicom and the libraries raise whatever is wrong
            connection.send(reason_of(error))


def decoded(source: object, indices: list[int]) -> Iterator[np.ndarray]:
    """The stored values of frames, of a data set, an open file or a path, as they are: neither
    bits above BitsStored nor signs are touched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(raw=True, indices=indices, correct_unused_bits=False)
        with closing(iter_pixels(source, **options)) as images:
            for _ in indices:
                yield next(images)


def reason_of(error: Exception) -> str:
    """The first line of what it says."""
    return next(iter(f"{error}".splitlines()), "") or type(error).__name__


def with_defaults(ds: pydicom.FileDataset) -> pydicom.FileDataset:
    """What a decoder must know and some headers leave out."""
    if not ds.file_meta.get("TransferSyntaxUID"):  # a file without preamble
        implicit, little = ds.original_encoding
        ds.file_meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian if implicit
            else pydicom.uid.ExplicitVRLittleEndian if little
            else pydicom.uid.ExplicitVRBigEndian
        )  # fmt: skip
    bits = ds.get("BitsAllocated") or 16
    for keyword, value in (
        ("SamplesPerPixel", 1),
        ("PhotometricInterpretation", "MONOCHROME2"),
        ("BitsAllocated", bits),
        ("BitsStored", bits),
        ("PixelRepresentation", 0),
    ):
        if ds.get(keyword) in (None, ""):
            setattr(ds, keyword, value)
    return ds


def _limit_memory() -> None:
    """What an image says about its size is believed up to here."""
    if os.name == "posix":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = MOST_MEMORY if limit == resource.RLIM_INFINITY else min(MOST_MEMORY, limit)
        resource.setrlimit(resource.RLIMIT_AS, (most, limit))
