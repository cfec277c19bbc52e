"""Whole phantom scans on disk, as DICOM and as NIfTI, with their truth: detection in whole scans is
tried and measured on them, no data needed."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ct_volumes import optional
from ct_volumes.scan_out import write_dicom_series, write_nifti_labels, write_nifti_scan
from ct_volumes.volume import CTVolume, Source
from deeplesion.files import write_whole
from deeplesion.phantom.make import check_options, claim, once
from deeplesion.phantom.scans import PhantomScan, ScanPlan, TrueFinding, draw_scan
from deeplesion.processes import in_processes

SPLIT = "test"  # of the truth: nothing is trained on whole scans


def make_scans(
    root: str | Path,
    patients: int = 4,
    size: int = 512,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write one whole CT of each of `patients` phantom patients, slices of `size` px a side.

    Scans of odd numbers have slices of 1 mm, those of even numbers of 5 mm. In `root`:

    - `dicom/phantom_001/` and `nifti/phantom_001.nii.gz`: the same scan;
    - `truth/phantom_001.nii.gz`: whose voxel it is, by the lesion's number;
    - `truth.json`: {"test": {"phantom_001": [[x1, y1, z1, x2, y2, z2], ...]}}, whole voxels
      inclusive, z from 0 head to feet, of every lesion. In x and y the boxes have the benchmark's
      margin of 5 pixels, as those that detectors are trained on;
    - `truth_lesions.json`: the same lesions with their boxes without margin, volume, diameters and
      place, and the distractors (docs/ct_phantom.md).

    The same patients, size and seed give the same bytes whatever the number of workers. After an
    interruption the same call continues the work. Returns the path of `truth.json`, the last file.

    Raises:
        UserError: an option out of range; pydicom or nibabel is not installed.
        FileExistsError: `root` holds anything else.
    """
    check_options(
        ("patients", patients, 1, 999),
        ("size", size, 128, 512),
        ("seed", seed, 0, 2**32 - 1),
        ("workers", workers, 1, 1024),
    )
    optional.need("scans are written with", "pydicom", "nibabel")
    root = Path(root)
    arguments = {"scans_version": 2, "patients": patients, "size": size, "seed": seed}
    claim(root, root / "arguments.json", arguments)
    truth, unfinished = root / "truth.json", root / "unfinished"
    if not truth.exists():
        plans = [ScanPlan(number, size, seed) for number in range(1, patients + 1)]
        bar = partial(tqdm, total=patients, desc="scans", disable=not progress)
        with closing(in_processes(partial(write_scan, root), plans, workers, 1)) as made:
            records = dict(zip([plan.name for plan in plans], bar(made), strict=True))
        boxes = {name: [lesion["box"] for lesion in r["lesions"]] for name, r in records.items()}
        write_whole(root / "truth_lesions.json", json.dumps(records, indent=1))
        write_whole(truth, json.dumps({SPLIT: boxes}, indent=1))
    shutil.rmtree(unfinished, ignore_errors=True)
    return truth


def write_scan(root: Path, plan: ScanPlan) -> dict:
    """Draw a scan and write all of it but its part of the two JSON files, which is returned, unless
    `once` knows of it."""
    return once(root / "unfinished" / f"{plan.name}.json", lambda: _write_scan(root, plan))


def _write_scan(root: Path, plan: ScanPlan) -> dict:
    scan = draw_scan(plan)
    volume = volume_of(scan, root)
    folder = root / "dicom" / plan.name
    if not folder.exists():  # it is there as a whole or not at all
        write_dicom_series(
            volume,
            folder,
            # Not as the folder is called, which detect.py would then hide.
            patient_name="Synthetic^Patient",
            patient_id=f"S{plan.seed}N{plan.number}",
            description=f"Synthetic CT {plan.thickness:g} mm",
            seed=plan.seed,
        )
    write_nifti_scan(volume, root / "nifti" / f"{plan.name}.nii.gz")
    write_nifti_labels(scan.labels, volume, root / "truth" / f"{plan.name}.nii.gz")
    return _record(scan)


def volume_of(scan: PhantomScan, path: Path) -> CTVolume:
    """The scan where it lies: the image's middle at x = y = 0, the top of the chest at z = 0 mm."""
    _, spacing, thickness = scan.scan
    first = _place(scan, np.zeros(3))
    origins = first - np.arange(len(scan.hu))[:, None] * (0, 0, thickness)
    source = Source(path, "dicom", scan.hu.shape, slice_thickness_mm=thickness)
    return CTVolume(scan.hu, origins, (1, 0, 0), (0, 1, 0), (spacing, spacing), source)


def _place(scan: PhantomScan, point: np.ndarray) -> np.ndarray:
    """x, y in pixels and the height below the top of the chest in mm -> mm in LPS."""
    size, spacing, _ = scan.scan
    middle = (size - 1) / 2
    return np.array([(point[0] - middle) * spacing, (point[1] - middle) * spacing, -point[2]])


def _record(scan: PhantomScan) -> dict:
    def described(finding: TrueFinding) -> dict:
        return {
            "shape": finding.shape,
            "lesion_type": finding.lesion_type,
            "diameters_mm": _rounded(finding.diameters_mm),
            "centroid_mm": _rounded(_place(scan, finding.centroid)),
        }

    return {
        "shape": list(scan.hu.shape),
        "spacing_mm": [scan.scan.spacing] * 2,
        "thickness_mm": scan.scan.thickness,
        "lesions": [
            {
                "number": lesion.number,
                "box": lesion.box.tolist(),
                "tight_box": lesion.tight_box.tolist(),
                "volume_mm3": round(float(lesion.volume_mm3), 3),
                **described(lesion),
            }
            for lesion in scan.lesions
        ],
        "distractors": [described(distractor) for distractor in scan.distractors],
    }


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values, 3).tolist()
