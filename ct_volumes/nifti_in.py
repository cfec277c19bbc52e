"""NIfTI -> CTVolume: read once from beginning to end, one slab at a time, and turned into
DeepLesion's orientation."""

from __future__ import annotations

import gzip
import itertools
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from ct_volumes.hounsfield import PADDING_HU, offset_of, room_for, to_hu
from ct_volumes.volume import MOST_OBLIQUE, CTVolume, Source
from deeplesion.conventions import LARGEST_SIDE
from deeplesion.errors import DataError

LARGEST_SLAB = 1 << 24  # bytes of the file that are turned into HU at a time
MOST_INFLATED = 1032  # times the size of a file: deflate can do no better
SAME_AFFINE_MM = 0.5
TO_LPS = np.diag([-1.0, -1.0, 1.0])
HOW_TO_SET = (
    "Convert the DICOM series again with a tool that keeps the geometry, or save the file with its"
    " true affine (nibabel: nib.Nifti1Image(values, affine))"
)
NO_GEOMETRY = (
    "The affine is the identity: the size of the voxels and the patient's orientation are not"
    " known. The voxels are taken as 1 mm cubes, so lengths in mm, size classes and resampling"
    " along z are wrong for this case; Dice is not affected."
)


def read_nifti(path: Path, identity: bool = False) -> CTVolume:
    """Read a .nii or .nii.gz file.

    The slices are those of the axis that is nearest to the patient's, whatever the order of the
    axes. Of sform and qform the sform is taken. Raises DataError for a file that is truncated, of
    several volumes, without a stated geometry, or holds no Hounsfield units. With `identity` an
    affine that is the identity is taken for one, and a note says what that means.
    """
    with _opened(path) as file:
        header = _header(file, path)
        shape, affine, notes = _geometry(header, path, identity)
        axes, flipped = _turn(affine, path)
        dtype = _number_type(header, path)
        slope, intercept = _scaling(header)
        _check_size(path, header, shape, dtype)
        hu = room_for(tuple(shape[a] for a in axes), path)
        in_source = np.flip(hu, [a for a in range(3) if flipped[a]]).transpose(np.argsort(axes))
        _skip(file, int(header["vox_offset"]))
        more = _fill(in_source, file, dtype, slope, intercept, path)
        _check_rest(file)
    notes += more
    in_lps = TO_LPS @ affine[:3, :3]
    sizes = np.linalg.norm(in_lps, axis=0)
    # Voxel (0, 0, 0) of the volume, in the source.
    corner = np.zeros(3)
    for a in range(3):
        corner[axes[a]] = (shape[axes[a]] - 1) * flipped[a]
    steps = [in_lps[:, axes[a]] * (-1 if flipped[a] else 1) for a in range(3)]
    origin = TO_LPS @ (affine[:3, :3] @ corner + affine[:3, 3])
    slice_size = abs(steps[0] @ np.cross(steps[1], steps[2])) / np.prod(sizes[list(axes[1:])])
    in_plane = max(sizes[list(axes[1:])])
    if in_plane > 2 * slice_size and in_plane > 2 * min(sizes[list(axes[1:])]):
        notes.append(
            f"Voxels are {in_plane:.4g} mm long within the axial plane and {slice_size:.4g} mm"
            " along the patient: the scan looks like a coronal or sagittal one."
        )
    normal = np.cross(steps[1], steps[2])
    tilt = _degrees(steps[0], normal)
    if len(hu) > 1 and tilt > 0.5:
        notes.append(
            f"The gantry was tilted by {tilt:.1f} degrees: slices are shifted against each other,"
            " and stay as they are."
        )
    source = Source(
        path=path, format="nifti", shape=shape, axes=axes, flipped=flipped, affine=affine,
        notes=tuple(notes),
    )  # fmt: skip
    row, column = sizes[axes[1]], sizes[axes[2]]
    try:
        return CTVolume(
            hu,
            origin + np.arange(len(hu))[:, None] * steps[0],
            steps[2] / column,
            steps[1] / row,
            (row, column),
            source,
        )
    except ValueError as error:
        raise DataError(f"{path} is no axial volume: {error}") from None


def nifti_size(path: Path) -> tuple[tuple[int, int, int], float | None]:
    """(slices, rows, columns) and the distance of slices in mm, from the header alone."""
    with _opened(path) as file:
        header = _header(file, path)
        shape, affine, _ = _geometry(header, path)
        axes, _ = _turn(affine, path)
        _number_type(header, path)
    rotated = affine[:3, :3]
    area = np.linalg.norm(np.cross(rotated[:, axes[1]], rotated[:, axes[2]]))
    size = tuple(shape[a] for a in axes)
    return size, float(abs(np.linalg.det(rotated)) / area) if size[0] > 1 else None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, unpacked on the way if it is a gzip; what goes wrong is a DataError."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if packed:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked
            else:
                yield file
    except DataError:
        raise
    except EOFError:
        raise _truncated(path) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip ({error}). Copy it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _truncated(path: Path) -> DataError:
    return DataError(f"{path} ends before its last voxel: it was not copied whole. Copy it again")


def _header(file: BinaryIO, path: Path) -> nib.Nifti1Header:
    """The header of NIfTI-1 or NIfTI-2; `file` stands behind it."""
    start = file.read(348)
    kind, size = nib.Nifti1Header, 348
    if start[4:8] == b"n+2\0":
        kind, size = nib.Nifti2Header, 540
        start += file.read(size - 348)
    elif start[344:348] != b"n+1\0":
        detached = start[344:348] == b"ni1\0"
        raise DataError(
            f"{path} is "
            + ("half of a pair of files (.hdr, .img)" if detached else "no NIfTI file")
            + ". Expected NIfTI in one file (.nii, .nii.gz), or DICOM"
        )
    if len(start) < size:
        raise _truncated(path)
    try:
        return kind(start, check=False)
    except Exception as error:  # nibabel raises whatever a damaged header leads to
        raise DataError(f"the header of {path} is damaged ({error})") from None


def _geometry(
    header: nib.Nifti1Header, path: Path, identity: bool = False
) -> tuple[tuple[int, int, int], np.ndarray, list[str]]:
    count = int(header["dim"][0])
    sides = [int(d) for d in header["dim"][1 : count + 1]] if 1 <= count <= 7 else []
    if len(sides) < 2 or min(sides) < 1 or max(sides[:3]) > LARGEST_SIDE:
        raise DataError(
            f"{path} says that it has the shape {sides}: no volume, or a damaged header"
        )
    if (volumes := int(np.prod(sides[3:], dtype=object))) > 1:
        raise DataError(
            f"{path} holds {volumes} volumes (shape {sides}). Save the one that is meant as a 3-D"
            " file"
        )
    shape = tuple(sides[:3] + [1] * (3 - len(sides)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        affines = {}
        for name, get in (("sform", header.get_sform), ("qform", header.get_qform)):
            try:
                affine = get(coded=True)[0]
            except Exception as error:  # such as a quaternion that is none
                raise DataError(f"the {name} of {path} is damaged ({error})") from None
            if affine is not None:
                affines[name] = np.asarray(affine, np.float64)
    if not affines:
        raise DataError(
            f"{path} does not say where the patient's head and left are (sform_code and qform_code"
            f" are 0). {HOW_TO_SET}"
        )
    affine = affines.get("sform", affines.get("qform"))
    notes = []
    if np.array_equal(affine, np.eye(4)):
        notes.append(NO_GEOMETRY)
        if not identity:
            raise DataError(
                f"{path} has the identity as its affine: whoever saved it left out the size of the"
                f" voxels and where the patient's head and left are. {HOW_TO_SET}"
            )
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not (
        np.isfinite(affine).all()
        and np.abs(affine).max() < 1e5
        and (sizes > 1e-3).all()
        and abs(np.linalg.det(affine[:3, :3] / sizes)) > 0.1
    ):
        raise DataError(f"{path} has no geometry that a scan can have: {affine[:3].tolist()}")
    if len(affines) == 2:
        corners = np.array([*itertools.product(*([0, s - 1] for s in shape))])
        between = (affines["sform"] - affines["qform"])[:3]
        apart = np.linalg.norm(corners @ between[:, :3].T + between[:, 3], axis=1).max()
        if not apart < SAME_AFFINE_MM:
            notes.append(
                f"sform and qform place the scan differently (up to {apart:.4g} mm apart); the"
                " sform is taken."
            )
    return shape, affine, notes


def _turn(affine: np.ndarray, path: Path) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which axis of the file the slices, rows and columns lie on, and whether they run against it.

    The axes go to those of the patient that they are nearest to, all three together.
    """
    directions = TO_LPS @ affine[:3, :3]
    directions = directions / np.linalg.norm(directions, axis=0)
    # [i, a]: how much axis a of the file runs towards feet, posterior, left.
    towards = np.array([-directions[2], directions[1], directions[0]])
    axes = max(
        itertools.permutations(range(3)),
        key=lambda p: sum(abs(towards[i, p[i]]) for i in range(3)),
    )
    oblique = _degrees(np.cross(directions[:, axes[1]], directions[:, axes[2]]), [0, 0, 1])
    oblique = min(oblique, 180 - oblique)
    if oblique > MOST_OBLIQUE:
        raise DataError(
            f"{path} is oblique by {oblique:.0f} degrees to the patient's axes; detectors of axial"
            f" slices can read it up to {MOST_OBLIQUE:.0f}"
        )
    return axes, tuple(bool(towards[i, axes[i]] < 0) for i in range(3))


def _degrees(one: np.ndarray, other: np.ndarray) -> float:
    cosine = np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _number_type(header: nib.Nifti1Header, path: Path) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except Exception:  # a code that NIfTI does not have
        dtype = np.dtype("V1")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise DataError(
            f"{path} holds values of type {int(header['datatype'])} ({dtype}); expected whole"
            " numbers or floats of up to 64 bits"
        )
    return dtype


def _scaling(header: nib.Nifti1Header) -> tuple[float, float]:
    """scl_slope and scl_inter; a slope that is 0 or no number means none (NIfTI-1 standard)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    return slope, intercept if np.isfinite(intercept) else 0.0


def _check_size(path: Path, header: nib.Nifti1Header, shape: tuple, dtype: np.dtype) -> None:
    """Refuses a file that cannot hold what its header says, before room is made for it."""
    offset = float(header["vox_offset"])
    start = 352 if header.sizeof_hdr == 348 else 544
    if not start <= offset < 1 << 31:
        if offset != 0:
            raise DataError(f"the header of {path} is damaged: vox_offset is {offset}")
        header["vox_offset"] = start
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize + int(header["vox_offset"])
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if path.stat().st_size * (MOST_INFLATED if packed else 1) < needed:
        raise _truncated(path)


def _skip(file: BinaryIO, offset: int) -> None:
    while (left := offset - file.tell()) > 0:
        if not file.read(min(left, 1 << 20)):
            return  # the voxels are found missing


def _fill(
    target: np.ndarray,
    file: BinaryIO,
    dtype: np.dtype,
    slope: float,
    intercept: float,
    path: Path,
) -> list[str]:
    """Writes HU into (i, j, k) int16, from a file that stands at its first voxel; says what is
    unusual about them."""
    plane = target.shape[0] * target.shape[1] * dtype.itemsize
    step = max(LARGEST_SLAB // plane, 1)
    # Values without a sign may turn out to be offset: they are kept as they are up to the end.
    unsigned = dtype.kind == "u" and dtype.itemsize == 2 and (slope, intercept) == (1, 0)
    notes, unknown, clipped = [], False, False
    raw = target.view(np.uint16)
    for k in range(0, target.shape[2], step):
        count = min(step, target.shape[2] - k)
        data = _read(file, count * plane)
        if len(data) < count * plane:
            raise _truncated(path)
        slab = np.frombuffer(data, dtype).reshape(count, *target.shape[1::-1]).T
        if unsigned:
            raw[:, :, k : k + count] = slab
            continue
        unknown |= dtype.kind == "f" and bool(np.isnan(slab).any())
        target[:, :, k : k + count], cut = to_hu(slab, slope, intercept)
        clipped |= cut
    try:
        offset = offset_of(raw if unsigned else target)
    except ValueError as error:
        raise DataError(
            f"{path} holds no Hounsfield units: {error}. Expected a CT with its HU, or with"
            " scl_slope and scl_inter that give them"
        ) from None
    if offset > np.iinfo(np.int16).max and not unsigned:
        raise DataError(f"{path} holds no Hounsfield units: its values go beyond those of int16")
    for k in range(0, target.shape[2], step):
        values = raw if unsigned else target
        if unsigned or offset:
            part = values[:, :, k : k + step]
            target[:, :, k : k + step], cut = to_hu(part, 1.0, -offset)
            clipped |= cut
    if offset:
        notes.append(
            f"No value was negative, so they were no Hounsfield units; {offset} was subtracted,"
            " which puts air and soft tissue where they belong."
        )
    if unknown:
        notes.append(f"Voxels that are no number are taken as air ({PADDING_HU} HU).")
    if clipped:
        notes.append("Values beyond those of int16 were clipped.")
    return notes


def _read(file: BinaryIO, count: int) -> bytes:
    """As many bytes as asked for, fewer only at the end of the file."""
    blocks = []
    while count and (block := file.read(min(count, 1 << 24))):
        blocks.append(block)
        count -= len(block)
    return b"".join(blocks)


def _check_rest(file: BinaryIO) -> None:
    """Reads a gzip to its end, where its checksum is."""
    if isinstance(file, gzip.GzipFile):
        for _ in range(256):
            if not file.read(1 << 20):
                return
