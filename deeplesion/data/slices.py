"""CT slices: a 16-bit PNG of DeepLesion -> Hounsfield units; a key slice -> the stack of slices
around it, at the distance that an operator expects."""

import contextlib
import math
import os
import re
import struct
from pathlib import Path

import cv2
import numpy as np

from deeplesion.conventions import HU_OFFSET, LARGEST_SIDE
from deeplesion.errors import DataError, MissingDataError
from deeplesion.files import write_whole

try:
    import kornia_rs  # optional: decodes PNGs faster
except ModuleNotFoundError:
    kornia_rs = None

GREY_16 = b"\x10\x00"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
POLICIES = ("keep_thick", "normalize")
INTERPOLATIONS = ("exact", "released")
# Padding outside a round field of view is -3024 at the lowest, metal 30,710 at the highest. Values
# stored without the offset come out below, as numbers with a sign on both sides.
LEAST_HU, MOST_HU = -5000, 31_000


class SliceFolder:
    """The `Images_png` folder of DeepLesion: `<root>/<series>/<NNN>.png`; or several such folders.

    Of several the first that has a series is the one it is read from. Holds nothing but paths, so
    it can be copied to worker processes.
    """

    def __init__(self, root: str | Path, *further: str | Path):
        self.root = Path(root)
        self._elsewhere: dict[str, Path] = {}  # series that are not in `root`
        for folder in map(Path, further):
            for series in folder_names(folder):
                self._elsewhere.setdefault(series, folder)
        if self._elsewhere:
            for series in folder_names(self.root):
                self._elsewhere.pop(series, None)

    def root_of(self, file_name: str) -> Path:
        """The folder in which the series of a slice lies, the first one if it lies in none."""
        return self._elsewhere.get(file_name.partition("/")[0], self.root)

    def path(self, file_name: str) -> Path:
        """Where the slice `file_name`, such as '000001_01_01/109.png', lies."""
        return self.root_of(file_name) / file_name

    def read(self, file_name: str) -> np.ndarray:
        """Read one slice, (H, W) int16 Hounsfield units (the stored value minus `HU_OFFSET`).

        Raises DataError if it is truncated, damaged, anything but a 16-bit grey PNG, or holds no
        Hounsfield units, and MissingDataError if there is no such file.
        """
        path = self.path(file_name)
        try:
            encoded = path.read_bytes()
        except FileNotFoundError:
            raise MissingDataError(
                f"slice not found: {path}. Expected a DeepLesion slice there: check the data"
                " folder, and that every archive of the download was unpacked into it"
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        if not PNG_SIGNATURE.startswith(encoded[: len(PNG_SIGNATURE)]):
            raise DataError(f"{path} is not a PNG. Unpack or download it again")
        header = encoded[24:26]  # bits and kind of colour
        if len(encoded) >= 26 and header != GREY_16:
            raise DataError(
                f"{path} is a PNG of {header[0]} bits and colour type {header[1]}; expected 16-bit"
                f" grey (value - {HU_OFFSET} = Hounsfield units), as NIH distributes DeepLesion"
            )
        image = _decode_png(encoded)
        if image is None or image.dtype != np.uint16 or image.ndim != 2:
            raise DataError(
                f"cannot read {path}: the PNG is truncated or damaged ({len(encoded)} bytes)."
                " Unpack or download it again"
            )
        # Modulo 2**16 the subtraction is the wanted one, so no wider type is needed in between.
        image -= np.uint16(HU_OFFSET)
        hu = image.view(np.int16)
        if not (_plausible(hu[::8, ::8]) or _plausible(hu)):  # mostly a look at every 64th will do
            raise DataError(
                f"{path} holds no Hounsfield units: its values minus {HU_OFFSET} are {hu.min()} to"
                f" {hu.max()}. Expected a PNG as NIH distributes it: store HU + {HU_OFFSET}"
            )
        return hu


def folder_names(folder: Path) -> set[str]:
    """The names of what is in a folder; none if it is not there."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None


def _plausible(hu: np.ndarray) -> bool:
    """Whether any pixel is of a density that CT shows: from far below air to solid metal."""
    return bool(((hu > LEAST_HU) & (hu < MOST_HU)).any())


def plan_stack(
    key_slice: int,
    thickness_mm: float | None,
    slice_range: tuple[int, int],
    num_slices: int,
    policy: str = "keep_thick",
    target_mm: float = 2.0,
    interpolation: str = "exact",
) -> tuple[list[tuple[int, int, float]], float]:
    """Say which slices make up the stack around a key slice; `load_slices` explains the options.

    Returns, for each of the `num_slices` positions from low to high index, (near, far, weight): the
    slice there is (1 - weight) * slice near + weight * slice far, weight 0 where near == far; and
    the thickness of the stack in mm. Raises ValueError on an option out of its range.
    """
    _check_options(num_slices, policy, target_mm, interpolation)
    low, high = int(slice_range[0]), int(slice_range[1])
    if not low <= key_slice <= high:
        raise DataError(f"key slice {key_slice} is outside its slice range {low}..{high}")

    if thickness_mm is None or not math.isfinite(thickness_mm) or thickness_mm <= 0:
        return [(key_slice, key_slice, 0.0)] * num_slices, math.inf
    if policy == "keep_thick" and thickness_mm > target_mm:
        step, stack_mm = 1.0, float(thickness_mm)
    else:
        step, stack_mm = target_mm / thickness_mm, float(target_mm)

    positions = []
    for offset in range(-(num_slices // 2), num_slices // 2 + 1):
        # In units of the own slices. Rounded, so that 2 / 0.1 * 3 is slice 60 and not a hair after.
        distance = round(abs(offset) * step, 6)
        fraction = distance if interpolation == "exact" else round(step, 6)
        ends = (math.floor(distance), math.ceil(distance))
        sign = 1 if offset > 0 else -1
        near, far = (min(max(key_slice + sign * end, low), high) for end in ends)
        positions.append((near, far, fraction % 1 if near != far else 0.0))
    return positions, stack_mm


def load_slices(
    folder: SliceFolder,
    file_name: str,
    thickness_mm: float | None,
    slice_range: tuple[int, int] | None,
    num_slices: int,
    policy: str = "keep_thick",
    target_mm: float = 2.0,
    interpolation: str = "exact",
) -> tuple[np.ndarray, float]:
    """Load the stack of slices around the key slice `file_name` ('000001_01_01/109.png').

    Args:
        folder: where the slices are.
        file_name: the key slice, which becomes the middle of the stack.
        thickness_mm: distance between slices; where it is unknown (None, NaN, infinite, <= 0) the
            key slice is repeated and the stack's thickness is infinite.
        slice_range: first and last slice, inclusive, of the volume that the key slice is part of.
            A series folder may hold several; beyond an end the end slice is repeated. None if
            there are no neighbours or their names are not known: as of unknown thickness. Then the
            file may have any name.
        num_slices: D, odd.
        policy: 'normalize' resamples every volume to slices `target_mm` apart; 'keep_thick'
            (AlignShift) only the thin ones, those of thickness <= `target_mm`: a thicker volume
            keeps its own slices.
        target_mm: distance between resampled slices.
        interpolation: resampling is linear in z between the two nearest own slices. 'exact' weighs
            them by the distance of each position; 'released' repeats what the code released with
            MULAN, A3D and AlignShift does: the weights of the first neighbour serve for all, which
            differs from the second neighbour on when target_mm / thickness_mm is not whole.

    Returns:
        (H, W, D) int16 Hounsfield units, slices in ascending file order, resampled values rounded
        to the nearest integer (halves to even); and the stack's thickness in mm.

    Every file is read once, and only files with a say in the result. Raises ValueError on an option
    out of its range, and DataError (of a missing file MissingDataError), with the names of the file
    and of the key slice, if one of the slices is unreadable or of another size than the key slice.
    """
    if slice_range is None:
        _check_options(num_slices, policy, target_mm, interpolation)
        return np.repeat(folder.read(file_name)[..., None], num_slices, axis=2), math.inf
    series, key_slice = _series_and_index(file_name)
    try:
        positions, stack_mm = plan_stack(
            key_slice, thickness_mm, slice_range, num_slices, policy, target_mm, interpolation
        )
        images = {}
        for index in [key_slice, *(i for near, far, _ in positions for i in (near, far))]:
            if index not in images:
                images[index] = folder.read(slice_name(series, index))
                if images[index].shape != images[key_slice].shape:
                    raise DataError(
                        f"{folder.path(slice_name(series, index))} is of shape"
                        f" {images[index].shape}, its key slice of {images[key_slice].shape};"
                        " slices of one volume must be of one size"
                    )
    except DataError as error:
        raise type(error)(f"{error} (while loading the stack around {file_name})") from None

    # cv2.merge interleaves about twice as fast as numpy.stack; of one slice it drops the last axis.
    stack = cv2.merge([blend(images[near], images[far], w) for near, far, w in positions])
    return stack.reshape(*images[key_slice].shape, num_slices), stack_mm


def files_in_reach(
    file_name: str, thickness_mm: float | None, slice_range: tuple[int, int], num_slices: int
) -> list[str]:
    """File names of all slices that stacks of up to `num_slices` slices around a key slice touch.

    Under either policy and interpolation, for resampling to 2 mm; arguments as of `load_slices`.
    """
    series, key_slice = _series_and_index(file_name)
    # 'normalize' needs no other slices: it takes the same ones of thin volumes, and of thick ones
    # it reaches less far.
    positions, _ = plan_stack(key_slice, thickness_mm, slice_range, num_slices, "keep_thick")
    indices = {index for near, far, _ in positions for index in (near, far)}
    return [slice_name(series, index) for index in sorted(indices)]


def _series_and_index(file_name: str) -> tuple[str, int]:
    name = re.fullmatch(r"(.+)/(\d+)\.png", file_name)
    if name is None:
        raise DataError(f"file_name must be like '000001_01_01/109.png', got {file_name!r}")
    return name[1], int(name[2])


def slice_name(series: str, index: int) -> str:
    """File name, below `Images_png`, of slice `index` of `series`: '000001_01_01/109.png'."""
    return f"{series}/{index:03d}.png"


def write_slice(path: Path, hu: np.ndarray) -> None:
    """Writes (H, W) Hounsfield units as a slice that `SliceFolder` reads."""
    write_png(path, (hu.astype(np.int32) + HU_OFFSET).astype(np.uint16))


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes (H, W) uint8 or uint16 as a grey PNG."""
    encoded, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 2])
    if not encoded:
        raise RuntimeError(f"{path}: OpenCV could not encode a {pixels.dtype} {pixels.shape} image")
    write_whole(path, data.tobytes())


def _decode_png(encoded: bytes) -> np.ndarray | None:
    """The image in a 16-bit grey PNG, (H, W) uint16, or None if it is damaged."""
    encoded = _image_chunks(encoded)
    if encoded is None:
        return None
    # kornia-rs takes six tenths of OpenCV's time, and most of loading is decoding. Where it fails,
    # OpenCV has the last word.
    if kornia_rs is not None:
        width, height = struct.unpack(">II", encoded[16:24])
        if max(width, height) <= LARGEST_SIDE:
            with contextlib.suppress(Exception):
                return kornia_rs.io.decode_image_png_u16(encoded, (height, width), "mono")[..., 0]
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # a header that promises the impossible
        return None


def _image_chunks(encoded: bytes) -> bytes | None:
    """A PNG without chunks that are not of the image, None if it does not come to its end.

    Found by fuzzing: OpenCV 4.12 crashes on a damaged image that calls itself animated (acTL).
    """
    at, parts, others = len(PNG_SIGNATURE), [PNG_SIGNATURE], False
    while at + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        end = at + 12 + length
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            parts.append(encoded[at:end])
        else:
            others = True
        if kind == b"IEND":
            return b"".join(parts) if others else encoded
        at = end
    return None


def blend(near: np.ndarray, far: np.ndarray, weight: float) -> np.ndarray:
    """(1 - weight) * near + weight * far of two int16 slices, rounded to int16."""
    if weight == 0:
        return near
    # float32 is exact to better than 0.01 HU over the whole range of int16.
    blended = near * np.float32(1 - weight) + far * np.float32(weight)
    return np.rint(blended, out=blended).astype(np.int16)


def _check_options(num_slices: int, policy: str, target_mm: float, interpolation: str) -> None:
    if num_slices < 1 or num_slices % 2 == 0:
        raise ValueError(f"num_slices must be odd and at least 1, got {num_slices}")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    if not 0 < target_mm < math.inf:
        raise ValueError(f"target_mm must be a positive number of millimetres, got {target_mm}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}")
