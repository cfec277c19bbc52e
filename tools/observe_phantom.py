"""How well an observer who knows how the phantom is drawn tells lesions from distractors, by stack:

    python tools/observe_phantom.py ROOT --split test --noise 0 4

The observers find every object. It prints their average sensitivity at 0.5, 1, 2 and 4 false
positives an image, and their sensitivity at 0.5, in %. docs/study_design.md explains the figures.
"""

import argparse
import json
import math
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from tqdm import tqdm

from deeplesion.command_line import command
from deeplesion.conventions import SPLITS, THIN_MM
from deeplesion.data.slices import POLICIES, plan_stack
from deeplesion.errors import DataError, UserError
from deeplesion.evaluation.froc import AVERAGE_FPS, froc
from deeplesion.files import check_out_file, write_whole
from deeplesion.phantom.observers import READINGS, Observed, Observer, observe_series, series_of
from deeplesion.processes import in_processes

STACKS = (
    "1,normalize,2",
    "3,normalize,2",
    "5,normalize,2",
    "7,normalize,2",
    "3,keep_thick,2",
    "3,normalize,6",
    "7,keep_thick,2",
    "7,normalize,5",
)
ORDERS = 4  # in which objects of equal score are put, at random
GROUPS = ("all", "thin", "thick")


def stack(text: str) -> Observer:
    """An option of --stacks; argparse tells what is wrong with it."""
    try:
        num_slices, policy, target_mm = text.split(",")
        asked = Observer(int(num_slices), policy, float(target_mm))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give D,POLICY,MM, as in {STACKS[1]}; policies are {', '.join(POLICIES)}"
        ) from None
    try:
        plan_stack(0, None, (0, 0), asked.num_slices, asked.policy, asked.target_mm)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return asked


def measures(read: list[Observed], which: int) -> dict:
    """Of one observer: group -> (average, sensitivity at 0.5, AUC), in %."""
    groups = {
        "all": np.ones(len(read), bool),
        "thin": np.array([r.thickness <= THIN_MM for r in read]),
    }
    groups["thick"] = ~groups["thin"]
    rng = np.random.default_rng(0)
    found = {group: [] for group in groups}
    for reading in [*range(READINGS)] * ORDERS:
        scores = [np.round(r.scores[:, which, reading], 6) for r in read]
        ranks = _ranks(rng, np.concatenate(scores))
        ranks = np.split(ranks, np.cumsum([len(s) for s in scores])[:-1])
        curve = froc(
            [np.column_stack([r.boxes, s]) for r, s in zip(read, ranks, strict=True)],
            [r.boxes[r.is_lesion] for r in read],
        )
        for group, chosen in groups.items():
            if not chosen.any():
                continue
            at = curve.of_images(chosen).sensitivity_at(AVERAGE_FPS)
            of = [(s, r.is_lesion) for s, r, c in zip(scores, read, chosen, strict=True) if c]
            found[group].append((at.mean(), at[0], _auc(*map(np.concatenate, zip(*of)))))
    measured = {g: (100 * np.mean(rows, axis=0)).tolist() for g, rows in found.items() if rows}
    return {**measured, "auc_by_course": _by_course(read, which)}


def _by_course(read: list[Observed], which: int) -> dict[str, float]:
    """AUC of all lesions against the distractors of one course, in %."""
    courses, is_lesion = (
        np.concatenate([getattr(r, f) for r in read]) for f in ("courses", "is_lesion")
    )
    scores = np.concatenate([r.scores[:, which] for r in read])
    aucs = {}
    for course in sorted(set(courses[~is_lesion].tolist())):
        chosen = is_lesion | (courses == course)
        each = [_auc(np.round(s, 6), is_lesion[chosen]) for s in scores[chosen].T]
        aucs[course] = 100 * float(np.mean(each))
    return aucs


def _ranks(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    """Ranks of scores from the lowest, equal ones in a random order."""
    order = np.lexsort([rng.random(len(scores)), scores])
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(len(scores))
    return ranks


def _auc(scores: np.ndarray, is_lesion: np.ndarray) -> float:
    """Share of pairs of a lesion and a distractor in which the lesion has the higher score."""
    ranks, n = rankdata(scores), int(is_lesion.sum())
    return (ranks[is_lesion].sum() - n * (n + 1) / 2) / (n * (len(ranks) - n))


@command()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="a phantom, as tools/make_phantom.py writes it")
    parser.add_argument(
        "--split",
        choices=[*SPLITS.values(), "all"],
        default="all",
        help="read the series of this split (default all)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="read only the first N series of the split"
    )
    parser.add_argument(
        "--stacks",
        nargs="+",
        type=stack,
        metavar="D,POLICY,MM",
        default=[stack(text) for text in STACKS],
        help="read stacks of so many slices, by this policy and target distance in mm (default"
        f" {' '.join(STACKS)})",
    )
    parser.add_argument(
        "--noise",
        nargs="+",
        type=float,
        default=[0.0],
        metavar="SD",
        help="add internal noise to each slice of the stack, in contrasts of the object (default 0,"
        " the ideal observer)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="use N processes (default 1)"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the figures to a file")
    options = parser.parse_args()
    if wrong := [h for h in options.noise if not 0 <= h < math.inf]:
        raise UserError(f"--noise {wrong[0]}: give a number from 0")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    if options.out:
        check_out_file(options.out)
    observers = [s._replace(noise=h) for h in options.noise for s in options.stacks]
    series = [s for s in series_of(options.root) if options.split in ("all", SPLITS[s.split])][
        : options.limit
    ]
    if not series:
        raise DataError(f"{options.root} has no series of the split {options.split}")
    work = partial(observe_series, options.root, observers)
    with closing(in_processes(work, series, options.workers)) as each:
        read = [r for of_one in tqdm(each, total=len(series), desc="series") for r in of_one]
    rows = [{**o._asdict(), **measures(read, which)} for which, o in enumerate(observers)]
    lesions = sum(int(r.is_lesion.sum()) for r in read)
    distractors = sum(len(r.is_lesion) for r in read) - lesions
    print(f"{len(read)} key slices, {lesions} lesions, {distractors} distractors\n")
    print("average (at 0.5); AUC, of distractors of each course too, in %\n")
    courses = list(rows[0]["auc_by_course"])
    heads = "".join(f" {group:^21} |" for group in GROUPS)
    if len(courses) > 1:
        heads += "".join(f" {course:>8} |" for course in courses)
    print(f"| D | policy     | target mm |    noise |{heads}\n|{'---|' * (heads.count('|') + 4)}")
    for row in rows:
        cells = "".join(f" {_cell(row.get(group)):>21} |" for group in GROUPS)
        if len(courses) > 1:
            cells += "".join(f" {row['auc_by_course'][c]:>8.1f} |" for c in courses)
        print(
            f"| {row['num_slices']} | {row['policy']:<10} | {row['target_mm']:>9g} |"
            f" {row['noise']:>8g} |{cells}"
        )
    if options.out:
        content = dict(key_slices=len(read), lesions=lesions, distractors=distractors, rows=rows)
        write_whole(options.out, json.dumps(content, indent=1).encode())


def _cell(values: list[float] | None) -> str:
    return "-" if values is None else "{:.1f} ({:.1f}); {:.1f}".format(*values)


if __name__ == "__main__":
    main()
