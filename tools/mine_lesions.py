"""Look for lesions without a label: a trained detector's confident detections on its training
images that no label explains become regions to ignore, or labels, of a second round.

python tools/mine_lesions.py CONFIG CHECKPOINT --data ROOT --out ROOT/annotations/train_mined.json

The file is whole or not there; train_dataloader.dataset.ann_file may name it. Of a phantom it is
said how many of them are lesions in truth (docs/missing_labels.md).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process

from ct_volumes.slice_detector import threshold_for
from deeplesion.command_line import command, config_help
from deeplesion.data.annotation_check import annotation_problems, is_ignored, refuse_if
from deeplesion.data.coco import read_annotations, read_json
from deeplesion.errors import UserError
from deeplesion.evaluation.mining import KINDS, Judged, judge, mine, with_mined
from deeplesion.evaluation.results import read_results
from deeplesion.files import file_sha256, write_whole
from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.overrides import add_config_options, use_data
from mmdet_ext.engine.distributed import add_launcher, launched
from mmdet_ext.engine.run import find_checkpoint, load_config, test

SPLITS = ("train", "test")
STEP = 0.1  # from one score of the table to the next


@launched
@command()
def main() -> None:
    options = arguments()
    config = load_config(options.config, options.cfg_options, options.work_dir)
    config.launcher = options.launcher
    path = look_at_training_images(config, options.score)
    refuse_to_overwrite(options.out, path)
    annotations = read_annotations(path, need_lesions=True, regions=True)
    if any(map(is_ignored, annotations["annotations"])):
        raise UserError(
            f"{path} holds regions to ignore, of an earlier call: look for lesions with the labels"
            " alone, --cfg-options train_dataloader.dataset.ann_file=annotations/train.json"
        )
    checkpoint = find_checkpoint(options.checkpoint)
    result = test(
        config,
        checkpoint,
        # A work directory may hold the result of a test, which these detections are not.
        result_file=str(Path(config.work_dir, "training_images.json.gz")),
        accept_differences=options.accept_differences,
    )
    if result is None:
        raise ConfigError(
            f"{options.config}: its test_evaluator has no FROCMetric, which keeps the detections"
        )
    if not is_main_process():
        return
    mined = mine(read_results(Path(result)).records, annotations, options.score)
    note = dict(
        score=options.score,
        config=Path(options.config).stem,
        checkpoint_sha256=file_sha256(checkpoint),
    )
    content = with_mined(annotations, mined, options.kind, note)
    category = annotations["categories"][0]["id"]
    problems = annotation_problems(content["annotations"], content["images"], category, True)
    refuse_if(problems, options.out, "It was not written. Please report this.")
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    write_whole(options.out, text)

    number = content["info"]["mined"]["number"]
    what = "regions to ignore" if options.kind == "ignored" else "labels"
    images, lesions = len(annotations["images"]), len(annotations["annotations"])
    print(
        f"{images:,} key slices with {lesions:,} lesions: {number:,} detections that score at least"
        f" {options.score:g} lie on none of them\nwritten as {what}: {options.out}"
    )
    if left_out := len(mined) - number:
        print(f"{left_out:,} more have an empty mask and were left out")
    truth = Path(config.test_dataloader.dataset.data_root, "phantom_truth", "truth.json")
    if truth.is_file():
        scores = [s for s in options.score + STEP * np.arange(10) if s < 1]
        content = read_json(truth, "the truth of a phantom")
        print(format_judged(judge(mined, annotations, content, scores)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help=config_help("config that the teacher was trained with"))
    parser.add_argument("checkpoint", help="a .pth file, or a work directory for its best one")
    parser.add_argument(
        "--data", type=Path, metavar="ROOT", help="prepared data (default: DEEPLESION_ROOT)"
    )
    parser.add_argument("--out", type=Path, required=True, help="annotation file to write")
    parser.add_argument(
        "--score", type=float, default=0.5, help="least score of a detection (default %(default)s)"
    )
    parser.add_argument(
        "--as", dest="kind", choices=KINDS, default="ignored",
        help="'ignored' regions are neither lesion nor background in training, for a config like"
        " configs/demo/ignored_regions.py; 'labels' are lesions (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir", help="logs and all detections; default: beside OUT, named after it"
    )
    add_config_options(parser)
    add_launcher(parser)
    options = parser.parse_args()
    if not 0 < options.score < 1:
        raise UserError(f"--score is {options.score}: give a number between 0 and 1")
    if options.data is not None:
        use_data(options.data)
    if options.work_dir is None:
        options.work_dir = str(options.out.with_name(f"{options.out.stem}_teacher"))
    return options


def look_at_training_images(config: Config, score: float) -> Path:
    """Makes the config's test one on its training images, of what scores enough; returns their
    annotation file."""
    train, tested = (config.get(f"{split}_dataloader", {}).get("dataset") for split in SPLITS)
    if not train or not tested or not isinstance(train.get("ann_file"), str):
        raise ConfigError(
            f"{config.filename}: it takes a train_dataloader of one annotation file and a "
            "test_dataloader, as those of configs/_base_/deeplesion.py"
        )
    for name in ("data_root", "ann_file", "data_prefix", "cache"):
        if name in train:
            tested[name] = train[name]
    rcnn = config.model.get("test_cfg", {}).get("rcnn")
    if rcnn:
        rcnn.score_thr = threshold_for(rcnn.get("score_thr", 0), score)
    return Path(train.get("data_root") or "", train.ann_file)


def refuse_to_overwrite(out: Path, labels: Path) -> None:
    """A file that this command did not write is left alone."""
    if not out.exists():
        return
    if not out.is_file() or out.resolve() == labels.resolve():
        raise UserError(f"--out {out} is there already and no file of this command: name another")
    found = read_json(out, "an annotation file of this command")
    info = found.get("info") if isinstance(found, dict) else None
    if not isinstance(info, dict) or "mined" not in info:
        raise UserError(f"--out {out} is there already and no file of this command: name another")


def format_judged(judged: list[Judged]) -> str:
    """What was mined against the truth, a line for each least score."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    head = ("score", "mined", "lesions", "distractors", "precision", "recall")
    rows = [
        (f"{j.score:.2f}", j.mined, j.lesions, j.distractors, percent(j.precision),
         percent(j.recall))
        for j in judged
    ]  # fmt: skip
    lines = ["  ".join(f"{cell!s:>{len(name)}}" for name, cell in zip(head, row)) for row in rows]
    told = (
        f"in truth {judged[0].unlabelled:,} lesions of these key slices have no label; mined (%):"
    )
    return "\n".join([told, "  ".join(head), *lines])


if __name__ == "__main__":
    main()
