"""CTVolume: a whole CT scan in DeepLesion's orientation, with the geometry of every slice of its
own, and the way back to the arrays and files that it came from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ct_volumes.gaps import gaps

# A gantry tilts by up to 30 degrees; beyond this an image is no longer told from a reformation.
MOST_OBLIQUE = 35.0  # degrees between an axial slice's normal and the axis of the table
DIRECTION_TOLERANCE = 1e-3  # of unit vectors at right angles; headers hold six decimals


@dataclass(frozen=True)
class Instance:
    """Where one slice of a DICOM volume lies.

    Attributes:
        path: the file, or the zip that holds it.
        member: its name within the zip, None for a plain file.
        frame: counted from 0, of a multi-frame file; None for a file of one slice.
        uid: SOPInstanceUID.
    """

    path: Path
    uid: str
    member: str | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Source:
    """What a volume was read from.

    Attributes:
        path: what was read: a folder, a zip or a file.
        format: 'dicom' or 'nifti'; 'resampled' of a volume that was not read but made of one.
        shape: of the source's array: (slices, rows, columns) of DICOM, whose slices are in the
            volume's order; (i, j, k) of NIfTI.
        axes: the axis of the source's array on which the volume's slices, rows and columns lie.
        flipped: whether the volume runs against the source along its slices, rows and columns.
        instances: DICOM's, one for each slice of the volume, head to feet.
        affine: NIfTI's, (4, 4) from (i, j, k) to mm in RAS.
        series_uid, frame_of_reference_uid, number, description, kernel: of a DICOM series, where
            it states them.
        slice_thickness_mm: what the header says; the distance of slices is the volume's
            `interval_mm`.
        notes: what is unusual about the scan, a sentence each: gaps, tilt, uneven spacing ...
    """

    path: Path
    format: str
    shape: tuple[int, int, int]
    axes: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[bool, bool, bool] = (False, False, False)
    instances: tuple[Instance, ...] = ()
    affine: np.ndarray | None = None
    series_uid: str | None = None
    frame_of_reference_uid: str | None = None
    number: int | None = None
    description: str = ""
    kernel: str = ""
    slice_thickness_mm: float | None = None
    notes: tuple[str, ...] = ()

    def without_paths(self, text: str) -> str:
        """A text without the paths of the scan and its files, which may hold the patient's name."""
        names = {str(each.member or each.path): "a file" for each in self.instances}
        names[str(self.path)] = "the scan"
        for name in sorted(names, key=len, reverse=True):
            if name in text:  # and not as a part of another name
                whole = rf"(?<![-\w./\\]){re.escape(name)}(?![-\w]|\.\w)"
                text = re.sub(whole, names[name], text)
        return text


@dataclass(frozen=True, eq=False)
class CTVolume:
    """A CT scan, its slices as DeepLesion's lie: rows towards the patient's left, columns towards
    posterior, head to feet.

    Coordinates x, y are pixel centres counted from 0, as in all files of this project; positions
    are in mm in the source's frame, DICOM's LPS (x to the left, y to posterior, z to the head).

    Attributes:
        hu: (S, H, W) int16 Hounsfield units.
        origins_mm: (S, 3) float64, the centre of pixel (0, 0) of each slice. Slices may be unevenly
            spaced, and shifted against each other by a tilted gantry.
        row_direction, column_direction: (3,) unit vectors along rows (increasing x) and along
            columns (increasing y).
        spacing_mm: (of rows, of columns): the size of a pixel along y and along x.
        source: what it was read from.

    Raises:
        ValueError: arrays that do not fit together; directions that are no unit vectors at right
            angles, or not those of axial slices in the orientation above; slices that do not go
            from head to feet, each at a place of its own.
    """

    hu: np.ndarray
    origins_mm: np.ndarray
    row_direction: np.ndarray
    column_direction: np.ndarray
    spacing_mm: tuple[float, float]
    source: Source = field(repr=False)

    def __post_init__(self) -> None:
        for name, shape in (
            ("origins_mm", (len(self.hu), 3)),
            ("row_direction", (3,)),
            ("column_direction", (3,)),
            ("spacing_mm", (2,)),
        ):
            value = np.array(getattr(self, name), np.float64)
            if value.shape != shape or not np.isfinite(value).all():
                raise ValueError(f"{name} must be finite numbers of shape {shape}, got {value}")
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        row, column = self.spacing_mm.tolist()
        object.__setattr__(self, "spacing_mm", (row, column))
        if self.hu.dtype != np.int16 or self.hu.ndim != 3 or not self.hu.size:
            raise ValueError(f"hu must be (S, H, W) int16, got {self.hu.dtype} {self.hu.shape}")
        if not (row > 0 and column > 0):
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        axes = np.stack([self.row_direction, self.column_direction, -self.normal])
        if not np.allclose(axes @ axes.T, np.eye(3), atol=DIRECTION_TOLERANCE):
            raise ValueError(f"directions must be unit vectors at right angles, got {axes[:2]}")
        if (np.diag(axes) <= 0.5).any():
            raise ValueError(
                "rows must run to the patient's left and columns to posterior (LPS), slices be"
                f" axial; the directions are {axes[:2].tolist()}"
            )
        if not (np.diff(self.positions_mm) > 0).all():
            raise ValueError("slices must run from head to feet, each at a place of its own")

    @cached_property
    def normal(self) -> np.ndarray:
        """(3,) unit vector at right angles to the slices, from head to feet."""
        return -np.cross(self.row_direction, self.column_direction)

    @cached_property
    def positions_mm(self) -> np.ndarray:
        """(S,) increasing: where each slice lies along the normal, head to feet."""
        return self.origins_mm @ self.normal

    @cached_property
    def interval_mm(self) -> np.ndarray:
        """(S,) the distance to the next slice; the last one's is that before it.

        Of a single slice infinite: it has no neighbours.
        """
        steps = np.diff(self.positions_mm)
        return np.append(steps, steps[-1]) if len(steps) else np.array([np.inf])

    @cached_property
    def reach_mm(self) -> np.ndarray:
        """(S, 2) how far what belongs to each slice reaches to the head and to the feet.

        Half the way to the neighbour; where there is none, beyond the first and the last slice and
        beside a gap (`ct_volumes.gaps`), as far as on its other side. A slice without neighbours is
        as thick as its header says, or 1 mm.
        """
        halves = np.where(gaps(self.positions_mm), np.nan, np.diff(self.positions_mm) / 2)
        reach = np.stack([np.append(np.nan, halves), np.append(halves, np.nan)], axis=1)
        reach = np.where(np.isnan(reach), reach[:, ::-1], reach)
        return np.where(np.isnan(reach), (self.source.slice_thickness_mm or 1.0) / 2, reach)

    @cached_property
    def extent_mm(self) -> np.ndarray:
        """(S,) how much of the normal belongs to each slice (`reach_mm`), by which areas become
        volumes."""
        return self.reach_mm.sum(axis=1)

    @cached_property
    def sha256(self) -> str:
        """Hash of voxels and geometry, by which the same scan is known again."""
        digest = hashlib.sha256(np.ascontiguousarray(self.hu))
        for part in (self.origins_mm, self.row_direction, self.column_direction, self.spacing_mm):
            digest.update(np.ascontiguousarray(part, np.float64))
        return digest.hexdigest()

    def to_world(self, x: np.ndarray, y: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Pixel coordinates (pixel centres from 0) and slices -> (..., 3) mm in LPS.

        All of one shape, or of shapes that broadcast. Raises IndexError for a slice not there.
        """
        index = np.asarray(index)
        if index.size and not (index.min() >= 0 and index.max() < len(self.hu)):
            raise IndexError(f"slices are 0..{len(self.hu) - 1}, got {index}")
        row, column = self.spacing_mm
        x, y = np.asarray(x, np.float64)[..., None], np.asarray(y, np.float64)[..., None]
        in_plane = x * column * self.row_direction + y * row * self.column_direction
        return self.origins_mm[index] + in_plane

    def in_source(self, array: np.ndarray) -> np.ndarray:
        """An (S, H, W) array on the volume's grid -> the same on the source's (`Source.shape`)."""
        if array.shape != self.hu.shape:
            raise ValueError(f"the array must be {self.hu.shape}, got {array.shape}")
        turned = np.flip(array, [a for a in range(3) if self.source.flipped[a]])
        return np.moveaxis(turned, (0, 1, 2), self.source.axes)

    def points_in_source(self, x: np.ndarray, y: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Pixel coordinates and slices -> (..., 3) indices into the source's array.

        Of DICOM these are (slice of the volume, row, column).
        """
        points = np.stack(np.broadcast_arrays(index, y, x), axis=-1).astype(np.float64)
        last = np.array(self.hu.shape) - 1.0
        points = np.where(self.source.flipped, last - points, points)
        return points[..., np.argsort(self.source.axes)]
