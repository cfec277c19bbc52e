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
from deeplesion.errors import UserError
from deeplesion.evaluation.breakdowns import add_columns
from deeplesion.evaluation.coco_results import is_coco_results, read_coco_results
from deeplesion.evaluation.evaluate import compare, evaluate
from deeplesion.evaluation.intervals import MIN_RESAMPLES
from deeplesion.evaluation.results import default_names, read_results
from deeplesion.files import write_whole
from deeplesion.report.page import write_figures, write_report
from deeplesion.report.published import PUBLISHED
from deeplesion.report.tables import all_tables, to_text, write_tables
from deeplesion.report.volumes import write_volume_evaluation


@command()
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print and write FROC tables with 95 % intervals, breakdowns, AP50 and the"
        " errors of diameters; of several results, which must be of the same images, also the"
        " paired differences from the first. The result files are all it needs.",
    )
    parser.add_argument(
        "results",
        nargs="*",
        default=[],
        type=Path,
        metavar="RESULT",
        help="results.json.gz, or a list of detections in COCO's format",
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help="of the images of results in COCO's format"
    )
    parser.add_argument("--names", nargs="+", help="what to call the results (default: by folder)")
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN", help="break down by these columns, too"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="CSV",
        help="file with these columns: of images, such as DL_info.csv, or of lesions by lesion_idx",
    )
    parser.add_argument(
        "--published", action="store_true", help="with the tables of the papers, so marked"
    )
    parser.add_argument(
        "--pixel-offset", type=int, choices=[0, 1], default=1,
        help="added to the widths of boxes: 1 as in the published tables (default), 0 modern",
    )  # fmt: skip
    parser.add_argument("--iou-threshold", type=float, default=0.5, help="of a hit (default 0.5)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: evaluation/ beside the first result)"
    )
    parser.add_argument(
        "--images",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="Images_png, for the pictures of the report; may be given several times",
    )
    scans = parser.add_argument_group("lesions in 3D, instead of results")
    scans.add_argument(
        "--volumes",
        type=Path,
        metavar="FOLDER",
        help="what tools/detect.py wrote for a folder of scans; --out is evaluation/ in it",
    )
    scans.add_argument(
        "--truth", type=Path, metavar="FILE", help="boxes of all lesions of the scans, in 3D"
    )
    scans.add_argument("--split", help="which scans of the truth (default test)")
    scans.add_argument(
        "--count-missing",
        action="store_true",
        help="scans of the truth without detections count as scans in which nothing was found",
    )
    options = parser.parse_args()
    check_kind(parser, options)
    if not 0 < options.iou_threshold <= 1:
        raise UserError(f"--iou-threshold must be in (0, 1], got {options.iou_threshold}")
    if options.resamples < MIN_RESAMPLES or options.seed < 0:
        raise UserError(
            f"--resamples must be at least {MIN_RESAMPLES} for a 95 % interval (1000 is usual) and"
            f" --seed at least 0, got {options.resamples} and {options.seed}"
        )
    if options.volumes:
        out = options.out or options.volumes / "evaluation"
        rest = (options.split or "test", options.count_missing, options.resamples, options.seed)
        print(write_volume_evaluation(options.volumes, options.truth, out, *rest))
        return
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
    out = options.out or options.results[0].parent / "evaluation"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder, which need not exist yet")
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

    draws = (options.resamples, options.seed)
    comparisons = [compare(results[0], other, *draws) for other in results[1:]]
    evaluations = [
        evaluate(each, options.by, *draws)
        for each in tqdm(results, desc="evaluating", unit="result", leave=False)
    ]
    tables = all_tables(evaluations, comparisons, options.published)
    print("\n\n".join(map(to_text, tables)))

    content = dict(evaluations=evaluations, comparisons=comparisons)
    if options.published:
        content["published"] = [row._asdict() for row in PUBLISHED]
    write_whole(out / "evaluation.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    paths = write_tables(tables, out)
    paths += write_figures(results, out, *draws)
    folder = None
    if options.images:
        series = {r["file_name"].partition("/")[0] for result in results for r in result.records}
        folder = SliceFolder(*find_image_folders(options.images[0], series, options.images))
    report = write_report(results, evaluations, out, folder, options.published, comparisons)
    print(f"\n{out}: evaluation.json, {', '.join(path.name for path in [*paths, report])}")


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


if __name__ == "__main__":
    main()
