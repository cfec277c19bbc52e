"""How near masks drawn from RECIST diameters come to a phantom's true ones: mean IoU by size and
shape. python tools/mask_quality.py ROOT, with ROOT from tools/make_phantom.py."""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.mask_quality import METHODS, SHAPES, SIZES, ious_by_group
from deeplesion.command_line import command


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="a phantom, as tools/make_phantom.py writes it")
    root = parser.parse_args().root
    groups = ious_by_group(root)
    print("Mean IoU with the true mask (share of lesions below 0.5)\n")
    cells = [f"{name:>22}" for name in METHODS]
    print("| lesions          |     n |" + " |".join(cells) + " |")
    print("|------------------|------:|" + "|".join(["-" * 22 + ":"] * len(cells)) + "|")
    for group in ("all", *SIZES, *SHAPES):
        if group not in groups:
            continue
        ious = np.array(groups[group])
        cells = [
            f"{f'{mean:.3f} ({poor:5.1%})':>22}"
            for mean, poor in zip(ious.mean(axis=0), (ious < 0.5).mean(axis=0), strict=True)
        ]
        print(f"| {group:<16} | {len(ious):>5} |" + " |".join(cells) + " |")


if __name__ == "__main__":
    main()
