"""The voxel grid of the NIfTI files that are written: of a NIfTI scan its own, of a DICOM series
the one that ITK (3D Slicer, SimpleITK) makes of it: i along the image's columns, j along its rows,
k along the slices in the direction that makes the three right-handed, mostly feet to head."""

from __future__ import annotations

import numpy as np

from ct_volumes.volume import CTVolume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
RIGHT_ANGLE_TOLERANCE = 1e-3  # of the cosine, as of the directions of a CTVolume


def array_in_nifti(volume: CTVolume, array: np.ndarray) -> np.ndarray:
    """An (S, H, W) array of the volume's grid -> the same (a view) in the grid of NIfTI."""
    there = volume.in_source(array)
    if volume.source.format == "nifti":
        return there
    there = there.transpose(2, 1, 0)
    return there[:, :, ::-1] if _runs_to_the_head(volume) else there


def points_in_nifti(
    volume: CTVolume, x: np.ndarray, y: np.ndarray, index: np.ndarray
) -> np.ndarray:
    """Pixel coordinates and slices of the volume -> (..., 3) voxel coordinates i, j, k."""
    points = volume.points_in_source(x, y, index)
    if volume.source.format == "nifti":
        return points
    points = points[..., ::-1].copy()
    if _runs_to_the_head(volume):
        points[..., 2] = len(volume.hu) - 1 - points[..., 2]
    return points


def nifti_affine(volume: CTVolume) -> tuple[np.ndarray, float, bool]:
    """The affine of the grid, how far it is wrong, and whether it is sheared.

    Slices of a DICOM series lie along the straight line that fits their places best (least
    squares). It is exact if they are evenly spaced, tilted or not.

    Returns:
        (4, 4) from voxels (i, j, k) to mm in RAS; the largest distance in mm between a slice's
        place by it and its own; whether its axes are not at right angles, as of a tilted gantry.
    """
    error_mm = 0.0
    if volume.source.format == "nifti":
        affine = np.array(volume.source.affine, np.float64)
    else:
        number = np.arange(len(volume.hu))
        if len(number) > 1:
            design = np.stack([np.ones(len(number)), number], axis=1)
            origin, step = np.linalg.lstsq(design, volume.origins_mm, rcond=None)[0]
        else:
            origin, step = volume.origins_mm[0], volume.extent_mm[0] * volume.normal
        fitted = origin + number[:, None] * step
        error_mm = float(np.linalg.norm(fitted - volume.origins_mm, axis=1).max())

        row, column = volume.spacing_mm
        to_lps, to_grid = np.eye(4), np.eye(4)  # from (x, y, slice)
        to_lps[:3, 0], to_lps[:3, 1] = column * volume.row_direction, row * volume.column_direction
        to_lps[:3, 2], to_lps[:3, 3] = step, origin
        to_grid[:3, 3] = points_in_nifti(volume, 0, 0, 0)
        to_grid[:3, :3] = (points_in_nifti(volume, *np.eye(3)) - to_grid[:3, 3]).T
        affine = LPS_TO_RAS @ to_lps @ np.linalg.inv(to_grid)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    sheared = not np.allclose(axes.T @ axes, np.eye(3), atol=RIGHT_ANGLE_TOLERANCE)
    return affine, error_mm, sheared


def _runs_to_the_head(volume: CTVolume) -> bool:
    """Whether k runs against the volume's slices, which run from head to feet.

    x, y and head to feet are left-handed; each of a transposition and flips in plane changes that.
    """
    _, rows, columns = volume.source.axes
    return not ((rows > columns) ^ volume.source.flipped[1] ^ volume.source.flipped[2])
