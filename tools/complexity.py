"""Parameters and operations of detectors, part by part, on one image at test time:
python tools/complexity.py configs/alignshift_3slice.py configs/i3d_3slice.py"""

import argparse

from deeplesion.command_line import command, config_help
from mmdet_ext.config.check import refused_by_parts
from mmdet_ext.config.overrides import add_config_options
from mmdet_ext.engine.run import load_config
from mmdet_ext.models.complexity import detector_complexity, format_complexity, input_shape

P3D_NOTE = """(paper), as published, holds one more BatchNorm and ReLU after each 1 x 1 convolution
of the dense blocks (3 operations an element), which P3DConv does not have."""


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "configs", nargs="+", metavar="config", help=config_help("config of a detector")
    )
    parser.add_argument(
        "--size", type=int, metavar="PX",
        help="height and width of the image in px (default: the config's)",
    )  # fmt: skip
    add_config_options(parser, checkpoint=False)
    options = parser.parse_args()
    for path in options.configs:
        config = load_config(path, options.cfg_options)
        slices, *size = input_shape(config)
        height, width = size = size if options.size is None else [options.size] * 2
        with refused_by_parts():
            parts = detector_complexity(config, size)
        fusion = config.model.backbone.get("fusion", {}).get("type")
        print(f"{path}: {fusion or config.model.type}, {slices} x {height} x {width}")
        print(format_complexity(parts))
        if fusion == "P3DConv":
            print(P3D_NOTE)
        print()


if __name__ == "__main__":
    main()
