"""Train a detector: python tools/train.py configs/alignshift_7slice.py"""

import argparse
import os

from deeplesion.command_line import command, config_help
from mmdet_ext.config.overrides import add_config_options
from mmdet_ext.engine.distributed import add_launcher, launched
from mmdet_ext.engine.run import load_config, train


@launched
@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help=config_help())
    parser.add_argument(
        "--work-dir",
        help="folder for checkpoints and logs (default: work_dirs/<the config's path below"
        " configs/>)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="continue from a checkpoint, or from the work directory's last one",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile backbone and neck")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by total batch / auto_scale_lr.base_batch_size",
    )
    add_config_options(parser)
    add_launcher(parser)
    # torch.distributed.launch passes it; torchrun sets the variable instead.
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))

    config = load_config(options.config, options.cfg_options, options.work_dir)
    config.launcher = options.launcher
    train(
        config,
        options.resume,
        options.amp,
        options.compile,
        options.auto_scale_lr,
        options.accept_differences,
    )


if __name__ == "__main__":
    main()
