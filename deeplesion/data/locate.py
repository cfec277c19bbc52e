"""Where a download lies: archives are unpacked in many ways, and what is not where it is expected
is looked for around there."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from deeplesion.data.slices import folder_names
from deeplesion.errors import DataError, MissingDataError

IMAGES = "Images_png"
TABLE = "DL_info.csv"
# Folder of the COCO files, by whose recipe their masks are drawn.
ANNOTATIONS = {"default": "annotations", "released": "annotations_released"}
# Archives unpacked into folders of their own, in a folder: Images_png/Images_png_01/Images_png.
DEPTH = 3
_MOST_LISTED = 5


def find_image_folders(
    root: Path, series: Collection[str], given: Sequence[Path] = ()
) -> list[Path]:
    """The folders in which series of slices lie, `<folder>/<series>/<NNN>.png`.

    Looks in `root/Images_png`, or in the folders that are given, and for the series that are in
    none of them below these and below `root`.

    Args:
        root: of the data set.
        series: the names of the wanted ones, '000001_01_01'.
        given: folders to look in instead of `root/Images_png` and below `root`.

    Returns:
        in the order in which they count, `root/Images_png` or the given ones first, then those that
        hold a wanted series; see `SliceFolder`.

    Raises:
        MissingDataError: a given folder is not there.
        DataError: a series lies in several of the folders that were found, none of them expected.
    """
    for folder in given:
        if not folder.is_dir():
            raise MissingDataError(f"--images {folder}: there is no such folder")
    expected = list(given) or [root / IMAGES]
    missing = set(series)
    for folder in expected:
        missing -= folder_names(folder)
    found: dict[str, list[Path]] = {}
    if missing:
        for folder in _folders_below(list(given) or [root]):
            if folder not in expected:
                for name in missing & folder_names(folder):
                    if any(file.endswith(".png") for file in folder_names(folder / name)):
                        found.setdefault(name, []).append(folder)
    doubled = sorted(name for name, folders in found.items() if len(folders) > 1)
    if doubled:
        places = "\n".join(f"  {folder / doubled[0]}" for folder in found[doubled[0]])
        raise DataError(
            f"{len(doubled):,} series lie in more than one place, such as\n{places}\nSay with"
            " --images which folder is the right one (several times if need be: the first that has"
            " a series counts)"
        )
    return list(dict.fromkeys([*expected, *(folders[0] for folders in found.values())]))


def find_table(root: Path) -> Path:
    """`root/DL_info.csv`, or the only file of this name below `root` or beside it.

    Raises:
        MissingDataError: there is none.
        DataError: there are several.
    """
    if (root / TABLE).is_file():
        return root / TABLE
    folders = [*_folders_below([root], depth=2), root.resolve().parent]
    tables = [
        folder / name
        for folder in folders
        for name in sorted(folder_names(folder))
        if name.lower() == TABLE.lower() and (folder / name).is_file()
    ]
    if not tables:
        raise MissingDataError(f"table of lesions not found: {root / TABLE}\n{advice(root)}")
    if len(tables) > 1:
        raise DataError(
            f"{root / TABLE} is not there, but {', '.join(map(str, tables[:_MOST_LISTED]))}: say"
            " with --csv which one it is"
        )
    return tables[0]


def advice(root: Path) -> str:
    return (
        f"Expected {TABLE} and {IMAGES} in {root}. Download them (NIH Clinical Center,"
        " DeepLesion, https://nihcc.app.box.com/v/DeepLesion) and unpack every archive there, say"
        " with --csv and --images where they are, or make a synthetic data set: python"
        f" tools/make_phantom.py {root}"
    )


def _folders_below(places: Sequence[Path], depth: int = DEPTH) -> Iterator[Path]:
    """The places and the folders below them; not those of series, of which there are thousands."""
    level = list(places)
    for _ in range(depth + 1):
        yield from level
        level = [
            Path(entry.path)
            for folder in level
            for entry in _entries(folder)
            if not entry.name.startswith(".") and not is_series(entry.name) and entry.is_dir()
        ]


def is_series(name: str) -> bool:
    """Whether a folder is called like a series, '000001_01_01'."""
    parts = name.split("_")
    return len(parts) == 3 and all(part.isdecimal() for part in parts)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:  # nothing to be found there
        return []
