"""A phantom LiTS on disk: scans and labels under the data set's names and in its format, with
orientations, spacings and missing geometry as the data set has them."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ct_volumes import optional
from deeplesion.files import write_whole
from deeplesion.phantom.liver import LiverScan, draw_liver_scan
from deeplesion.phantom.make import check_options, claim
from deeplesion.processes import in_processes

CASES = 131  # LiTS's
IDENTITY = range(28, 48)  # numbers of the volumes that state no geometry, in LiTS and here
THICKNESSES = (1.0, 2.5, 1.5, 5.0, 2.0)  # mm, one case after the other; LiTS's are 0.45 to 6
# The directions in which the file's axes grow: left, right, anterior ...
ORIENTATIONS = ("LPS", "RAS", "LAS", "RPI", "PSL")


def case_numbers(cases: int) -> list[int]:
    """Which cases of LiTS a phantom of so many has: from 0 on, and of those without geometry
    always 28 and 29, which are one of each part of `lits.split()`."""
    first = [28, 29][:cases]
    others = (n for n in range(CASES) if n not in first)
    return sorted([*first, *(next(others) for _ in range(cases - len(first)))])


def make_lits(
    root: str | Path,
    cases: int = 16,
    size: int = 512,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write `cases` phantom cases of slices of `size` px a side to `root`; returns it.

    `volume-N.nii` holds int16 HU, `segmentation-N.nii` uint8 labels: 0, 1 liver, 2 lesion. The
    axes of the files lie in five orientations in turn; cases 28 to 47 have the identity as their
    affine, as in the data set. The same cases, size and seed give the same bytes whatever the
    number of workers. After an interruption the same call continues the work.

    Raises:
        UserError: an option out of range; nibabel is not installed.
        FileExistsError: `root` holds anything else.
    """
    check_options(
        ("cases", cases, 1, CASES),
        ("size", size, 128, 512),
        ("seed", seed, 0, 2**32 - 1),
        ("workers", workers, 1, 1024),
    )
    optional.need("LiTS is written with", "nibabel")
    root = Path(root)
    arguments = {"lits_version": 1, "cases": cases, "size": size, "seed": seed}
    claim(root, root / "arguments.json", arguments)
    numbers = case_numbers(cases)
    bar = partial(tqdm, total=cases, desc="cases", disable=not progress)
    with closing(in_processes(partial(write_case, root, size, seed), numbers, workers, 1)) as made:
        for _ in bar(made):
            pass
    return root


def write_case(root: Path, size: int, seed: int, number: int) -> None:
    """Write both files of a case, unless they are there."""
    volume, segmentation = (root / f"{kind}-{number}.nii" for kind in ("volume", "segmentation"))
    if segmentation.exists():  # the second of the two
        return
    scan = draw_liver_scan(number, size, seed, THICKNESSES[number % len(THICKNESSES)])
    for path, array in ((volume, scan.hu), (segmentation, scan.labels)):
        write_whole(path, _nifti(array, scan, number))


def _nifti(array: np.ndarray, scan: LiverScan, number: int) -> bytes:
    """The file of an (S, size, size) array, its axes turned as the case's number says."""
    import nibabel
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), _affine(scan), dtype=array.dtype)
    # Read without geometry, axes are taken to grow to the right, to anterior and to the head.
    codes = "RAS" if number in IDENTITY else ORIENTATIONS[number % len(ORIENTATIONS)]
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(codes))
    turned = image.as_reoriented(turn)
    affine = np.eye(4) if number in IDENTITY else turned.affine
    out = nibabel.Nifti1Image(np.asanyarray(turned.dataobj), affine, dtype=array.dtype)
    out.set_sform(affine, "scanner")
    out.set_qform(affine, "scanner")
    out.header.set_xyzt_units("mm")
    return out.to_bytes()


def _affine(scan: LiverScan) -> np.ndarray:
    """(4, 4) from x, y and the slice to mm in RAS: the image's middle at 0, the top of the chest at
    z = 0."""
    size, spacing, thickness = scan.scan
    affine = np.diag([-spacing, -spacing, -thickness, 1.0])
    affine[:3, 3] = [(size - 1) / 2 * spacing, (size - 1) / 2 * spacing, -scan.first_mm]
    return affine
