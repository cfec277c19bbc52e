"""report.html: the lesions of one scan to scroll through, measured and outlined, and an overview of
where they are. One file that opens from disk and needs no network."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath

import cv2
import numpy as np
from skimage.measure import find_contours

from ct_volumes.crops import Crop, crop_lesions
from ct_volumes.lesions import Algorithm, Lesion, LesionSlice
from ct_volumes.projections import Projection, project
from ct_volumes.volume import CTVolume
from deeplesion.files import write_whole
from deeplesion.report.template import fill, script_json

TEMPLATE = Path(__file__).with_name("page.html")
SCRIPT = TEMPLATE.with_suffix(".js")
# Voxels take about one byte each in the page, see `pack`.
WHOLE_PIXELS = 256  # the longer side of a whole slice, which shows where a lesion is
WHOLE_STEP_HU = 8
TIMES = "\u00d7"
LUNG_HU = -500  # a lesion whose surroundings are darker than that opens in the lung window


def write_page(
    path: Path,
    lesions: Sequence[Lesion],
    volume: CTVolume,
    algorithm: Algorithm,
    identify: bool = False,
) -> None:
    """Write the page.

    Lesions are numbered from 1 in the order given. Each is shown in a crop of the scan in exact HU,
    with 50 mm around and 15 mm above and below it where there are few, 20 and 10 mm where there are
    many. At most 18 million voxels go into a page and 2 million to a lesion, about a byte each;
    where that is too little slices and then pixels are left out, and the page says so (see
    `crops.crop_lesions`).

    Args:
        path: of the page, which is there as a whole or not at all.
        lesions: in any order; none gives a page that says so.
        volume: that they were found in.
        algorithm: that found them.
        identify: also tell the path, number, description and UID of what was read. Without it
            nothing in the page says whose scan it is.
    """
    crops = crop_lesions(lesions, volume)
    wholes = sorted({lesion.best.index for lesion in lesions})
    views = {f"crop-{k}": pack(crop.of(volume.hu)) for k, crop in enumerate(crops)}
    views |= {f"whole-{k}": pack(_whole_slice(volume, k)[None]) for k in wholes}
    projections = project(volume)
    data = dict(
        scan=_scan(volume, identify),
        algorithm=_algorithm(algorithm, identify),
        spacing=volume.spacing_mm,
        shape=volume.hu.shape,
        whole=_whole_slice(volume, 0).shape,
        projections={name: _picture(each, volume) for name, each in projections.items()},
        lesions=[
            _lesion(number, lesion, volume, crop, projections)
            for number, (lesion, crop) in enumerate(zip(lesions, crops, strict=True))
        ],
    )
    page = fill(
        TEMPLATE.read_text(encoding="utf-8"),
        title=escape(f"{_count(len(lesions))}: {algorithm.name}"),
        data=script_json(data),
        script=SCRIPT.read_text(encoding="utf-8"),
        views="\n".join(
            f'<script type="application/octet-stream" id="{name}">{text}</script>'
            for name, text in views.items()
        ),
    )
    write_whole(Path(path), page)


def pack(stack: np.ndarray) -> str:
    """(n, h, w) int16 -> base64 of zlib of what it takes to get the stack back exactly.

    Each voxel is predicted from those to the left (a), above (b) and above to the left (c) of it as
    the median of a, b and a + b - c: the predictor of LOCO-I (Weinberger et al., IEEE Trans. Image
    Processing 2000, eq. 1). What is left over is folded to 0, -1, 1, -2, ... -> 0, 1, 2, 3, ...;
    all low bytes come first, then all high ones, which are nearly always 0.
    """
    values = stack.astype(np.int32)
    guess = np.zeros_like(values)
    guess[:, 0, 1:], guess[:, 1:, 0] = values[:, 0, :-1], values[:, :-1, 0]
    left, above, corner = values[:, 1:, :-1], values[:, :-1, 1:], values[:, :-1, :-1]
    low, high = np.minimum(left, above), np.maximum(left, above)
    guess[:, 1:, 1:] = np.clip(left + above - corner, low, high)
    rest = (values - guess).astype(np.int16)  # wraps around, and back again in the browser
    folded = ((rest << 1) ^ (rest >> 15)).view(np.uint16).ravel()
    planes = (folded & 255).astype(np.uint8).tobytes() + (folded >> 8).astype(np.uint8).tobytes()
    packer = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED)
    return base64.b64encode(packer.compress(planes) + packer.flush()).decode("ascii")


def outline(piece: LesionSlice) -> str:
    """The mask's outline as an SVG path in half pixels, (0, 0) the centre of the first pixel.

    It runs half way between the centres of pixels inside and outside.
    """
    path = []
    for contour in find_contours(np.pad(piece.patch.mask, 1).astype(np.float32), 0.5, "high"):
        # Half pixels are whole numbers here; the pad moved all by one pixel.
        points = np.rint(2 * (contour[:, ::-1] - 1 + (piece.patch.x, piece.patch.y))).astype(int)
        steps = np.diff(points, axis=0)
        # Steps of one direction become one.
        turns = np.flatnonzero((steps[1:] != steps[:-1]).any(axis=1)) + 1
        corners = points[np.concatenate([[0], turns])]
        moves = " ".join(f"{x} {y}" for x, y in np.diff(corners, axis=0).tolist())
        path.append(f"M{corners[0, 0]} {corners[0, 1]}l{moves}z")
    return "".join(path)


def _whole_slice(volume: CTVolume, index: int) -> np.ndarray:
    """A slice made small by averaging, in steps of 8 HU: enough to see where one is."""
    hu = volume.hu[index].astype(np.float32)
    scale = min(WHOLE_PIXELS / max(hu.shape), 1)
    size = [max(round(length * scale), 1) for length in hu.shape[::-1]]
    small = cv2.resize(hu, size, interpolation=cv2.INTER_AREA)
    return (np.rint(small / WHOLE_STEP_HU) * WHOLE_STEP_HU).clip(-32768, 32760).astype(np.int16)


def _picture(projection: Projection, volume: CTVolume) -> dict:
    """A projection, and at which height of it each slice lies."""
    png = cv2.imencode(".png", projection.grey)[1]
    height, width = projection.grey.shape
    levels = projection.place(volume.positions_mm[:, None] * volume.normal)[:, 1]
    return dict(
        png=base64.b64encode(png).decode("ascii"), w=width, h=height, levels=_rounded(levels)
    )


def _mark(lesion: Lesion, volume: CTVolume, projection: Projection) -> dict:
    """A lesion in a projection: the box around all of it, and the centroid."""
    corners = np.array([[s.bbox[[0, 2, 0, 2]], s.bbox[[1, 1, 3, 3]]] for s in lesion.slices])
    index = np.array([s.index for s in lesion.slices])
    points = volume.to_world(corners[:, 0], corners[:, 1], index[:, None])
    to_head, to_feet = volume.reach_mm[index].T[..., None, None] * volume.normal
    points = projection.place(np.concatenate([points - to_head, points + to_feet])).reshape(-1, 2)
    return dict(
        box=_rounded([*points.min(axis=0), *points.max(axis=0)]),
        centre=_rounded(projection.place(lesion.centroid_mm)),
    )


def _lesion(number: int, lesion: Lesion, volume: CTVolume, crop: Crop, projections: dict) -> dict:
    long, short = lesion.diameters_mm.tolist()
    return dict(
        number=number + 1,
        score=round(float(lesion.score), 4),
        long=round(long, 2),
        short=round(short, 2),
        volume=round(float(lesion.volume_mm3), 2),
        first=lesion.first,
        last=lesion.last,
        best=lesion.best.index,
        position=_rounded(lesion.centroid_mm),
        measured=lesion.recist_index,
        recist=_rounded(lesion.recist),
        box=_rounded(lesion.box),
        window="lung" if _surroundings(lesion.best, volume) < LUNG_HU else "soft tissue",
        crop=asdict(crop),
        # Of each slice: the score (none where it is interpolated) and the outline.
        slices=[
            (None if s.score is None else round(float(s.score), 4), outline(s))
            for s in lesion.slices
        ],
        marks={name: _mark(lesion, volume, each) for name, each in projections.items()},
    )


def _surroundings(piece: LesionSlice, volume: CTVolume) -> float:
    """Median HU of a rim around the mask."""
    rim = 5
    x, y = max(piece.patch.x - rim, 0), max(piece.patch.y - rim, 0)
    height, width = np.add(piece.patch.mask.shape, (piece.patch.y + rim, piece.patch.x + rim))
    inside = np.zeros(volume.hu.shape[1:], np.uint8)
    piece.patch.paint(inside, 1)
    hu, inside = volume.hu[piece.index, y:height, x:width], inside[y:height, x:width]
    around = cv2.dilate(inside, np.ones((2 * rim + 1,) * 2, np.uint8)) > inside
    return float(np.median(hu[around])) if around.any() else 0.0


def _scan(volume: CTVolume, identify: bool) -> list[tuple[str, str]]:
    """What is told of the scan: names and values."""
    source = volume.source
    slices, rows, columns = volume.hu.shape
    row, column = volume.spacing_mm
    told = [
        ("Slices", f"{slices} of {columns} {TIMES} {rows} pixels"),
        ("Pixel", f"{column:.3g} {TIMES} {row:.3g} mm"),
    ]
    if slices > 1:
        steps = np.diff(volume.positions_mm)
        low, high = steps.min(), steps.max()
        even = high - low < 0.01 * high
        text = f"{np.median(steps):.3g} mm" if even else f"uneven, {low:.3g} to {high:.3g} mm"
        told.append(("Interval", text))
    if source.slice_thickness_mm:
        told.append(("Slice thickness", f"{source.slice_thickness_mm:.3g} mm"))
    if source.kernel:
        told.append(("Kernel", source.kernel))
    if identify:
        told.append(("Read from", str(source.path)))
        told.append(("Series", f"{source.number or ''} {source.description}".strip()))
        told.append(("Series UID", source.series_uid or ""))
    for note in source.notes:
        told.append(("Note", note if identify else source.without_paths(note)))
    return [(name, value) for name, value in told if value]


def _algorithm(algorithm: Algorithm, identify: bool) -> list[tuple[str, str]]:
    told = [
        ("Algorithm", algorithm.name),
        ("Version", algorithm.version),
        ("Weights (SHA-256)", algorithm.checkpoint_sha256),
    ]
    for name, value in algorithm.options.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if not identify:
            text = _without_folders(text)
        told.append((name.replace("_", " "), text))
    return told


def _without_folders(text: str) -> str:
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute():
            return kind(text).name
    return text


def _rounded(values: Sequence[float] | np.ndarray) -> list:
    return np.round(np.asarray(values, np.float64), 2).tolist()


def _count(lesions: int) -> str:
    return "No lesions" if not lesions else f"{lesions} lesion{'s' * (lesions > 1)}"
