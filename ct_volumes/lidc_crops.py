"""LIDC-IDRI's nodules in their scans: finds the DICOM series, draws masks from contours, and cuts
cubes of evenly spaced voxels about a nodule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from skimage.measure import grid_points_in_poly
from tqdm import tqdm

from ct_volumes.dicom_files import Clamped, Place, files_in, looks_like_dicom, parse
from ct_volumes.hounsfield import PADDING_HU
from ct_volumes.lidc import Contour, Reading
from ct_volumes.lidc_nodules import Nodule
from ct_volumes.read import read_volume
from ct_volumes.volume import CTVolume
from deeplesion.errors import DataError, MissingDataError

SERIES_UID = 0x0020000E
SAME_POSITION_MM = 0.05  # the database holds positions as the headers state them
SIZE, STEP_MM = 48, 1.0  # of the ACS paper's crops
HU_RANGE = (-1024, 400)  # the same
CONSENSUS = 0.5  # of the readings


@dataclass(frozen=True, eq=False)
class Crop:
    """A cube about a nodule: slices head to feet, rows to the left, columns to posterior.

    Attributes:
        hu: (n, n, n) int16, clipped; air where the scan ends.
        mask: (n, n, n) bool.
        whole: whether all of the mask lies within the cube.
    """

    hu: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    whole: bool


def find_series(folder: str | Path, wanted: Iterable[str] | None = None) -> dict[str, Path]:
    """SeriesInstanceUID -> the folder of its files, anywhere under `folder`.

    The first and the last DICOM file of each folder are read; all, if these are of two series.

    Args:
        wanted: the UIDs that matter; by default all.

    Raises MissingDataError if `folder` is not there or has none of them, DataError if one is in
    several folders or a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingDataError(f"{folder} is no folder. Expected LIDC-IDRI's DICOM files in it")
    wanted = None if wanted is None else set(wanted)
    files: dict[Path, list[Path]] = {}
    for path in files_in(folder):
        files.setdefault(path.parent, []).append(path)
    found: dict[str, Path] = {}
    for parent, own in tqdm(files.items(), "series", unit=" folders", delay=2, disable=None):
        for uid in _uids(own):
            if wanted is not None and uid not in wanted:
                continue
            if uid in found:
                raise DataError(
                    f"series {uid} is in {found[uid]} and in {parent}. Keep one of the folders"
                )
            found[uid] = parent
    if not found:
        raise MissingDataError(
            f"{folder} holds none of LIDC-IDRI's series. Expected the folders of DICOM files as The"
            " Cancer Imaging Archive hands them out, in it or its subfolders"
        )
    return found


def cut_nodules(
    nodules: Iterable[Nodule],
    series: dict[str, Path],
    of: str = "reading",
    size: int = SIZE,
    progress: bool = True,
) -> Iterator[tuple[Nodule, Crop]]:
    """The crop of every nodule whose series is at hand, by scan; each scan is read once.

    Args:
        series: what `find_series` found. Nodules of others are passed over.
        of: 'reading' or 'consensus', see `nodule_mask`.
        size: voxels of 1 mm a side.

    Raises DataError for a scan that cannot be read, contours that do not fit it, and a mask without
    any voxel.
    """
    by_scan: dict[str, list[Nodule]] = {}
    for nodule in nodules:
        if nodule.scan.series_uid in series:
            by_scan.setdefault(nodule.scan.series_uid, []).append(nodule)
    for uid, own in tqdm(by_scan.items(), "scans", disable=not progress):
        volume = read_volume(series[uid], uid)
        for nodule in own:
            yield nodule, cut_nodule(nodule, volume, of, size)


def cut_nodule(nodule: Nodule, volume: CTVolume, of: str = "reading", size: int = SIZE) -> Crop:
    """The crop of one nodule out of its scan; arguments and errors as of `cut_nodules`."""
    mask = nodule_mask(nodule, volume, of)
    if not mask.any():
        raise DataError(
            f"the mask of {nodule.name} has no voxel ({of}). Leave the nodule out, or take the"
            " other kind of mask"
        )
    return crop(volume, mask, centre_mm(nodule, volume), size)


def reading_mask(reading: Reading, volume: CTVolume) -> np.ndarray:
    """(S, H, W) bool, the voxels that one reading counts to the nodule.

    A contour runs through the first pixels outside of the nodule, as LIDC-IDRI defines it: pixels
    whose centre is strictly inside an inclusion are the nodule's, those on its line are not. What
    lies within an exclusion or on its line is taken out.

    Raises DataError if the contours do not fit the volume, which must be the whole DICOM series.
    """
    return _placed(_slices(reading, volume), volume)


def consensus_mask(nodule: Nodule, volume: CTVolume, level: float = CONSENSUS) -> np.ndarray:
    """(S, H, W) bool, the voxels that at least the part `level` of the readings count to it.

    Raises DataError as `reading_mask`.
    """
    if not 0 < level <= 1:
        raise ValueError(f"level must be above 0 and at most 1, got {level}")
    counts: dict[int, np.ndarray] = {}
    for reading in nodule.readings:
        for index, mask in _slices(reading, volume).items():
            counts[index] = counts.get(index, 0) + mask.astype(np.uint8)
    least = level * len(nodule.readings)
    return _placed({index: count >= least for index, count in counts.items()}, volume)


def nodule_mask(nodule: Nodule, volume: CTVolume, of: str = "reading") -> np.ndarray:
    """(S, H, W) bool: of the first reading ('reading': the ACS paper takes one of the up to four
    and does not say which), or of at least half of them ('consensus')."""
    if of not in ("reading", "consensus"):
        raise ValueError(f"of must be 'reading' or 'consensus', got {of!r}")
    uid = volume.source.series_uid
    if uid and uid != nodule.scan.series_uid:
        raise DataError(
            f"{volume.source.path} is the series {uid}; the readings of {nodule.name} are of"
            f" {nodule.scan.series_uid}"
        )
    if of == "reading":
        return reading_mask(nodule.readings[0], volume)
    return consensus_mask(nodule, volume)


def centre_mm(nodule: Nodule, volume: CTVolume) -> np.ndarray:
    """(3,) mm in LPS: the middle of the box about all contours of all readings, along the volume's
    axes; it is the same whichever mask is wanted."""
    axes = np.stack([volume.row_direction, volume.column_direction, volume.normal])
    points = []
    for contour in (c for reading in nodule.readings for c in reading.contours if c.inclusion):
        index = _slice_of(contour, volume)
        x, y = _in_volume(contour, volume).T
        points.append(volume.to_world(x, y, np.full(len(x), index)) @ axes.T)
    points = np.concatenate(points)
    return (points.min(axis=0) + points.max(axis=0)) / 2 @ axes


def crop(
    volume: CTVolume,
    mask: np.ndarray,
    centre: np.ndarray,
    size: int = SIZE,
    step_mm: float = STEP_MM,
    hu_range: tuple[int, int] = HU_RANGE,
) -> Crop:
    """A cube of `size` voxels a side, `step_mm` apart, about a point in mm in LPS.

    HU are interpolated linearly and rounded. A voxel is the mask's where the mask, interpolated
    linearly, is at least a half.

    Args:
        mask: (S, H, W) bool on the volume's grid.
        size: with one that is larger, training can move its own crop about.
    """
    if mask.shape != volume.hu.shape or mask.dtype != bool:
        raise ValueError(f"mask must be bool {volume.hu.shape}, got {mask.dtype} {mask.shape}")
    if size < 1 or not (np.isfinite(step_mm) and step_mm > 0):
        raise ValueError(f"size and step_mm must be positive, got {size} and {step_mm}")
    hu = _resampled(volume, volume.hu.__getitem__, PADDING_HU, centre, size, step_mm)
    share = _resampled(volume, mask.__getitem__, 0, centre, size, step_mm)
    axes = np.stack([volume.row_direction, volume.column_direction, volume.normal])
    index, y, x = np.nonzero(mask)
    away = np.abs((volume.to_world(x, y, index) - centre) @ axes.T)
    return Crop(
        np.rint(np.clip(hu, *hu_range)).astype(np.int16),
        share >= 0.5 - 1e-6,  # a half, whatever the rounding
        bool((away <= size * step_mm / 2).all()),
    )


def _uids(files: list[Path]) -> set[str]:
    first, last = (next(filter(None, map(_uid, order)), None) for order in (files, files[::-1]))
    if first == last:
        return {first} if first else set()
    return set(filter(None, map(_uid, files)))


def _uid(path: Path) -> str | None:
    """SeriesInstanceUID, None of what is no DICOM file."""
    try:
        with path.open("rb") as plain:
            file = Clamped(plain)
            if not looks_like_dicom(file):
                return None
            return (
                str(parse(file, Place(path), [SERIES_UID]).get("SeriesInstanceUID") or "") or None
            )
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _slices(reading: Reading, volume: CTVolume) -> dict[int, np.ndarray]:
    """Slice -> (H, W) bool."""
    shape = volume.hu.shape[1:]
    inside: dict[int, np.ndarray] = {}
    # Inclusions first: an exclusion holds for whatever they include.
    for contour in sorted(reading.contours, key=lambda c: not c.inclusion):
        index = _slice_of(contour, volume)
        points = _in_volume(contour, volume)
        if (points < 0).any() or (points >= shape[::-1]).any():
            raise DataError(
                f"a contour of reading {reading.id} leaves the image of {shape[1]} x {shape[0]}"
                f" pixels: {volume.source.path} is not the series that was read"
            )
        mask = inside.setdefault(index, np.zeros(shape, bool))
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0) + 1
        # 0 outside, 1 inside, 2 and 3 on the line
        place = grid_points_in_poly(
            (bottom - top, right - left), (points - (left, top))[:, ::-1], binarize=False
        )
        part = mask[top:bottom, left:right]
        if contour.inclusion:
            part |= place == 1
        else:
            part &= place == 0
    return inside


def _placed(slices: dict[int, np.ndarray], volume: CTVolume) -> np.ndarray:
    mask = np.zeros(volume.hu.shape, bool)
    for index, own in slices.items():
        mask[index] = own
    return mask


def _slice_of(contour: Contour, volume: CTVolume) -> int:
    """The slice whose ImagePositionPatient has the contour's z."""
    height, width = volume.hu.shape[1:]
    _, down, right = volume.source.flipped
    first = volume.to_world(
        (width - 1) * right, (height - 1) * down, np.arange(len(volume.hu))
    )  # the centre of the file's first pixel
    off = np.abs(first[:, 2] - contour.z_mm)
    index = int(off.argmin())
    if off[index] > SAME_POSITION_MM:
        raise DataError(
            f"{volume.source.path} has no slice at z = {contour.z_mm:g} mm, where a contour lies"
            f" (the nearest is {off[index]:.3g} mm away). Check that all files of the series"
            f" {volume.source.series_uid or ''} are there"
        )
    return index


def _in_volume(contour: Contour, volume: CTVolume) -> np.ndarray:
    """(n, 2) x and y in the volume of a contour's points, which are the file's columns and rows."""
    source = volume.source
    if source.format != "dicom":
        raise DataError(f"{source.path} is no DICOM series, whose pixels LIDC-IDRI's contours mean")
    in_file = np.column_stack([np.zeros(len(contour.points), int), contour.points[:, ::-1]])
    points = in_file[:, source.axes]
    last = np.array(volume.hu.shape) - 1
    points = np.where(source.flipped, last - points, points)
    return points[:, :0:-1]


def _resampled(
    volume: CTVolume,
    plane: Callable[[int], np.ndarray],
    outside: float,
    centre: np.ndarray,
    size: int,
    step_mm: float,
) -> np.ndarray:
    """(n, n, n) float32: linear between pixels and between slices, of whatever `plane` gives (H, W)
    for a slice.

    Each slice is sampled where the cube's columns meet it, so tilt and uneven spacing count. Voxels
    within half a pixel or slice of the scan's outermost centres take these.
    """
    offsets = (np.arange(size) - (size - 1) / 2) * step_mm
    positions, extent = volume.positions_mm, volume.extent_mm
    wanted = np.dot(volume.normal, centre) + offsets
    place = np.interp(wanted, positions, np.arange(len(positions)))
    beyond = (wanted < positions[0] - extent[0] / 2) | (wanted > positions[-1] + extent[-1] / 2)
    cut: dict[int, np.ndarray] = {}

    def sampled(index: int) -> np.ndarray:
        if index not in cut:
            to = centre - volume.origins_mm[index]
            image, empty = np.asarray(plane(index), np.float32), False
            for axis, direction, spacing in (
                (0, volume.column_direction, volume.spacing_mm[0]),
                (1, volume.row_direction, volume.spacing_mm[1]),
            ):
                at, length = (np.dot(direction, to) + offsets) / spacing, image.shape[axis]
                off = (at < -0.5) | (at > length - 0.5)
                at = np.clip(at, 0, length - 1)
                low = np.minimum(at.astype(int), max(length - 2, 0))
                weight = np.expand_dims((at - low).astype(np.float32), 1 - axis)
                high = np.minimum(low + 1, length - 1)
                image = image.take(low, axis) * (1 - weight) + image.take(high, axis) * weight
                empty = empty | np.expand_dims(off, 1 - axis)
            cut[index] = np.where(empty, np.float32(outside), image)
        return cut[index]

    cube = np.full((size,) * 3, outside, np.float32)
    for k in np.flatnonzero(~beyond):
        low = int(place[k])
        weight = np.float32(place[k] - low)
        cube[k] = sampled(low) * (1 - weight)
        if weight:
            cube[k] += sampled(low + 1) * weight
    return cube
