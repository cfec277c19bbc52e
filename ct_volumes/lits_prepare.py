"""LiTS's NIfTI files -> what DeepLesion's data set class reads: 16-bit PNG slices 1.5 mm apart, and
COCO files of the training and the validation cases."""

from __future__ import annotations

import json
import math
import os
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ct_volumes.lits import STEP_MM, Files, Folder, find_cases, read_case, resample, split
from ct_volumes.lits_samples import ANNOTATION_FILES, instances_of, to_coco
from deeplesion.data.coco import read_json
from deeplesion.data.locate import IMAGES
from deeplesion.data.slices import slice_name, write_slice
from deeplesion.errors import DataError, UserError
from deeplesion.files import write_whole
from deeplesion.lock import only_writer
from deeplesion.processes import available_cores, in_processes

RECORDS = "cases"  # folder: what is known of the slices of each case that is finished
VERSION = 1  # of what is written
MOST_WORKERS = 4  # by default: each holds a scan twice, 1 GB of a long one


@dataclass(frozen=True)
class Preparation:
    """What was prepared.

    Attributes:
        folder: what was found in the LiTS folder.
        slices: of each split that has cases, (cases, slices, slices with liver, with a lesion).
        without_geometry: the cases whose affine is the identity.
        left_out: case -> why it could not be read.
    """

    folder: Folder
    slices: dict[str, tuple[int, int, int, int]]
    without_geometry: tuple[int, ...]
    left_out: dict[int, str]

    @property
    def exit_code(self) -> int:
        return int(bool(self.left_out))

    def __str__(self) -> str:
        lines = [str(self.folder)]
        for name, (cases, slices, liver, lesion) in self.slices.items():
            lines.append(
                f"{name}: {cases} cases, {slices:,} slices, {liver:,} with liver, {lesion:,} with"
                " a lesion"
            )
        lines += [f"{name}: no case of it" for name in ANNOTATION_FILES if name not in self.slices]
        if self.without_geometry:
            lines.append(
                f"the affine is the identity, so that millimetres are wrong, of:"
                f" {', '.join(map(str, self.without_geometry))}"
            )
        lines += [f"case {number} is left out: {why}" for number, why in self.left_out.items()]
        return "\n".join(lines)


def prepare_lits(
    source: str | Path,
    out: str | Path,
    workers: int | None = None,
    step_mm: float = STEP_MM,
    progress: bool = True,
) -> Preparation:
    """Prepare the cases of a LiTS folder in `out`.

    Writes Images_png/lits_006/000.png ..., HU + 32768, one slice every `step_mm` along z, pixels as
    they are; and annotations/train.json and val.json (see `lits_samples`), the cases as `split()`
    has them, with all their slices. A case that is finished is not done again unless one of its
    files is another by size or time, so the same call goes on after an interruption, or with
    further cases. While slices change there is no train.json and no val.json. A case that cannot be
    read is left out and named.

    Raises:
        MissingDataError: no case of LiTS there. DataError: none that can be read.
        UserError: `out` holds something else. FolderInUse: another process writes there.
    """
    source, out = Path(source), Path(out)
    folder = find_cases(source)
    if out.exists() and not (out / RECORDS).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no prepared LiTS: give another --out")
    (out / RECORDS).mkdir(parents=True, exist_ok=True)
    workers = workers or min(available_cores(), MOST_WORKERS)
    work = partial(_prepare_case_or_say_why, out, step_mm)
    cases = list(folder.cases.values())
    with only_writer(out / RECORDS / "prepare.lock", "--out"):
        bar = partial(tqdm, total=len(cases), desc="cases", disable=not progress)
        with closing(in_processes(work, cases, workers, 1)) as made:
            results = dict(zip(folder.cases, bar(made), strict=True))
        left_out = {number: why for number, why in results.items() if isinstance(why, str)}
        records = {number: r for number, r in results.items() if number not in left_out}
        if not records:
            raise DataError("no case can be read:\n" + "\n".join(left_out.values()))
        info = {"lits": os.path.abspath(source), "step_mm": step_mm, "masks": "LiTS's labels"}
        counts = {}
        for (name, file), numbers in zip(ANNOTATION_FILES.items(), split(), strict=True):
            slices = [s for n in numbers if n in records for s in records[n]["slices"]]
            if not slices:
                (out / file).unlink(missing_ok=True)  # of an earlier call
                continue
            write_whole(out / file, json.dumps(to_coco(slices, info)))
            categories = [{i["category_id"] for i in s["instances"]} for s in slices]
            counts[name] = (
                sum(n in records for n in numbers),
                len(slices),
                sum(1 in found for found in categories),
                sum(2 in found for found in categories),
            )
    unknown = tuple(n for n, record in records.items() if not record["known_geometry"])
    return Preparation(folder, counts, unknown, left_out)


def _prepare_case_or_say_why(out: Path, step_mm: float, files: Files) -> dict | str:
    try:
        return prepare_case(out, step_mm, files)
    except DataError as error:
        return str(error)


def prepare_case(out: Path, step_mm: float, files: Files) -> dict:
    """Write the slices of a case and its record, unless they are there; train.json and val.json are
    removed before. Returns the record."""
    path = out / RECORDS / f"{series_name(files.number)}.json"
    made_of = {"version": VERSION, "step_mm": step_mm}
    for kind in ("volume", "segmentation"):
        state = getattr(files, kind).stat()
        made_of[kind] = [state.st_size, state.st_mtime_ns]
    if path.exists():
        record = read_json(path, "a record of tools/prepare_data.py --lits")
        known = isinstance(record, dict) and record.get("made_of") == made_of
        if known and all(
            (out / IMAGES / each["image"]["file_name"]).is_file() for each in record["slices"]
        ):
            return record
    for outdated in (*(out / file for file in ANNOTATION_FILES.values()), path):
        outdated.unlink(missing_ok=True)  # before the slices change
    case = read_case(files)
    resampled = resample(case, step_mm)
    hu, labels = resampled.volume.hu, resampled.labels
    series = series_name(files.number)
    image = dict(
        height=hu.shape[1],
        width=hu.shape[2],
        thickness_mm=step_mm,
        spacing_mm=math.sqrt(math.prod(case.volume.spacing_mm)) if case.known_geometry else None,
        slice_range=[0, len(hu) - 1],
        patient=files.number,
        study=1,
        series=1,
    )
    slices = []
    for index in range(len(hu)):
        name = slice_name(series, index)
        write_slice(out / IMAGES / name, hu[index])
        slices.append(
            dict(
                image={"file_name": name, **image, "key_slice": index},
                instances=instances_of(labels[index]),
            )
        )
    record = dict(made_of=made_of, known_geometry=case.known_geometry, slices=slices)
    write_whole(path, json.dumps(record))
    return record


def series_name(number: int) -> str:
    """The folder of a case's slices in Images_png: 'lits_006'."""
    return f"lits_{number:03d}"
