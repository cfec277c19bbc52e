"""Lesions as files for programs: JSON with everything, a CSV table, prompts for LesionLocator.
No name and no number of the patient stands in them unless asked for. docs/ct_output.md has every
field."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ct_volumes.lesions import Algorithm, Lesion, LesionSlice, Patch
from ct_volumes.nifti_grid import array_in_nifti, points_in_nifti
from ct_volumes.volume import CTVolume
from deeplesion.data.coco import encode_mask
from deeplesion.data.coco import read_json as read_any_json
from deeplesion.data.run_lengths import mask_areas
from deeplesion.errors import DataError
from deeplesion.files import write_whole

FORMAT = "deeplesion-ct-lesions"
FORMAT_VERSION = 1
RESEARCH_ONLY = "Found by software for research. It is not a medical device: not for diagnosis."
UNITS = {
    "x, y": "pixel centres of the volume's grid, from 0; x to the patient's left, y to posterior",
    "slice": "of the volume, from 0, head to feet",
    "*_mm": "mm; three numbers are a place in the source's frame, DICOM's LPS",
    "volume_mm3": "mm3",
    "score": "0 to 1",
}
PATIENT = {
    "name": "PatientName",
    "id": "PatientID",
    "birth_date": "PatientBirthDate",
    "accession_number": "AccessionNumber",
    "institution": "InstitutionName",
    "series_description": "SeriesDescription",
}
CSV_COLUMNS = (
    "number", "score", "volume_mm3", "long_mm", "short_mm", "x_mm", "y_mm", "z_mm",
    "x1", "y1", "first_slice", "x2", "y2", "last_slice", "recist_slice",
    "long_x1", "long_y1", "long_x2", "long_y2", "short_x1", "short_y1", "short_x2", "short_y2",
    "recist_sop_instance_uid", "recist_frame_number",
)  # fmt: skip


def write_json(
    path: Path,
    lesions: Sequence[Lesion],
    volume: CTVolume,
    algorithm: Algorithm,
    identify: bool = False,
) -> None:
    """Writes everything known of the lesions, numbered from 1 in their order.

    Args:
        identify: also the path of the scan, and of DICOM who the patient is and what the series is
            called. Without it the file holds neither; the UIDs of series and slices it always has.

    Raises:
        DataError: a scan without the files that `identify` needs.
        ValueError: a number that is not finite.
    """
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "notice": RESEARCH_ONLY,
        "units": UNITS,
        "algorithm": {
            "name": algorithm.name,
            "version": algorithm.version,
            "checkpoint_sha256": algorithm.checkpoint_sha256,
            "options": algorithm.options,
        },
        "scan": _scan(volume, identify),
        "lesions": [_lesion(n, lesion, volume) for n, lesion in enumerate(lesions, 1)],
    }
    write_whole(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_csv(
    path: Path, lesions: Sequence[Lesion], volume: CTVolume, algorithm: Algorithm
) -> None:
    """Writes one row a lesion, `CSV_COLUMNS` in the first row. The algorithm has no column."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for number, lesion in enumerate(lesions, 1):
        instance = _instance(volume, lesion.recist_index)
        writer.writerow(
            [
                number,
                *_rounded([lesion.score], 6),
                *_rounded([lesion.volume_mm3, *lesion.diameters_mm, *lesion.centroid_mm], 3),
                *_box(lesion),
                lesion.recist_index,
                *_rounded(np.ravel(lesion.recist), 3),
                instance.get("sop_instance_uid", ""),
                instance.get("frame_number", ""),
            ]
        )
    write_whole(Path(path), table.getvalue())


def write_prompts(
    path: Path, lesions: Sequence[Lesion], volume: CTVolume, algorithm: Algorithm
) -> None:
    """Writes prompts for LesionLocator (Rokuss et al., CVPR 2025): a point and a box a lesion.

    JSON by the number of the lesion as text: `point` [i, j, k], a voxel of the lesion, and `box`
    [i1, j1, k1, i2, j2, k2], its outermost voxels, both inclusive. The voxels are whole numbers
    from 0 in the grid of `write_nifti`, of a NIfTI scan its own.
    """
    prompts = {}
    last_voxel = np.array(array_in_nifti(volume, volume.hu).shape) - 1
    for number, lesion in enumerate(lesions, 1):
        x1, y1, first, x2, y2, last = lesion.box
        corners = points_in_nifti(volume, np.array([x1, x2]), np.array([y1, y2]), [first, last])
        # The pixels whose area the box touches.
        low, high = np.floor(corners.min(axis=0) + 0.5), np.ceil(corners.max(axis=0) - 0.5)
        low, high = np.clip(low, 0, last_voxel), np.clip(high, 0, last_voxel)
        prompts[str(number)] = {
            "point": [round(float(v)) for v in points_in_nifti(volume, *_inner_point(lesion))],
            "box": [int(v) for v in (*low, *np.maximum(low, high))],
        }
    write_whole(Path(path), json.dumps(prompts, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """What `write_json` wrote, checked: a dictionary with `scan`, `algorithm` and `lesions`.

    Raises DataError (MissingDataError if there is no file) that names the file and the lesion.
    """
    path = Path(path)
    content = read_any_json(path, "a file of lesions")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a lesions.json: `format` must be {FORMAT!r}")
    if content.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {content.get('format_version')!r}, this version of the"
            f" project reads {FORMAT_VERSION}. Write it again with tools/detect.py"
        )
    scan, lesions = content.get("scan"), content.get("lesions")
    shape = scan.get("shape") if isinstance(scan, dict) else None
    if not (_are_numbers(shape, 3) and all(isinstance(n, int) and n > 0 for n in shape)):
        raise DataError(f"{path}: scan.shape must be [slices, rows, columns], got {shape!r}")
    if not isinstance(content.get("algorithm"), dict) or not isinstance(lesions, list):
        raise DataError(f"{path}: `algorithm` must be a dictionary and `lesions` a list")
    for number, lesion in enumerate(lesions, 1):
        problem = _problem(lesion, number, shape)
        if problem:
            raise DataError(f"{path}: lesion {number}: {problem}")
    return content


def _scan(volume: CTVolume, identify: bool) -> dict:
    source = volume.source
    several = len(volume.hu) > 1
    scan = {
        "format": source.format,
        "shape": list(volume.hu.shape),
        "spacing_mm": _rounded(volume.spacing_mm, 6),
        "intervals_mm": _rounded(volume.interval_mm[:-1], 4) if several else [],
        "origins_mm": [_rounded(origin, 4) for origin in volume.origins_mm],
        "row_direction": _rounded(volume.row_direction, 8),
        "column_direction": _rounded(volume.column_direction, 8),
        "slice_thickness_mm": source.slice_thickness_mm,
        "sha256": volume.sha256,
        "source_shape": list(source.shape),
        "source_axes": list(source.axes),
        "source_flipped": list(source.flipped),
        "notes": [source.without_paths(note) for note in source.notes],
    }
    if source.format == "nifti":
        scan["affine_ras"] = np.asarray(source.affine, float).tolist()
    else:
        scan |= {
            "series_instance_uid": source.series_uid,
            "frame_of_reference_uid": source.frame_of_reference_uid,
            "series_number": source.number,
            "kernel": source.kernel,
        }
    if identify:
        scan["path"] = str(source.path)
        if source.format == "dicom":
            from ct_volumes.dicom_in import read_header  # here, for pydicom is an extra

            header = read_header(source.instances[0])
            scan["patient"] = {key: str(header.get(tag) or "") for key, tag in PATIENT.items()}
    return scan


def _lesion(number: int, lesion: Lesion, volume: CTVolume) -> dict:
    x, y = np.asarray(lesion.recist).T
    return {
        "number": number,
        "score": float(lesion.score),  # as it is: a threshold may be made of it
        "box": _box(lesion),
        "centroid_mm": _rounded(lesion.centroid_mm, 3),
        "volume_mm3": _rounded([lesion.volume_mm3], 3)[0],
        "diameters_mm": _rounded(lesion.diameters_mm, 3),
        "recist": {
            "slice": int(lesion.recist_index),
            "points": [_rounded(point, 3) for point in lesion.recist],
            "points_mm": [_rounded(p, 3) for p in volume.to_world(x, y, lesion.recist_index)],
            "source_points": _in_source(volume, x, y, lesion.recist_index),
            **_instance(volume, lesion.recist_index),
        },
        "best_slice": int(lesion.best.index),
        "slices": [_slice(each, volume) for each in lesion.slices],
    }


def _slice(each: LesionSlice, volume: CTVolume) -> dict:
    mask = np.zeros(volume.hu.shape[1:], np.uint8)
    each.patch.paint(mask, 1)
    corners = np.reshape(each.bbox, (2, 2))
    found = np.array(_in_source(volume, corners[:, 0], corners[:, 1], each.index))
    return {
        "slice": int(each.index),
        "box": _rounded(each.bbox, 3),
        "detected": each.score is not None,
        "score": None if each.score is None else float(each.score),
        "mask": encode_mask(mask),
        "source_box": [*found.min(axis=0).tolist(), *found.max(axis=0).tolist()],
        **_instance(volume, each.index),
    }


def _in_source(volume: CTVolume, x: np.ndarray, y: np.ndarray, index: int) -> list[list[float]]:
    """Points on a slice in the source's own indices: (column, row) of DICOM, (i, j, k) of NIfTI."""
    points = volume.points_in_source(x, y, index)
    if volume.source.format == "dicom":
        points = points[:, :0:-1]
    return [_rounded(point, 3) for point in points]


def _instance(volume: CTVolume, index: int) -> dict:
    """Which DICOM image a slice is; nothing of a NIfTI source."""
    if volume.source.format != "dicom":
        return {}
    instance = volume.source.instances[index]
    found = {"sop_instance_uid": instance.uid}
    if instance.frame is not None:
        found["frame_number"] = instance.frame + 1  # DICOM counts frames from 1
    return found


def _box(lesion: Lesion) -> list[float]:
    x1, y1, first, x2, y2, last = lesion.box
    return [*_rounded((x1, y1), 3), int(first), *_rounded((x2, y2), 3), int(last)]


def _inner_point(lesion: Lesion) -> tuple[int, int, int]:
    """x, y, slice of the pixel farthest from the mask's outline, on the slice of RECIST."""
    patch: Patch = next(s.patch for s in lesion.slices if s.index == lesion.recist_index)
    depth = cv2.distanceTransform(np.pad(patch.mask, 1).astype(np.uint8), cv2.DIST_L2, 5)
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return patch.x + int(column) - 1, patch.y + int(row) - 1, lesion.recist_index


def _rounded(values: Sequence[float], digits: int) -> list[float]:
    numbers = [round(float(value), digits) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"a lesion's numbers must be finite, got {numbers}")
    return numbers


def _are_numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    )


def _problem(lesion: object, number: int, shape: list[int]) -> str | None:
    """What is wrong with a lesion of the file, or None."""
    if not isinstance(lesion, dict):
        return "it must be a dictionary"
    if lesion.get("number") != number:
        return f"`number` must be {number}, its place, got {lesion.get('number')!r}"
    if not _are_numbers([lesion.get("score")], 1) or not 0 <= lesion["score"] <= 1:
        return f"`score` must be a number from 0 to 1, got {lesion.get('score')!r}"
    box = lesion.get("box")
    if not _are_numbers(box, 6) or any(a > b for a, b in zip(box[:3], box[3:])):
        return f"`box` must be x1 <= x2, y1 <= y2, first <= last in 6 numbers, got {box!r}"
    if not (isinstance(box[2], int) and isinstance(box[5], int)):
        return f"slices of `box` must be whole numbers, got {box[2]} and {box[5]}"
    if not (box[2] >= 0 and box[5] < shape[0]):
        return f"`box` must lie on slices 0..{shape[0] - 1}, got {box[2]}..{box[5]}"
    for name, count in (("centroid_mm", 3), ("diameters_mm", 2)):
        if not _are_numbers(lesion.get(name), count):
            return f"`{name}` must be {count} numbers, got {lesion.get(name)!r}"
    if not _are_numbers([lesion.get("volume_mm3")], 1) or lesion["volume_mm3"] < 0:
        return f"`volume_mm3` must be a number from 0, got {lesion.get('volume_mm3')!r}"
    slices = lesion.get("slices")
    if not isinstance(slices, list) or not all(isinstance(s, dict) for s in slices):
        return "`slices` must be a list of dictionaries"
    if [s.get("slice") for s in slices] != list(range(box[2], box[5] + 1)):
        return f"`slices` must be those of the box, {box[2]} to {box[5]}, in order"
    if not all(_are_numbers(s.get("box"), 4) for s in slices):
        return "every slice's `box` must be 4 numbers"
    masks = [s.get("mask") if isinstance(s.get("mask"), dict) else {} for s in slices]
    areas = mask_areas([m.get("counts") for m in masks], [shape[1] * shape[2]] * len(masks))
    if (areas < 1).any() or any(m.get("size") != shape[1:] for m in masks):
        return f"every slice's `mask` must be the run lengths of a mask of {shape[1:]} pixels"
    return None
