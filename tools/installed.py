"""The commands as pip installs them: deeplesion-train is tools/train.py, and so on."""

import importlib
import sys
from pathlib import Path

from deeplesion.command_line import command
from deeplesion.errors import UserError

COMMANDS = {
    "deeplesion-train": "train",
    "deeplesion-test": "test",
    "deeplesion-evaluate": "evaluate",
    "deeplesion-prepare": "prepare_data",
    "deeplesion-phantom": "make_phantom",
    "deeplesion-detect": "detect",
    "deeplesion-export": "export",
    "deeplesion-check-run": "check_run",
    "deeplesion-study": "study",
    "deeplesion-optimize-anchors": "optimize_anchors",
    "deeplesion-complexity": "complexity",
    "deeplesion-convert": "convert_checkpoint",
    "deeplesion-average": "average_checkpoints",
    "deeplesion-proof-of-concept": "proof_of_concept",
    "deeplesion-show-attention": "show_attention",
    "deeplesion-mine-lesions": "mine_lesions",
}


@command()
def main() -> int | None:
    """Runs the command by whose name it was called."""
    name = COMMANDS[Path(sys.argv[0]).stem]
    try:
        module = importlib.import_module(f"mmdet_ext.tools.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("deeplesion", "mmdet_ext"):
            raise
        raise UserError(
            f"{error.name} is not installed; pip install 'deeplesion-mmdet[detector]' installs all"
            " that the commands need, '[data]' what those without a network need"
        ) from None
    return module.main()
