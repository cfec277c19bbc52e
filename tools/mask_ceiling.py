"""What masks of m x m cells cost on LiTS: the Dice of a detector that is right in every cell.
python tools/mask_ceiling.py configs/volumetric_attention/lits_mask_rcnn_r50.py"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.mask_ceiling import ceilings
from deeplesion.command_line import command, config_help
from deeplesion.errors import UserError
from mmdet_ext.config.experiment import type_name
from mmdet_ext.config.overrides import add_config_options
from mmdet_ext.engine.run import load_config


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "config",
        help=config_help(
            "config of a detector on LiTS, whose test data is drawn",
            "volumetric_attention/lits_mask_rcnn_r50",
        ),
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[14, 28, 56, 112],
        metavar="M",
        help="draw masks of M x M cells (default 14 28 56 112)",
    )
    add_config_options(parser, checkpoint=False)
    options = parser.parse_args()
    if min(options.sizes) < 1:
        raise UserError(f"--sizes must be at least 1, got {min(options.sizes)}")
    config = load_config(options.config, options.cfg_options)
    evaluator = config.get("test_evaluator")
    if not isinstance(evaluator, dict) or type_name(evaluator) != "DiceMetric":
        raise UserError(
            f"{options.config} is not of a detector on LiTS: its test_evaluator must be a"
            " DiceMetric"
        )
    evaluator.lesion_scores = [0.5]
    found = ceilings(config, [0, *options.sizes])
    names = ("liver_dice_per_case", "lesion_dice_per_case", "dice_small", "dice_medium",
             "dice_large")  # fmt: skip
    print("| mask      | cells  | " + " | ".join(f"{name:>20}" for name in names) + " |")
    print("|-----------|--------|" + "|".join(["-" * 21 + ":"] * len(names)) + "|")
    for (size, kind), figures in found.items():
        mask = f"{size} x {size}" if size else "true"
        cells = " | ".join(f"{figures[name]:>20.2f}" for name in names)
        print(f"| {mask:<9} | {kind:<6} | {cells} |")


if __name__ == "__main__":
    main()
