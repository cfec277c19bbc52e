"""Prepare DeepLesion: NIH's DL_info.csv and Images_png -> COCO files with masks, and a report.

python tools/prepare_data.py data/DeepLesion
"""

import argparse
import sys

from deeplesion.prepare import prepare


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
    args = parser.parse_args()
    try:
        preparation = prepare(args.root, csv=args.csv, workers=args.workers)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    print(preparation)
    return preparation.exit_code


if __name__ == "__main__":
    sys.exit(main())
