"""Lesions as a NIfTI label map: in the grid of the NIfTI that was read, or in the one that ITK
(3D Slicer, SimpleITK) makes of a DICOM series."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np

from ct_volumes.lesions import Algorithm, Lesion
from ct_volumes.nifti_grid import array_in_nifti, nifti_affine
from ct_volumes.volume import CTVolume
from deeplesion.files import write_whole

MOST_LESIONS = np.iinfo(np.uint16).max
EXACT_MM = 0.01  # headers hold positions and directions to so many digits
COMPRESSION = 6
_LABEL = 1002  # NIFTI_INTENT_LABEL


def write_nifti(
    path: Path, lesions: Sequence[Lesion], volume: CTVolume, algorithm: Algorithm
) -> tuple[str, ...]:
    """Writes a uint16 array that is the number of the lesion, from 1 in the order given, else 0.

    Where lesions overlap the one of the higher score is kept, of equal ones the first. Of a NIfTI
    scan shape and affine are the scan's own. Of a DICOM series they are those that
    `nifti_grid.py` gives it, which holds neither uneven spacing nor, for every program, a tilt.

    Args:
        path: ends in `.nii.gz`, or `.nii` to leave it uncompressed.

    Returns:
        Sentences about what the file cannot hold; they stand in its `descrip` in short.

    Raises:
        ValueError: more lesions than uint16 counts.
    """
    if len(lesions) > MOST_LESIONS:
        raise ValueError(f"a label map holds {MOST_LESIONS} lesions, got {len(lesions)}")
    labels = np.zeros(volume.hu.shape, np.uint16)
    for n in sorted(range(len(lesions)), key=lambda n: (lesions[n].score, -n)):
        for each in lesions[n].slices:
            each.patch.paint(labels[each.index], n + 1)
    affine, error_mm, sheared = nifti_affine(volume)
    image = nibabel.Nifti1Image(array_in_nifti(volume, labels), affine)
    image.set_sform(affine, code="scanner")
    # Programs that read the qform alone must not take a sheared grid for a straight one.
    image.set_qform(None if sheared else affine, code="unknown" if sheared else "scanner")
    image.header.set_xyzt_units("mm")
    image.header.set_intent(_LABEL, name="lesions")
    notes, short = [], "lesions; research, no medical device"
    if error_mm > EXACT_MM:
        notes.append(
            f"Slices are unevenly spaced: in the NIfTI file they lie up to {error_mm:.1f} mm from"
            " their place, for NIfTI knows one interval only. The DICOM SEG has the true places."
        )
        short += f"; uneven, off <={error_mm:.1f} mm"
    if sheared and volume.source.format == "dicom":  # a NIfTI scan's own grid is no loss
        notes.append(
            "The grid is sheared (a tilted gantry): only the sform of the NIfTI file says so, and"
            " programs on ITK refuse it. The DICOM SEG has the true places."
        )
        short += "; sheared, sform only"
    image.header["descrip"] = short.encode()

    def write(file: BinaryIO) -> None:
        if not str(path).endswith(".gz"):
            image.to_stream(file)
            return
        # Neither time nor name of the file, so that equal lesions are equal bytes.
        with gzip.GzipFile("", "wb", COMPRESSION, file, mtime=0) as compressed:
            image.to_stream(compressed)

    write_whole(Path(path), write)
    return tuple(notes)
