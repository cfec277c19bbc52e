"""The slices that training reads, a second time in a format that is decoded faster than PNG.

`slice_cache/000001_01_01/109.b2nd` is the copy of `Images_png/000001_01_01/109.png`: a Blosc2
array, (H, W) int16 Hounsfield units, about as large as the PNG: `blosc2.open(path)[:]`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from deeplesion.data.coco import image_folders, read_annotations
from deeplesion.data.locate import ANNOTATIONS
from deeplesion.data.slices import SliceFolder, files_in_reach
from deeplesion.errors import CacheError, DataError
from deeplesion.files import size_text, write_whole
from deeplesion.processes import available_cores, in_processes

CACHE_NAME = "slice_cache"
# The end of a PNG holds the checksum of its whole image (zlib's Adler-32, then the last CRC and the
# closing chunk): two PNGs of one size and one end are one image.
_PNG_END = 32


_FROM_PNGS = "Or train from PNGs: --cfg-options train_dataloader.dataset.cache=None"
_ADVICE = (
    "Run tools/prepare_data.py with --cache: it writes what is missing, old or damaged (for stacks"
    f" of D > 7 slices --cache D). {_FROM_PNGS}"
)


class CachedSliceFolder(SliceFolder):
    """A SliceFolder that reads every slice from its copy in a cache, checked against the PNG.

    `further`: folders of series that are not in `root`. Holds nothing but paths, so it can be
    copied to worker processes. Raises CacheError if blosc2, which reads it, is not installed.
    """

    def __init__(self, root: str | Path, cache: str | Path, *further: str | Path):
        super().__init__(root, *further)
        self.cache = Path(cache)
        _blosc2()

    def copy(self, file_name: str) -> Path:
        """Where the cache has the slice `file_name`, such as '000001_01_01/109.png'."""
        return (self.cache / file_name).with_suffix(".b2nd")

    def read(self, file_name: str) -> np.ndarray:
        """Read one slice, (H, W) int16 Hounsfield units, as `SliceFolder.read` does.

        Raises CacheError if the copy is not there, damaged, or made of another PNG than is there
        now, and MissingDataError if the PNG is not there.
        """
        path = self.copy(file_name)
        try:
            png = _png_stamp(self.path(file_name))
        except OSError:
            return super().read(file_name)  # raises, and says what to do
        try:
            frame = path.read_bytes()
        except FileNotFoundError:
            raise CacheError(f"{path} is not in the slice cache. {_ADVICE}") from None
        except OSError as error:
            raise CacheError(f"cannot read {path}: {error.strerror}. {_ADVICE}") from None
        try:
            array = _blosc2().ndarray_from_cframe(frame)
            stamp, checksum = array.schunk.vlmeta["png"], array.schunk.vlmeta["crc32"]
            hu = np.empty(array.shape, array.dtype)
            array.schunk.decompress_chunk(0, hu)  # the only one
            damaged = zlib.crc32(hu) != checksum
        except Exception:  # damaged bytes lead Blosc2 into errors of any kind
            damaged = True
        if damaged:
            raise CacheError(f"{path} is damaged. {_ADVICE}")
        if stamp != png:
            raise CacheError(
                f"{path} was made of another image than {self.path(file_name)} is now. {_ADVICE}"
            )
        return hu

    def write(self, file_name: str) -> bool:
        """Put a slice into the cache; False if it is there, current and whole.

        Raises DataError if the PNG is missing or cannot be read.
        """
        hu = None
        with contextlib.suppress(DataError):
            hu = self.read(file_name)
        if hu is not None:
            return False
        hu = super().read(file_name)
        blosc2 = _blosc2()
        # Of Blosc2's codecs and filters the fastest to decode on DeepLesion's slices; about as
        # large as the PNG.
        compression = blosc2.CParams(
            codec=blosc2.Codec.LZ4HC, clevel=5, filters=[blosc2.Filter.SHUFFLE]
        )
        array = blosc2.asarray(hu, chunks=hu.shape, blocks=hu.shape, cparams=compression)
        array.schunk.vlmeta["png"] = _png_stamp(self.path(file_name))
        array.schunk.vlmeta["crc32"] = zlib.crc32(hu)
        write_whole(self.copy(file_name), array.to_cframe())
        return True


@dataclass(frozen=True)
class CacheReport:
    """What `fill_cache` did; `str()` of it is the summary a user reads.

    Attributes:
        folder: the cache.
        num_slices: D, the deepest stack that it serves.
        slices, written: how many slices it needs, and how many of them were written now.
        problems: what is wrong with the slices that could not be read.
    """

    folder: Path
    num_slices: int
    slices: int
    written: int
    problems: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """1 if slices could not be read, else 0."""
        return int(bool(self.problems))

    def __str__(self) -> str:
        there = self.slices - self.written - len(self.problems)
        lines = [f"UNREADABLE: {problem}" for problem in self.problems]
        lines.append(
            f"Slice cache for training on up to {self.num_slices} slices: {self.written:,} written,"
            f" {there:,} were there, {len(self.problems):,} unreadable. In {self.folder}"
        )
        return "\n".join(lines)


def fill_cache(
    root: str | Path, num_slices: int, workers: int | None = None, masks: str = "default"
) -> CacheReport:
    """Write `root/slice_cache`: all slices that training can touch, which are few of a data set.

    These are the slices of `root/annotations/train.json` (with `prepare`'s `out`: in that folder;
    the released masks' file, with masks='released', holds the same ones)
    and their neighbours in stacks of up to `num_slices` (odd), 2 mm apart or, under either
    thickness policy, as far as the scan has them. What is there is checked against the PNG and
    kept; interrupted, the next call continues.

    With more than one worker (default: all cores) processes are spawned: call it from under
    `if __name__ == "__main__"`. Raises DataError without blosc2 or a train.json of `prepare`,
    OSError if the disk has not the room, ValueError on an even `num_slices`, UserError if a process
    was killed.
    """
    root = Path(root)
    workers = available_cores() if workers is None else workers
    annotations = read_annotations(root / ANNOTATIONS[masks] / "train.json")
    first, *further = image_folders(annotations, root)
    folder = CachedSliceFolder(first, root / CACHE_NAME, *further)
    names = set()
    for image in annotations["images"]:
        geometry = image["file_name"], image["thickness_mm"], image["slice_range"]
        names.update(files_in_reach(*geometry, num_slices))
    names = sorted(names)
    _check_room(root, folder, names)
    written, problems = 0, []
    progress = tqdm(total=len(names), unit=" slices")
    with progress, closing(in_processes(partial(_write, folder), names, workers)) as done:
        for result in done:
            if isinstance(result, str):
                problems.append(result)
            else:
                written += result
            progress.update()
    return CacheReport(folder.cache, num_slices, len(names), written, tuple(problems))


def _check_room(root: Path, folder: CachedSliceFolder, names: list[str]) -> None:
    missing = [folder.path(name) for name in names if not folder.copy(name).is_file()]
    needed = int(1.15 * sum(png.stat().st_size for png in missing if png.is_file()))
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(
            f"the slice cache in {root} needs {size_text(needed)} more, {size_text(free)} are free."
            " Make room, or make slice_cache there a link to a folder on another disk"
        )


def _write(folder: CachedSliceFolder, file_name: str) -> bool | str:
    """Whether the slice was written, or what is wrong with it."""
    try:
        return folder.write(file_name)
    except DataError as error:
        return str(error)


def _png_stamp(path: Path) -> list[int | bytes]:
    """What tells one PNG from another without reading it: its size and its end."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _PNG_END, 0))
        return [size, file.read()]


def _blosc2() -> ModuleType:
    # Imported when needed: all but the cache works without it.
    try:
        import blosc2
    except ModuleNotFoundError:
        raise CacheError(
            f"the slice cache needs blosc2: pip install blosc2. {_FROM_PNGS}"
        ) from None
    # The processes that load data are the parallelism.
    blosc2.set_nthreads(1)
    return blosc2
