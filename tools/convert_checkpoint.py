"""Convert a released AlignShift, TSM, A3D or 2.5D checkpoint (mmdet 1.x) to one of this repository:
python tools/convert_checkpoint.py released.pth converted.pth"""

import argparse
import sys
from pathlib import Path

from deeplesion.command_line import command
from mmdet_ext.config.experiment import config_folder
from mmdet_ext.released.weights import convert_file


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="released checkpoint to read")
    parser.add_argument("target", type=Path, metavar="OUT", help="file to write")
    parser.add_argument(
        "--part",
        choices=["all", "backbone"],
        default="all",
        help="convert the whole detector, or backbone and neck alone, from a file that need not"
        " hold more (default all)",
    )
    options = parser.parse_args()
    found, count = convert_file(
        options.source, options.target, config_folder() / "released", options.part
    )
    print(f"{options.source}: {found.description}")
    print(f"{options.target}: {count} tensors")
    installed = Path(sys.argv[0]).stem == "deeplesion-convert"
    for name in found.configs:
        config = f"released/{name}" if installed else f"configs/released/{name}.py"
        if options.part == "all":
            test = "deeplesion-test" if installed else "python tools/test.py"
            print(f"{test} {config} {options.target}")
        else:
            train = "deeplesion-train" if installed else "python tools/train.py"
            print(
                f"{train} {config} --cfg-options load_from={options.target} "
                "model.backbone.init_cfg=None"
            )


if __name__ == "__main__":
    main()
