"""Write a trained detector as programs that run without MMDetection:
python tools/export.py alignshift_7slice work_dirs/alignshift_7slice --out exported --format onnx"""

import argparse
from pathlib import Path

from deeplesion.command_line import command, config_help
from mmdet_ext.config.overrides import add_config_options
from mmdet_ext.engine.export import OPENS, export
from mmdet_ext.engine.exportable import check_kind
from mmdet_ext.engine.predict import LesionDetector
from mmdet_ext.engine.run import load_config


@command()
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a trained KeySliceMaskRCNN, with any fusion operator, as programs with a"
        " manifest: features and RPN, box head, mask head. tools/detect.py SCAN --model FOLDER runs"
        " it, for which ONNX needs no torch. The programs are compared with the networks first."
    )
    parser.add_argument("config", help=config_help("config that the checkpoint was trained with"))
    parser.add_argument("checkpoint", help="a .pth file, or a work directory for its best one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the programs to")
    parser.add_argument(
        "--format",
        choices=list(OPENS),
        default="onnx",
        help="format of the programs (default onnx)",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(), metavar=("H", "W"),
        help="write programs for images of this size alone, in multiples of 32 (default: any size)",
    )  # fmt: skip
    add_config_options(parser)
    options = parser.parse_args()
    config = load_config(options.config, options.cfg_options)
    check_kind(options.config, config.model.type)
    detector = LesionDetector(config, options.checkpoint, "cpu", options.accept_differences)
    manifest = export(detector, options.out, options.format, options.size, progress=True)
    for name, entry in manifest["programs"].items():
        path = options.out / entry["file"]
        print(f"{name:<10}{path}, {path.stat().st_size / 1e6:.1f} MB")
    print(f"{'detector':<10}{detector.name}, {detector.checkpoint}, compared with its networks")


if __name__ == "__main__":
    main()
