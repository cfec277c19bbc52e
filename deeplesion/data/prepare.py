"""DeepLesion as downloaded from NIH -> `annotations/{train,val,test}.json` with GrabCut masks, and
a report of all that is not as it should be. The work behind `tools/prepare_data.py`."""

import hashlib
import json
import os
import warnings
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from deeplesion.conventions import PUBLISHED_KEY_SLICES, SPLITS, THIN_MM
from deeplesion.data import recist
from deeplesion.data.coco import encode_mask, to_coco
from deeplesion.data.dl_info import read_dl_info
from deeplesion.data.slices import SliceFolder, files_in_reach
from deeplesion.files import write_whole
from deeplesion.processes import available_cores, in_processes

# The deepest stack of the papers: the neighbours it touches must be there.
NUM_SLICES = 7

_UNFINISHED_NAME = "unfinished.jsonl"
# What the problems are called in the report: key slices are left out for the first four.
_NOT_DOWNLOADED = "series not downloaded"
_MISSING = "missing slice"
_UNREADABLE = "unreadable slice"
_WRONG_SIZE = "wrong image size"
_BOX = "box outside image"
_RECIST = "RECIST outside box"


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did; `str()` of it is the summary a user reads.

    Attributes:
        folder: where the files were written.
        counts: a row a split: `key_slices`, `published`, `thin`, `thick`, `lesions`,
            `not_downloaded` and `broken` (key slices left out).
        problems: `file_name`, `split`, `problem`, `detail`, `left_out`; the content of report.csv.
        noisy: number of lesions dropped because they are flagged as noisy.
    """

    folder: Path
    counts: pd.DataFrame
    problems: pd.DataFrame
    noisy: int

    @property
    def exit_code(self) -> int:
        """1 if data is missing or unreadable, else 0; a partial download is no failure."""
        return int(self.counts.broken.sum() > 0)

    def __str__(self) -> str:
        counts, total = self.counts, int(self.counts.key_slices.sum())
        titles = [name.replace("_", " ") for name in counts.columns]
        lines = [
            counts.to_string(
                header=titles, formatters=["{:,}".format] * len(titles), index_names=False
            ),
            f"{self.noisy:,} lesions flagged as noisy were dropped.",
        ]
        for (problem, left_out), rows in self.problems.groupby(["problem", "left_out"], sort=False):
            fate = "left out" if left_out else "kept"
            lines.append(f"{problem}: {rows.file_name.nunique():,} key slices, {fate}.")
        absent, broken = int(counts.not_downloaded.sum()), int(counts.broken.sum())
        if absent:
            lines.append(
                f"PARTIAL DOWNLOAD: {absent:,} of {total + absent + broken:,} key slices are left"
                " out, as their series are not there. What is there can be used, but results on it"
                " do not compare with published ones."
            )
        if broken:
            lines.append(
                f"MISSING OR UNREADABLE DATA: {broken:,} key slices are left out. Unpack or"
                " download the slices named in the report again, then run this command again."
            )
        if (counts.key_slices == counts.published).all():
            lines.append("The numbers of key slices are the published ones.")
        elif not absent and not broken:
            lines.append("The table of lesions is not the official one: published counts differ.")
        lines.append(f"Written to {self.folder}: train.json, val.json, test.json, report.csv")
        return "\n".join(lines)


def prepare(
    root: str | Path, csv: str | Path | None = None, workers: int | None = None
) -> Preparation:
    """Write `root/annotations/{train,val,test}.json` and `report.csv` for the data set in `root`.

    `root` holds NIH's `DL_info.csv` (or give `csv`) and `Images_png`. Every clean (not noisy)
    lesion gets a mask drawn by `recist.mask_from_recist`; `coco.to_coco` says what the files
    hold. The bytes written do not depend on `workers` (processes, default: all cores).

    A key slice is left out, and reported, if its series is not there (a partial download) or if its
    data is broken: the slice or a neighbour within reach of a stack of 7 slices is missing, the
    slice is unreadable or not of the size the table says. Neighbours are not decoded. Boxes outside
    their image (clipped) and RECIST end points outside their box are reported and kept.

    If it is interrupted, the finished key slices are kept in `root/annotations/unfinished.jsonl`,
    and the next call continues from there unless the table or the code that draws masks changed.

    With more than one worker processes are spawned: call it from under `if __name__ == "__main__"`.
    Raises FileNotFoundError if there is no table or not one of its series, ValueError if the table
    is bad, RuntimeError if a process was killed.
    """
    root = Path(root)
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    csv = _existing_table(root, csv)
    with warnings.catch_warnings():
        # Clipped boxes: they go to the report instead.
        warnings.simplefilter("ignore", UserWarning)
        lesions = read_dl_info(csv)
    clean = lesions[~lesions.noisy]
    key_slices = {}  # file name -> its rows of the table
    for lesion in clean.itertuples():
        key_slices.setdefault(lesion.file_name, []).append(lesion)
    present = _series_present(root, {_series(name) for name in key_slices})

    folder = root / "annotations"
    folder.mkdir(exist_ok=True)
    unfinished = folder / _UNFINISHED_NAME
    there = [name for name in key_slices if _series(name) in present]
    finished, unfinished_file = _open_unfinished(unfinished, _fingerprint(csv))
    results = {name: finished[name] for name in there if name in finished}
    with unfinished_file:
        pending = [_task(key_slices[name]) for name in there if name not in results]
        work = partial(_draw_masks, SliceFolder(root / "Images_png"))
        progress = tqdm(total=len(there), initial=len(there) - len(pending), unit=" key slices")
        with progress, closing(in_processes(work, pending, workers)) as drawn:
            for result in drawn:
                results[result["file_name"]] = result
                if "masks" in result:  # a broken one may be repaired until the next call
                    unfinished_file.write(_json_line(result))
                    unfinished_file.flush()
                progress.update()

    problems = _problems(key_slices, results)
    counts = _write_annotations(folder, clean, results, problems)
    write_whole(folder / "report.csv", problems.to_csv(index=False, lineterminator="\n"))
    unfinished.unlink()
    return Preparation(folder, counts, problems, int(lesions.noisy.sum()))


def _existing_table(root: Path, csv: str | Path | None) -> Path:
    path = root / "DL_info.csv" if csv is None else Path(csv)
    if not path.is_file():
        raise FileNotFoundError(f"table of lesions not found: {path}\n{_advice(root)}")
    return path


def _series_present(root: Path, wanted: set[str]) -> set[str]:
    images = root / "Images_png"
    there = {entry.name for entry in os.scandir(images)} if images.is_dir() else set()
    if wanted and not wanted & there:
        raise FileNotFoundError(
            f"no image found: {images} holds none of the {len(wanted):,} series of the table, such"
            f" as {images / min(wanted)}\n{_advice(root)}"
        )
    return wanted & there


def _advice(root: Path) -> str:
    return (
        f"Expected DL_info.csv and Images_png in {root}. Download them (NIH Clinical Center,"
        " DeepLesion, https://nihcc.app.box.com/v/DeepLesion) and unpack every archive there, or"
        f" make a synthetic data set: python tools/make_phantom.py {root}"
    )


def _series(file_name: str) -> str:
    return file_name.partition("/")[0]


def _task(lesions: list) -> dict:
    """All that a worker needs to know about a key slice, from its rows of the table."""
    first = lesions[0]
    return {
        "file_name": first.file_name,
        "shape": (first.height, first.width),
        "neighbours": files_in_reach(
            first.file_name, first.thickness_mm, first.slice_range, NUM_SLICES
        ),
        "lesions": [(lesion.bbox, lesion.recist) for lesion in lesions],
    }


def _draw_masks(folder: SliceFolder, task: dict) -> dict:
    """The masks of a key slice as COCO RLE, or the problem for which it is left out."""
    name = task["file_name"]
    missing = [
        neighbour for neighbour in task["neighbours"] if not folder.path(neighbour).is_file()
    ]
    if missing:
        return {"file_name": name, "problem": _MISSING, "detail": " ".join(missing)}
    try:
        hu = folder.read(name)
    except (ValueError, OSError) as error:
        return {"file_name": name, "problem": _UNREADABLE, "detail": str(error)}
    if hu.shape != task["shape"]:
        detail = f"{hu.shape} instead of {task['shape']} (height, width)"
        return {"file_name": name, "problem": _WRONG_SIZE, "detail": detail}
    masks = [recist.mask_from_recist(hu, bbox, ends) for bbox, ends in task["lesions"]]
    return {"file_name": name, "masks": [encode_mask(mask) for mask in masks]}


def _problems(key_slices: dict, results: dict) -> pd.DataFrame:
    """Every problem, in the order of the table: one for a key slice left out, else its lesions'."""
    problems = []
    for name, lesions in key_slices.items():
        result = results.get(name, {"problem": _NOT_DOWNLOADED, "detail": _series(name)})
        if "problem" in result:
            found = [(result["problem"], result["detail"])]
        else:
            found = [p for lesion in lesions for p in _problems_of_box(lesion)]
        left_out = "problem" in result
        problems += [(name, lesions[0].split, what, why, left_out) for what, why in found]
    return pd.DataFrame(problems, columns=["file_name", "split", "problem", "detail", "left_out"])


def _problems_of_box(lesion) -> list[tuple[str, str]]:
    found = []
    box = f"x1, y1, x2, y2 = {np.round(lesion.bbox, 3).tolist()}"
    if lesion.clipped:
        found.append((_BOX, f"clipped to {box}"))
    # Boxes are given to six digits, hence the tolerance.
    low, high = lesion.recist.min(0), lesion.recist.max(0)
    if (low < lesion.bbox[:2] - 0.01).any() or (high > lesion.bbox[2:] + 0.01).any():
        found.append((_RECIST, f"{box}, RECIST {np.round(lesion.recist, 3).tolist()}"))
    return found


def _write_annotations(
    folder: Path, clean: pd.DataFrame, results: dict, problems: pd.DataFrame
) -> pd.DataFrame:
    """Write a COCO file for each split and count what is in it and what was left out."""
    drawn = {name: iter(result.get("masks", ())) for name, result in results.items()}
    masks = [next(drawn.get(name, iter(())), None) for name in clean.file_name]
    masks = pd.Series(masks, clean.index, dtype=object)
    counts = {}
    for split in SPLITS.values():
        chosen = (clean.split == split) & masks.notna()
        lesions = clean[chosen]
        text = json.dumps(to_coco(lesions, masks[chosen]), separators=(",", ":"), allow_nan=False)
        write_whole(folder / f"{split}.json", text)

        thickness = lesions.groupby("file_name").thickness_mm.first()
        left_out = problems[(problems.split == split) & problems.left_out].problem
        counts[split] = {
            "key_slices": len(thickness),
            "published": PUBLISHED_KEY_SLICES[split],
            "thin": (thickness <= THIN_MM).sum(),
            "thick": (thickness > THIN_MM).sum(),
            "lesions": len(lesions),
            "not_downloaded": (left_out == _NOT_DOWNLOADED).sum(),
            "broken": (left_out != _NOT_DOWNLOADED).sum(),
        }
    return pd.DataFrame.from_dict(counts, orient="index")


def _fingerprint(csv: Path) -> str:
    """Changes with the table, and with the code that draws masks and OpenCV, which it rests on."""
    digest = hashlib.sha256(csv.read_bytes())
    digest.update(Path(recist.__file__).read_bytes())
    digest.update(cv2.__version__.encode())
    return digest.hexdigest()


def _open_unfinished(path: Path, fingerprint: str) -> tuple[dict, BinaryIO]:
    """What an interrupted call finished, and the file to which further results are appended."""
    header = _json_line({"fingerprint": fingerprint})
    content = path.read_bytes() if path.exists() else b""
    results, good = {}, 0
    if content.startswith(header):
        good = len(header)
        for line in content[good:].splitlines(keepends=True):
            try:
                result = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            results[result["file_name"]] = result
            good += len(line)
    file = open(path, "r+b" if good else "wb")  # noqa: SIM115, the caller closes it
    # A line torn by the interruption goes.
    file.truncate(good)
    file.seek(good)
    if not good:
        file.write(header)
        file.flush()
    return results, file


def _json_line(value: dict) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"
