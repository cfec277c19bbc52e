"""Prepare DeepLesion: NIH's DL_info.csv and Images_png -> COCO files with masks, and a report.

python tools/prepare_data.py data/DeepLesion
python tools/prepare_data.py data/DeepLesion --cache    # training then reads faster
"""

import argparse
import sys

from deeplesion.data.prepare import NUM_SLICES, prepare
from deeplesion.data.slice_cache import fill_cache


def number_of_slices(text: str) -> int:
    if not text.isdecimal() or int(text) % 2 == 0:
        raise argparse.ArgumentTypeError(
            f"D must be an odd number of slices, got {text!r}; ROOT goes before --cache"
        )
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Draw the lesions' masks and write ROOT/annotations/{train,val,test}.json, and"
        " report.csv with every problem found. Run again, it continues where it was interrupted.",
        epilog="Exit status: 0 done, also with a partial download; 1 done, but key slices are left"
        " out as data is missing or unreadable; 2 nothing could be done; 130 interrupted.",
    )
    parser.add_argument("root", metavar="ROOT", help="folder with DL_info.csv and Images_png")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores)")
    parser.add_argument(
        "--csv", metavar="FILE", help="table of lesions (default: ROOT/DL_info.csv)"
    )
    parser.add_argument(
        "--cache",
        type=number_of_slices,
        nargs="?",
        const=NUM_SLICES,
        metavar="D",
        help="then write ROOT/slice_cache, from which training reads faster: the slices that stacks"
        f" of up to D slices can touch (default {NUM_SLICES}), about as large as their PNGs",
    )
    args = parser.parse_args()
    try:
        preparation = prepare(args.root, csv=args.csv, workers=args.workers)
        print(preparation)
        exit_code = preparation.exit_code
        if args.cache:
            cache = fill_cache(args.root, args.cache, workers=args.workers)
            print(cache)
            exit_code |= cache.exit_code
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
