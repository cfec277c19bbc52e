"""Write a synthetic DeepLesion in the official format: python tools/make_phantom.py ROOT."""

import argparse

from deeplesion.command_line import command, told_to_repeat
from deeplesion.phantom.make import make_phantom


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="folder to write to: new, empty, or an unfinished phantom")
    parser.add_argument("--patients", type=int, default=60, help="at least 3 (default %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels a side (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    options = parser.parse_args()
    with told_to_repeat():
        table = make_phantom(**vars(options))
    print(f"{table} written")


if __name__ == "__main__":
    main()
