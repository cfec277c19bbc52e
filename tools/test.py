"""Test a checkpoint and print its scores: the FROC table on DeepLesion, Dice on LiTS:
python tools/test.py configs/alignshift_7slice.py work_dirs/alignshift_7slice"""

import argparse
import json
from pathlib import Path

from mmengine.dist import is_main_process

from deeplesion.command_line import command, config_help
from deeplesion.data.coco import image_folders, read_annotations
from deeplesion.data.slices import SliceFolder
from deeplesion.evaluation.results import made_with, read_results, table_file
from deeplesion.report.pictures import draw_results
from deeplesion.report.tables import format_table, key_slices_note
from mmdet_ext.config.experiment import dicts, type_name
from mmdet_ext.config.overrides import add_config_options
from mmdet_ext.engine.distributed import add_launcher, launched
from mmdet_ext.engine.run import (
    NODULE_METRICS,
    chosen_on_test,
    find_checkpoint,
    load_config,
    test,
)
from mmdet_ext.evaluation.dice_metric import dice_table
from mmdet_ext.models.tta import VIEWS

CHOSEN_ON_TEST = (
    "The epoch of this checkpoint was chosen by its score on the samples of this test, so the score"
    " is too high. Nothing was chosen for the last epoch's: give its epoch_*.pth"
)


@launched
@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help=config_help("config that the checkpoint was trained with"))
    parser.add_argument("checkpoint", help="a .pth file, or a work directory for its best one")
    parser.add_argument("--work-dir", help="logs and results; default the checkpoint's folder")
    parser.add_argument("--show-dir", type=Path, help="draw ground truth and detections there")
    parser.add_argument(
        "--out",
        help="result file; default results.json.gz (dice.json, nodules.json) in the work directory",
    )
    add_config_options(parser)
    parser.add_argument(
        "--tta",
        nargs="*",
        choices=VIEWS,
        metavar="VIEW",
        help="test-time augmentation: also horizontal, vertical, both (flips), depth (slices in "
        "reverse order), without names all; the result, results_tta.json.gz of all and else "
        "results_tta_VIEW....json.gz, is marked",
    )
    add_launcher(parser)
    options = parser.parse_args()

    config = load_config(options.config, options.cfg_options, options.work_dir, options.checkpoint)
    config.launcher = options.launcher
    views = list(VIEWS) if options.tta == [] else sorted(options.tta or (), key=list(VIEWS).index)
    weights = find_checkpoint(options.checkpoint)
    result_file = test(config, weights, options.out, options.accept_differences, views)
    if not is_main_process():
        return
    kinds = {type_name(metric) for _, metric in dicts(config.test_evaluator, "")}
    if chosen_on_test(config, weights):
        print(CHOSEN_ON_TEST)
    if result_file is None:
        print(f"{' and '.join(sorted(kinds))}: the scores are those above, no file is written")
    elif kinds & {*NODULE_METRICS}:
        print(f"scores of all nodules: {result_file}")
    elif "FROCMetric" not in kinds:
        print(dice_table(json.loads(Path(result_file).read_text())))
        print(f"scores of all cases: {result_file}")
        if options.show_dir:
            print("--show-dir draws detections, of which a DiceMetric keeps none")
    else:
        table = table_file(Path(result_file))
        content = json.loads(table.read_text())
        note = key_slices_note(content["key_slices"], content["table_key_slices"])
        print(format_table(content["froc"], note))
        if views:
            print(f"made with test-time augmentation {made_with(views)}")
        print(f"detections: {result_file}, table: {table}")
        if options.show_dir:
            dataset = config.test_dataloader.dataset
            root = Path(dataset.data_root)
            annotations = read_annotations(root / dataset.ann_file)
            slices = SliceFolder(*image_folders(annotations, root, root / dataset.data_prefix.img))
            result = read_results(Path(result_file), Path(config.work_dir).name)
            paths = draw_results(result, slices, options.show_dir)
            print(f"{len(paths)} pictures: {options.show_dir}")


if __name__ == "__main__":
    main()
