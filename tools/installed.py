"""The commands as pip installs them: deeplesion-train is tools/train.py, and so on."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from deeplesion.command_line import command

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


def main() -> int | None:
    """Runs the command by whose name it was called."""
    return load().main()


@command()
def load() -> ModuleType:
    """The module of the command; it imports libraries that may be missing."""
    return importlib.import_module(f"mmdet_ext.tools.{COMMANDS[Path(sys.argv[0]).stem]}")
