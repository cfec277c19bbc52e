"""DeepLesion as downloaded from NIH -> `annotations/{train,val,test}.json` with GrabCut masks, and
a report of all that is not as it should be. The work behind `tools/prepare_data.py`."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from deeplesion.conventions import PUBLISHED_KEY_SLICES, SPLITS, THIN_MM
from deeplesion.data import recist
from deeplesion.data.coco import encode_mask, to_coco
from deeplesion.data.dl_info import read_dl_info
from deeplesion.data.locate import ANNOTATIONS, IMAGES, advice, find_image_folders, find_table
from deeplesion.data.slices import SliceFolder, files_in_reach
from deeplesion.data.unfinished import UNFINISHED, json_line, open_unfinished
from deeplesion.errors import MissingDataError, UserError, WriteError
from deeplesion.files import explained, write_whole
from deeplesion.lock import only_writer
from deeplesion.processes import available_cores, in_processes

# The deepest stack of the papers: the neighbours it touches must be there.
NUM_SLICES = 7

# Who draws the masks, by the name of the recipe.
MASKS = {"default": recist.mask_from_recist, "released": recist.released_mask_from_recist}

# What the problems are called in the report: key slices are left out for the first five.
_NOT_DOWNLOADED = "series not downloaded"
_MISSING = "missing slice"
_UNREADABLE = "unreadable slice"
_WRONG_SIZE = "wrong image size"
_BLANK = "blank slice"
_BOX = "box outside image"
_RECIST = "RECIST outside box"
_RANGE = "several slice ranges"


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did; `str()` of it is the summary a user reads.

    Attributes:
        folder: where the files were written.
        counts: a row a split: `key_slices`, `published`, `thin`, `thick`, `lesions`,
            `not_downloaded` and `broken` (key slices left out).
        problems: `file_name`, `split`, `problem`, `detail`, `left_out`; the content of report.csv.
        noisy: number of lesions dropped because they are flagged as noisy.
        notes: where data was found, if not where it is expected.
    """

    folder: Path
    counts: pd.DataFrame
    problems: pd.DataFrame
    noisy: int
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 if data is missing or unreadable, else 0; a partial download is no failure."""
        return int(self.counts.broken.sum() > 0)

    def __str__(self) -> str:
        counts, total = self.counts, int(self.counts.key_slices.sum())
        titles = [name.replace("_", " ") for name in counts.columns]
        lines = [
            *self.notes,
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
        if sizes := int((self.problems.problem == _WRONG_SIZE).sum()):
            lines.append(
                f"{sizes:,} of them have another size than the table says: if the slices are right,"
                " the table is wrong; take the official DL_info.csv."
            )
        if (counts.key_slices == counts.published).all():
            lines.append("The numbers of key slices are the published ones.")
        elif not absent and not broken:
            lines.append("The table of lesions is not the official one: published counts differ.")
        lines.append(f"Written to {self.folder}: train.json, val.json, test.json, report.csv")
        return "\n".join(lines)


def prepare(
    root: str | Path,
    csv: str | Path | None = None,
    workers: int | None = None,
    out: str | Path | None = None,
    images: Sequence[str | Path] = (),
    masks: str = "default",
) -> Preparation:
    """Write `out/annotations/{train,val,test}.json` and `report.csv` for the data set in `root`.

    `root` holds NIH's `DL_info.csv` (or give `csv`) and `Images_png` (or give folders, `images`);
    what is not there is looked for around there, see `locate`. Nothing is written but below `out`
    (default: `root`). Every clean (not noisy) lesion gets a mask drawn by
    `recist.mask_from_recist`, or with masks='released' by `recist.released_mask_from_recist`, and
    these files go to a folder of their own, `out/annotations_released`. `coco.to_coco` says what
    the files hold, and their `info` has

        `key_slices`, and `table_key_slices`, how many there are in the table of lesions;
        `images`: the folders in which the series lie, relative to `out` if they are below it;
        `masks`: how these were drawn, as the argument says.

    The bytes written do not depend on `workers` (processes, default: all cores).

    A key slice is left out, and reported, if its series is not there (a partial download) or if its
    data is broken: the slice or a neighbour within reach of a stack of 7 slices is missing, the
    slice is unreadable, blank or not of the size the table says. Neighbours are not decoded. Boxes
    outside their image (clipped), RECIST end points outside their box and rows of a key slice with
    another slice range than its first, which counts, are reported and kept.

    If it is interrupted, the finished key slices are kept in `unfinished.jsonl` beside them,
    and the next call continues from there unless the table, the folders of images or the code that
    reads slices and draws masks changed.

    With more than one worker processes are spawned: call it from under `if __name__ == "__main__"`.
    Raises FileNotFoundError if there is no table or not one of its series, ValueError if the table
    is bad or all its lesions are noisy, DataError if a series lies in several places or another
    process is preparing into `out`, WriteError if that cannot be written to, UserError if a process
    was killed.
    """
    root, out = Path(root), Path(root if out is None else out)
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if masks not in MASKS:
        raise UserError(f"masks must be one of {', '.join(MASKS)}, got {masks!r}")
    csv = _table(root, csv)
    with warnings.catch_warnings():
        # Clipped boxes and several slice ranges of a key slice: they go to the report instead.
        warnings.simplefilter("ignore", UserWarning)
        lesions = read_dl_info(csv)
    clean = lesions[~lesions.noisy]
    if clean.empty:
        raise UserError(f"{csv}: all of its {len(lesions):,} lesions are flagged as noisy")
    key_slices = {}  # file name -> its rows of the table
    for lesion in clean.itertuples():
        key_slices.setdefault(lesion.file_name, []).append(lesion)
    wanted = {_series(name) for name in key_slices}
    folders = find_image_folders(root, wanted, [Path(folder) for folder in images])
    slices = SliceFolder(*folders)
    present = {name for name in wanted if slices.path(name).is_dir()}
    if not present:
        raise MissingDataError(
            f"no image found: neither {folders[0]} nor a folder near it holds one of the"
            f" {len(wanted):,} series of the table, such as {min(wanted)}\n{advice(root)}"
        )

    folder = out / ANNOTATIONS[masks]
    unfinished = folder / UNFINISHED
    there = [name for name in key_slices if _series(name) in present]
    with ExitStack() as held:
        with _writable(out, unfinished):
            held.enter_context(only_writer(folder / "prepare.lock", "--out"))
            finished, unfinished_file = open_unfinished(unfinished, csv, folders)
        drawn = {name: finished[name] for name in there if name in finished}
        with unfinished_file:
            pending = [_task(key_slices[name]) for name in there if name not in drawn]
            work = partial(_draw_masks, slices, MASKS[masks])
            progress = tqdm(total=len(there), initial=len(there) - len(pending), unit=" key slices")
            with progress, closing(in_processes(work, pending, workers)) as done:
                for result in done:
                    drawn[result["file_name"]] = result
                    if "masks" in result:  # a broken one may be repaired until the next call
                        with explained(unfinished):
                            unfinished_file.write(json_line(result))
                            unfinished_file.flush()
                    progress.update()

        problems = _problems(key_slices, drawn)
        recorded = [_relative(place, out) for place in folders if place.is_dir()]
        info = dict(images=recorded, masks=masks)
        counts = _write_annotations(folder, clean, drawn, problems, info)
        write_whole(folder / "report.csv", problems.to_csv(index=False, lineterminator="\n"))
        unfinished.unlink()
    notes = _notes(root, csv, slices, present, images)
    return Preparation(folder, counts, problems, int(lesions.noisy.sum()), notes)


def _table(root: Path, csv: str | Path | None) -> Path:
    if csv is None:
        return find_table(root)
    if not Path(csv).is_file():
        raise MissingDataError(f"table of lesions not found: {csv}\n{advice(root)}")
    return Path(csv)


@contextmanager
def _writable(out: Path, path: Path) -> Iterator[None]:
    try:
        with explained(path):
            yield
    except WriteError as error:
        raise WriteError(
            f"{error}: with --out DIR nothing is written to {out}, and training takes DIR as"
            " DEEPLESION_ROOT",
            error.errno,
        ) from None


def _relative(folder: Path, out: Path) -> str:
    """A folder as the annotation files name it, so that a data set can be moved as a whole."""
    folder, out = folder.resolve(), out.resolve()
    return folder.relative_to(out).as_posix() if folder.is_relative_to(out) else str(folder)


def _notes(
    root: Path, csv: Path, slices: SliceFolder, present: set[str], images: Sequence
) -> tuple[str, ...]:
    notes = []
    if csv.resolve().parent != root.resolve():
        notes.append(f"The table of lesions is {csv}.")
    expected = {Path(folder) for folder in images} or {root / IMAGES}
    places = Counter(slices.root_of(name) for name in present)
    for place, count in places.items():
        if place not in expected:
            notes.append(f"{count:,} series were found in {place} and are taken from there.")
    return tuple(notes)


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


def _draw_masks(folder: SliceFolder, draw: Callable, task: dict) -> dict:
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
    if hu.min() == hu.max():
        return {"file_name": name, "problem": _BLANK, "detail": f"all of it is {hu.min()} HU"}
    masks = [draw(hu, bbox, ends) for bbox, ends in task["lesions"]]
    return {"file_name": name, "masks": [encode_mask(mask) for mask in masks]}


def _problems(key_slices: dict, drawn: dict) -> pd.DataFrame:
    """Every problem, in the order of the table: one for a key slice left out, else its lesions'."""
    problems = []
    for name, lesions in key_slices.items():
        result = drawn.get(name, {"problem": _NOT_DOWNLOADED, "detail": _series(name)})
        if "problem" in result:
            found = [(result["problem"], result["detail"])]
        else:
            found = [p for lesion in lesions for p in _problems_of_box(lesion)]
            found += _problem_of_ranges(lesions)
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


def _problem_of_ranges(lesions: list) -> list[tuple[str, str]]:
    counts, *others = dict.fromkeys(tuple(lesion.slice_range.tolist()) for lesion in lesions)
    given = ", ".join("{}..{}".format(*each) for each in others)
    return [(_RANGE, "{}..{} counts, not {}".format(*counts, given))] if others else []


def _write_annotations(
    folder: Path, clean: pd.DataFrame, drawn: dict, problems: pd.DataFrame, info: dict
) -> pd.DataFrame:
    """Write a COCO file for each split and count what is in it and what was left out.

    `info`: more of what the files' `info` is to hold.
    """
    masks_of = {name: iter(result.get("masks", ())) for name, result in drawn.items()}
    masks = [next(masks_of.get(name, iter(())), None) for name in clean.file_name]
    masks = pd.Series(masks, clean.index, dtype=object)
    counts = {}
    for split in SPLITS.values():
        chosen = (clean.split == split) & masks.notna()
        lesions = clean[chosen]
        content = to_coco(lesions, masks[chosen])
        table_key_slices = clean[clean.split == split].file_name.nunique()
        content["info"] = dict(
            key_slices=len(content["images"]), table_key_slices=table_key_slices, **info
        )
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
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
