"""Write the mean of the last checkpoints of a training, to be tested:
python tools/average_checkpoints.py work_dirs/alignshift_7slice --last 4 --out mean.pth"""

import argparse
import re
from pathlib import Path

from deeplesion.command_line import command
from deeplesion.errors import MissingDataError, UserError
from mmdet_ext.checkpoint import (
    DamagedCheckpoint,
    how_averaged,
    last_checkpoint,
    load_checkpoint_file,
    save_checkpoint_file,
)
from mmdet_ext.engine.averaging import average_checkpoints


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT",
        help=".pth files of one run, or its work directory",
    )  # fmt: skip
    parser.add_argument(
        "--last", type=int, metavar="N",
        help="average the last N checkpoints of a work directory (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="file to write, such as mean.pth"
    )
    options = parser.parse_args()
    paths = checkpoints_of(options.checkpoints, options.last)
    if options.out.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"--out {options.out} is one of the checkpoints: give another name")
    mean = average_checkpoints(paths)
    save_checkpoint_file(mean, options.out)
    print(f"{options.out}: {how_averaged(mean)}")


def checkpoints_of(given: list[Path], last: int | None) -> list[Path]:
    """The files that are meant, those of a work directory by their number. A run that was started
    anew there leaves files of the earlier one behind, which are of no mean with its own."""
    if len(given) > 1 or not given[0].is_dir():
        if last is not None:
            raise UserError("--last is for a work directory: leave it out, or give the folder")
        return given
    numbered = [
        (int(match[2]), match[1], file)
        for file in given[0].glob("*.pth")
        if (match := re.fullmatch(r"(epoch|iter)_(\d+)\.pth", file.name))
    ]
    if len({kind for _, kind, _ in numbered}) > 1:
        raise UserError(f"{given[0]} holds epoch_*.pth and iter_*.pth: give the files you mean")
    of_run = names_of_run(given[0])
    found = [file for *_, file in sorted(numbered) if of_run is None or file.name in of_run]
    wanted = len(found) if last is None else last
    if not 2 <= wanted <= len(found):
        raise MissingDataError(
            f"{given[0]} holds {len(found)} checkpoints (epoch_*.pth or iter_*.pth), and the mean "
            f"of {wanted} is asked for; at least two are needed. "
            "default_hooks.checkpoint.max_keep_ckpts says how many a training keeps"
        )
    return found[-wanted:]


def names_of_run(folder: Path) -> list[str] | None:
    """The checkpoints that the last run in a work directory has kept, as its last one says; None if
    that does not say. Raises DamagedCheckpoint if that file is damaged."""
    newest, damaged = last_checkpoint(folder)
    if damaged:
        raise DamagedCheckpoint("\n".join(damaged))
    content = load_checkpoint_file(newest) if newest else {}
    return content.get("message_hub", {}).get("runtime_info", {}).get("checkpoints")


if __name__ == "__main__":
    main()
