"""Evaluate result files of tools/test.py: tables with intervals, figures and a report.

python tools/evaluate.py work_dirs/a3d_7slice/results.json.gz work_dirs/acs_7slice/results.json.gz
python tools/evaluate.py coco_results.json --annotations data/DeepLesion/annotations/test.json
python tools/evaluate.py --volumes detected_scans --truth truth.json
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from deeplesion.command_line import command
from deeplesion.data.locate import find_image_folders
from deeplesion.data.slices import SliceFolder
from deeplesion.errors import MissingDataError, UserError
from deeplesion.evaluation.breakdowns import add_columns
from deeplesion.evaluation.coco_results import is_coco_results, read_coco_results
from deeplesion.evaluation.evaluate import compare, evaluate
from deeplesion.evaluation.intervals import MIN_RESAMPLES
from deeplesion.evaluation.results import Result, default_names, read_results
from deeplesion.files import check_out_folder, write_whole
from deeplesion.report.page import write_figures, write_report
from deeplesion.report.published import PUBLISHED
from deeplesion.report.tables import all_tables, partial_data, to_text, write_tables
from deeplesion.report.volumes import write_volume_evaluation


@command()
def main() -> None:
    options = arguments()
    if options.volumes:
        evaluate_scans(options)
    else:
        evaluate_results(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Print and write FROC tables with 95 % intervals, breakdowns, AP50 and the"
        " errors of diameters; of several results, which must be of the same images, also the"
        " paired differences from the first. The result files are all it needs.",
    )
    parser.add_argument(
        "results", nargs="*", default=[], type=Path, metavar="RESULT",
        help="results.json.gz, or a list of detections in COCO's format",
    )  # fmt: skip
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE",
        help="file of the images and lesions, for results in COCO's format",
    )  # fmt: skip
    parser.add_argument(
        "--names", nargs="+", help="what to call the results (default: as their folders are called)"
    )
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN",
        help="make a table by each of these columns, too",
    )  # fmt: skip
    parser.add_argument(
        "--table", type=Path, metavar="CSV",
        help="file that holds these columns: of images, as DL_info.csv does, or of lesions by"
        " lesion_idx",
    )  # fmt: skip
    parser.add_argument(
        "--published", action="store_true", help="show the tables of the papers, too, so marked"
    )
    parser.add_argument(
        "--pixel-offset", type=int, choices=[0, 1], default=1,
        help="what is added to the widths of boxes: 1 as in the published tables (default), or 0,"
        " the modern definition",
    )  # fmt: skip
    parser.add_argument(
        "--iou-threshold", type=float, default=0.5,
        help="from which IoU with a lesion on a detection hits it (default 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", type=int, default=1000,
        help="how many samples the bootstrap draws for the intervals (default 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="another one draws other samples (default 0)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: evaluation/ beside the first result)"
    )
    parser.add_argument(
        "--images", type=Path, action="append", default=[], metavar="FOLDER",
        help="where the slices lie, Images_png, for the pictures of the report; may be given"
        " several times",
    )  # fmt: skip
    scans = parser.add_argument_group("lesions in 3D, instead of results")
    scans.add_argument(
        "--volumes", type=Path, metavar="FOLDER",
        help="what tools/detect.py wrote for a folder of scans; --out is evaluation/ in it",
    )  # fmt: skip
    scans.add_argument(
        "--truth", type=Path, metavar="FILE", help="boxes of all lesions of the scans, in 3D"
    )
    scans.add_argument("--split", help="which scans of the truth to evaluate (default test)")
    scans.add_argument(
        "--count-missing", action="store_true",
        help="count scans of the truth without detections as scans in which nothing was found; no"
        " calibration is written then",
    )  # fmt: skip
    options = parser.parse_args()
    check_kind(parser, options)
    if options.table and not options.by:
        raise UserError(f"--table {options.table} is read for --by alone: say which of its columns")
    if not 0 < options.iou_threshold <= 1:
        raise UserError(f"--iou-threshold must be in (0, 1], got {options.iou_threshold}")
    if options.resamples < MIN_RESAMPLES or options.seed < 0:
        raise UserError(
            f"--resamples must be at least {MIN_RESAMPLES} for a 95 % interval (1000 is usual) and"
            f" --seed at least 0, got {options.resamples} and {options.seed}"
        )
    options.out = options.out or (options.volumes or options.results[0].parent) / "evaluation"
    check_out_folder(options.out)
    return options


def check_kind(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses options that are not for what is evaluated: results or, with --volumes, scans."""
    of_scans = ("truth", "split", "count_missing")
    of_both = ("volumes", "out", "resamples", "seed")
    given = [n for n, value in vars(options).items() if value != parser.get_default(n)]
    if options.volumes is None:
        if not options.results:
            parser.error("give a RESULT, or --volumes FOLDER with --truth FILE")
        wrong = [name for name in given if name in of_scans]
    else:
        if options.truth is None:
            parser.error("--volumes needs --truth FILE, the boxes of all lesions")
        wrong = [name for name in given if name not in (*of_scans, *of_both)]
    if wrong:
        names = ", ".join("RESULT" if n == "results" else f"--{n.replace('_', '-')}" for n in wrong)
        raise UserError(
            f"{names} cannot be given {'with' if options.volumes else 'without'} --volumes"
        )


def evaluate_scans(options: argparse.Namespace) -> None:
    """The lesions in 3D of a folder of scans."""
    split = options.split or "test"
    rest = (split, options.count_missing, options.resamples, options.seed)
    print(write_volume_evaluation(options.volumes, options.truth, options.out, *rest))


def evaluate_results(options: argparse.Namespace) -> None:
    """Detections on key slices."""
    results = read(options)
    slices = slices_of(results, options.images)
    out, draws = options.out, (options.resamples, options.seed)
    comparisons = [compare(results[0], other, *draws) for other in results[1:]]
    evaluations = [
        evaluate(each, options.by, *draws)
        for each in tqdm(results, desc="evaluating", unit="result", leave=False)
    ]
    tables = all_tables(evaluations, comparisons, options.published)
    partial = partial_data(results)
    print("\n\n".join([*filter(None, [partial]), *map(to_text, tables)]))

    content = dict(evaluations=evaluations, comparisons=comparisons)
    if options.published:
        content["published"] = [row._asdict() for row in PUBLISHED]
    write_whole(out / "evaluation.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    paths = write_tables(tables, out, partial)
    paths += write_figures(results, out, *draws)
    report = write_report(results, evaluations, out, slices, options.published, comparisons)
    print(f"\n{out}: evaluation.json, {', '.join(path.name for path in [*paths, report])}")


def read(options: argparse.Namespace) -> list[Result]:
    """The results under their names, with the columns of --table."""
    names = options.names or default_names(options.results)
    if len(names) != len(options.results) or len(set(names)) < len(names):
        raise UserError(
            f"--names must give each of the {len(options.results)} results a name of its own, got "
            f"{' '.join(names)}"
        )
    if options.annotations and not any(map(is_coco_results, options.results)):
        raise UserError(
            "--annotations is for detections in COCO's format; result files of tools/test.py hold"
            " their lesions"
        )
    results = []
    for path, name in zip(options.results, names):
        rule = (name, options.iou_threshold, options.pixel_offset)
        if is_coco_results(path):
            if options.annotations is None:
                raise UserError(
                    f"{path} is a list of detections in COCO's format: give the file of its images"
                    " and lesions, --annotations FILE"
                )
            result = read_coco_results(path, options.annotations, *rule)
        else:
            result = read_results(path, *rule)
        if options.table:
            records = add_columns(result.records, options.table, options.by)
            result = replace(result, records=records)
        results.append(result)
    return results


def slices_of(results: list[Result], images: list[Path]) -> SliceFolder | None:
    """Where the pictures of the report come from, None without --images.

    Raises MissingDataError if a folder is not there, or key slices of the results are not.
    """
    if not images:
        return None
    names = {record["file_name"] for result in results for record in result.records}
    series = {name.partition("/")[0] for name in names}
    slices = SliceFolder(*find_image_folders(images[0], series, images))
    if missing := sorted(name for name in names if not slices.path(name).is_file()):
        raise MissingDataError(
            f"--images {' '.join(map(str, images))}: {len(missing):,} of {len(names):,} key slices"
            f" are not there, such as {missing[0]}. Unpack them, or leave --images out"
        )
    return slices


if __name__ == "__main__":
    main()
