"""The LiTS training set: finds its files, reads a case as a CTVolume with its labels, resamples it
along z and takes predictions back, and splits the cases into training and validation."""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from ct_volumes.nifti_in import SAME_AFFINE_MM, read_nifti
from ct_volumes.volume import CTVolume, Source
from deeplesion.errors import DataError, MissingDataError
from deeplesion.files import write_whole

CASES = 131  # of the challenge's two training batches, numbered from 0
STEP_MM = 1.5  # between slices, as Volumetric Attention resamples LiTS (pre-processing)
VALIDATION_CASES = 26  # a fifth
BACKGROUND, LIVER, LESION = 0, 1, 2
NAME = re.compile(r"(volume|segmentation)-(\d+)\.nii(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class Files:
    """The two files of a case."""

    number: int
    volume: Path
    segmentation: Path


@dataclass(frozen=True)
class Folder:
    """What a LiTS folder holds.

    Attributes:
        cases: number -> files, of the cases with both, by number.
        without_volume, without_segmentation: numbers within 0..130 whose file is not there.
    """

    path: Path
    cases: dict[int, Files] = field(repr=False)
    without_volume: tuple[int, ...]
    without_segmentation: tuple[int, ...]

    def __str__(self) -> str:
        text = f"{self.path}: {len(self.cases)} of {CASES} cases"
        for name, numbers in (
            ("volume", self.without_volume),
            ("segmentation", self.without_segmentation),
        ):
            if numbers:
                text += f"; no {name} of {_ranges(numbers)}"
        return text


@dataclass(frozen=True, eq=False)
class Case:
    """A scan and its labels.

    Attributes:
        labels: (S, H, W) uint8 on the volume's grid: 0, 1 liver, 2 lesion.
        known_geometry: False where the affine is the identity (volumes 28 to 47 of the data set);
            a note of `volume.source` says what follows.
    """

    number: int
    volume: CTVolume
    labels: np.ndarray
    known_geometry: bool = True


@dataclass(frozen=True, eq=False)
class Resampled:
    """A case whose slices are evenly spaced; `original` is the volume that it was made from."""

    volume: CTVolume
    labels: np.ndarray
    original: CTVolume

    def back(self, array: np.ndarray) -> np.ndarray:
        """(S', H, W) on the new grid, of any type -> (S, H, W) on the original one.

        Each original slice takes the nearest new one; of two equally near, that to the head.
        """
        if array.shape != self.volume.hu.shape:
            raise ValueError(f"the array must be {self.volume.hu.shape}, got {array.shape}")
        return array[_nearest(self.volume.positions_mm, self.original.positions_mm)]


def find_cases(folder: Path) -> Folder:
    """Find `volume-N.nii[.gz]` and `segmentation-N.nii[.gz]` in a folder and its subfolders.

    Raises MissingDataError if the folder is not there or has no whole case, DataError if a file is
    there twice or N is beyond 130.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingDataError(f"{folder} is no folder. Expected LiTS's training batches in it")
    found: dict[str, dict[int, Path]] = {"volume": {}, "segmentation": {}}
    for path in sorted(folder.rglob("*")):
        if not (match := NAME.fullmatch(path.name)) or not path.is_file():
            continue
        kind, number = match[1].lower(), int(match[2])
        if number >= CASES:
            raise DataError(f"{path} is none of LiTS's cases 0 to {CASES - 1}. Move it elsewhere")
        if number in found[kind]:
            raise DataError(
                f"{kind} {number} is there twice: {found[kind][number]} and {path}. Keep one"
            )
        found[kind][number] = path
    volumes, segmentations = found["volume"], found["segmentation"]
    cases = {
        n: Files(n, volumes[n], segmentations[n])
        for n in sorted(volumes.keys() & segmentations.keys())
    }
    if not cases:
        raise MissingDataError(
            f"{folder} holds no case of LiTS. Expected volume-N.nii and segmentation-N.nii (or"
            f" .nii.gz), N = 0 to {CASES - 1}, in it or its subfolders"
        )
    missing = [
        tuple(n for n in range(CASES) if n not in numbers) for numbers in (volumes, segmentations)
    ]
    return Folder(folder, cases, *missing)


def read_case(files: Files) -> Case:
    """Read the scan and its labels, turned alike.

    Raises DataError if either cannot be read, if their shapes or affines differ (by more than
    0.5 mm at a corner), or if a label is not 0, 1 or 2.
    """
    segmentation, seg_affine = _open(files.segmentation)
    volume = read_nifti(files.volume, identity=True)
    source = volume.source
    known = not np.array_equal(source.affine, np.eye(4))
    shape = tuple(segmentation.shape)
    if shape != tuple(source.shape):
        raise DataError(
            f"{files.segmentation} has the shape {shape}, {files.volume} {source.shape}. Expected"
            " one label for each voxel: copy both from the same release"
        )
    if seg_affine is None:
        raise DataError(f"{files.segmentation} states no affine; expected that of {files.volume}")
    corners = np.stack(np.meshgrid(*([0, s - 1] for s in shape)), axis=-1).reshape(-1, 3)
    between = (seg_affine - source.affine)[:3]
    apart = np.linalg.norm(corners @ between[:, :3].T + between[:, 3], axis=1).max()
    if not apart <= SAME_AFFINE_MM:
        raise DataError(
            f"{files.segmentation} and {files.volume} are placed differently (up to {apart:.4g} mm"
            " apart): which voxel a label belongs to is not known. Save both with one affine"
        )
    values = _values(segmentation, files.segmentation)
    if not np.isin(values, (BACKGROUND, LIVER, LESION)).all():
        other = np.setdiff1d(values, (BACKGROUND, LIVER, LESION))[:5].tolist()
        raise DataError(
            f"{files.segmentation} has labels {other}; expected 0, 1 (liver) and 2 (lesion) alone"
        )
    labels = np.moveaxis(values.astype(np.uint8), source.axes, (0, 1, 2))
    labels = np.flip(labels, [a for a in range(3) if source.flipped[a]])
    return Case(files.number, volume, np.ascontiguousarray(labels), known)


def resample(case: Case, step_mm: float = STEP_MM) -> Resampled:
    """Slices every `step_mm` along the normal, from the first; pixels stay as they are.

    HU are interpolated linearly and rounded, labels taken from the nearest slice (of two equally
    near, that to the head). The last new slice lies within half a step of the last original one;
    beyond it, HU repeat. A single slice stays as it is.
    """
    if not (np.isfinite(step_mm) and step_mm > 0):
        raise ValueError(f"step_mm must be positive, got {step_mm}")
    volume = case.volume
    positions = volume.positions_mm
    length = positions[-1] - positions[0]
    offsets = np.arange(int(np.rint(length / step_mm)) + 1) * step_mm
    new = positions[0] + offsets
    if len(positions) > 1:
        lower = np.clip(np.searchsorted(positions, new, "right") - 1, 0, len(positions) - 2)
        upper = lower + 1
    else:
        lower = upper = np.zeros(1, int)
    gap = np.maximum(positions[upper] - positions[lower], np.finfo(float).tiny)
    along = (new - positions[lower]) / gap  # above 1 beyond the last slice
    hu = np.empty((len(new), *volume.hu.shape[1:]), np.int16)
    for k, weight in enumerate(np.clip(along, 0, 1).astype(np.float32)):
        one, other = volume.hu[lower[k]], volume.hu[upper[k]]
        hu[k] = np.rint(one * (1 - weight) + other * weight)
    steps = volume.origins_mm[upper] - volume.origins_mm[lower]
    origins = volume.origins_mm[lower] + along[:, None] * steps
    source = Source(
        volume.source.path, "resampled", hu.shape, notes=volume.source.notes
    )  # no longer on the grid of the file
    resampled = CTVolume(
        hu, origins, volume.row_direction, volume.column_direction, volume.spacing_mm, source
    )
    return Resampled(resampled, case.labels[_nearest(positions, new)], volume)


def write_labels(labels: np.ndarray, case: Case, path: Path) -> None:
    """Write (S, H, W) uint8 labels on the case's grid as NIfTI, axes and affine as of its files."""
    source = case.volume.source
    image = nib.Nifti1Image(case.volume.in_source(labels), source.affine, dtype=np.uint8)
    for set_ in (image.set_sform, image.set_qform):
        set_(source.affine, "scanner")
    write_whole(path, image.to_bytes())


def split() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(training, validation): the numbers of 105 and 26 cases, the same on every machine.

    Validation takes the cases whose name has the smallest SHA-256. The challenge has no such split,
    and those of papers are not published, so figures on it compare with each other alone.
    """
    order = sorted(range(CASES), key=lambda n: hashlib.sha256(f"lits-{n}".encode()).digest())
    validation = tuple(sorted(order[:VALIDATION_CASES]))
    return tuple(sorted(order[VALIDATION_CASES:])), validation


def _ranges(numbers: tuple[int, ...]) -> str:
    """'0 to 2, 4, 7 to 9' of increasing numbers."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in ranges)


def _nearest(positions: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The index of the nearest of increasing positions; ties go to the smaller one."""
    middles = (positions[1:] + positions[:-1]) / 2
    return np.searchsorted(middles, wanted, "left")


def _open(path: Path) -> tuple[nib.Nifti1Image, np.ndarray | None]:
    """The image, its voxels unread, and the affine that it states (sform before qform)."""
    try:
        image = nib.load(path)
        header = image.header
        for get in (header.get_sform, header.get_qform):
            if (affine := get(coded=True)[0]) is not None:
                return image, np.asarray(affine, np.float64)
        return image, None
    except FileNotFoundError:
        raise MissingDataError(f"{path} is not there") from None
    except Exception as error:  # nibabel raises whatever a damaged header leads to
        raise DataError(f"{path} is no NIfTI file that can be read ({error})") from None


def _values(image: nib.Nifti1Image, path: Path) -> np.ndarray:
    try:
        return np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} was not copied whole ({error}). Copy it again") from None
