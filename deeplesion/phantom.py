"""A synthetic DeepLesion in the official on-disk format: tests and demos run on it, no data needed.

On a key slice lesions and distractors come from one distribution, so no single slice tells them
apart. The neighbours do: a lesion stays where it is and shrinks, a distractor (an oblique vessel or
bowel loop) keeps its section and moves on.
"""

import csv
import io
import json
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

COLUMNS = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,"
    "Bounding_boxes,Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,"
    "Possibly_noisy,Slice_range,Spacing_mm_px_,Image_size,DICOM_windows,Patient_gender,"
    "Patient_age,Train_Val_Test"
).split(",")
SPLITS = ("train", "val", "test")

# Tissues 1 to 8 are numbered as DeepLesion's coarse lesion types. Nothing is placed in, or passes
# through, BLOCKED (air, skin, cortical bone, gas); objects pass through OTHER but start elsewhere.
BLOCKED, MARROW, ABDOMEN, MEDIASTINUM, LIVER, LUNG, KIDNEY, MUSCLE, PELVIS = range(9)
SPLEEN, SUBCUTANEOUS, OTHER = 9, 10, 11
LESION_TYPE = {SPLEEN: ABDOMEN, SUBCUTANEOUS: MUSCLE}
FAT_LIKE = (ABDOMEN, MEDIASTINUM, PELVIS, SUBCUTANEOUS)
# Standard deviation in HU of the smooth texture of each tissue.
TEXTURE = np.array([0, 25, 9, 9, 8, 30, 9, 9, 9, 8, 7, 7], np.float32)

BODY_LENGTH = 600.0  # mm from the top of the chest (z = 0) to the pelvic floor
PERSIST = 17.0  # mm a distractor goes on unchanged on each side of its key slice ...
FADE = 3.0  # ... before it fades out over these mm
OUTLINE_ANGLES = np.linspace(0, 2 * np.pi, 256, endpoint=False)


# --- the outline of an object, and its RECIST diameters -------------------------------------------


@dataclass(frozen=True)
class Outline:
    """Star-shaped outline: `radius` in mm at the 256 OUTLINE_ANGLES; `diameter` its longest, mm."""

    shape: str
    radius: np.ndarray
    diameter: float
    irregularity: float


def draw_outline(rng: np.random.Generator, min_mm: float, max_mm: float, in_lung: bool) -> Outline:
    """Draw an outline, `min_mm` to `max_mm` long: mostly lobulated or irregular, some smooth."""
    diameter = 0.0
    while not min_mm <= diameter <= max_mm:
        diameter = math.exp(rng.normal(math.log(12.0), 0.45))
    shapes = ("round", "elliptic", "lobulated", "irregular", "spiculated")
    shape = str(
        rng.choice(shapes, p=(0.15, 0.1, 0.25, 0.2, 0.3) if in_lung else (0.1, 0.15, 0.4, 0.35, 0))
    )
    phi = OUTLINE_ANGLES
    aspect = rng.uniform(0.92, 1.0) if shape == "round" else rng.uniform(0.55, 0.95)
    deviation = np.zeros_like(phi)
    harmonics = {"lobulated": (3, 4, 5), "irregular": (2, 3, 4, 5, 6, 7), "spiculated": (3, 5, 7)}
    strength = {"lobulated": 0.16, "irregular": 0.3, "spiculated": 0.08}
    for n in harmonics.get(shape, ()):
        amplitude = strength[shape] * rng.uniform(0.3, 1.0) * (1 if shape == "lobulated" else 2 / n)
        deviation += amplitude * np.cos(n * phi + rng.uniform(0, 2 * np.pi))
    if shape == "spiculated":
        for centre in rng.uniform(0, 2 * np.pi, rng.integers(5, 10)):
            away = np.angle(np.exp(1j * (phi - centre)))
            deviation += rng.uniform(0.2, 0.45) * np.exp(-0.5 * (away / 0.14) ** 2)
    ellipse = 1 / np.hypot(np.cos(phi), np.sin(phi) / aspect)
    radius = np.roll(ellipse * np.maximum(1 + deviation, 0.35), rng.integers(phi.size))
    points = radius * np.exp(1j * phi)
    radius *= diameter / np.abs(points[:, None] - points).max()
    return Outline(shape, radius, diameter, float(deviation.std()))


def recist_of_contour(contour: np.ndarray) -> np.ndarray:
    """Longest diameter of a closed contour and the longest perpendicular one that crosses it.

    contour: (n, 2) points (x, y) -> (4, 2): end points of the long axis, then of the short axis.
    """
    gaps = np.linalg.norm(contour[:, None] - contour, axis=2)
    i, j = np.unravel_index(gaps.argmax(), gaps.shape)
    start, length = contour[i], gaps[i, j]
    along = (contour[j] - start) / length
    across = np.array([-along[1], along[0]])
    t, n = (contour - start) @ along, (contour - start) @ across
    t_next, n_next = np.roll(t, -1), np.roll(n, -1)
    # At each position along the long axis, the outermost crossings of the contour on both sides.
    positions = np.linspace(0, length, 201)[1:-1, None]
    crosses = (t - positions) * (t_next - positions) <= 0
    step = np.where(t_next == t, 1.0, t_next - t)
    height = n + np.clip((positions - t) / step, 0, 1) * (n_next - n)
    upper = np.where(crosses, height, -np.inf).max(1)
    lower = np.where(crosses, height, np.inf).min(1)
    width = np.where((upper >= 0) & (lower <= 0), upper - lower, -np.inf)
    best = width.argmax()
    foot = start + positions[best] * along
    return np.array([start, contour[j], foot + lower[best] * across, foot + upper[best] * across])


# --- the patient ----------------------------------------------------------------------------------


class Organ(NamedTuple):
    """An ellipsoid: centre and radii in body units in-plane (half widths), in mm along z."""

    tissue: int
    hu: float
    x: float
    y: float
    z: float
    rx: float
    ry: float
    rz: float
    clipped: bool = True  # to the cavity inside ribs and abdominal wall


def _smooth_noise(rng: np.random.Generator, cells: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(cells, dtype=np.float32)


def _clip01(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 1, out=x)


class Body:
    """One patient: anatomy in Hounsfield units at any height z (mm), noiseless.

    size: pixels of the square image; spacing: mm a pixel. The body fills the field of view.
    """

    def __init__(self, rng: np.random.Generator, size: int, spacing: float):
        self.size, self.spacing = size, spacing
        self.half_width = 0.5 * size * rng.uniform(0.88, 0.92)  # px
        self.half_height = self.half_width * rng.uniform(0.66, 0.76)
        self.centre = np.array([size / 2 + rng.uniform(-2, 2), size * 0.47 + rng.uniform(-2, 2)])
        self._grid(rng)
        self._walls(rng)
        self.organs = self._anatomy(rng)
        field = size * spacing
        self.coarse = _smooth_noise(rng, (int(BODY_LENGTH // 9) + 2, *[int(field // 7) + 4] * 2))
        self.fine = _smooth_noise(rng, (int(BODY_LENGTH // 5) + 2, *[int(field // 3.5) + 4] * 2))

    def _grid(self, rng: np.random.Generator) -> None:
        """Body coordinates of each pixel, gently warped so that no outline is an exact ellipse."""
        y, x = np.mgrid[: self.size, : self.size].astype(np.float32)
        warp = [
            cv2.resize(0.022 * _smooth_noise(rng, (7, 7)), (self.size, self.size), None, 0, 0, 2)
            for _ in "xy"
        ]
        self.x = (x - self.centre[0]) / self.half_width + warp[0]
        self.y = (y - self.centre[1]) / self.half_height + warp[1]

    def _walls(self, rng: np.random.Generator) -> None:
        """What is the same at every height: skin, fat, muscle wall, and the table below."""
        depth = (np.abs(self.x) ** 2.3 + np.abs(self.y) ** 2.3) ** (1 / 2.3)
        edge = self.half_height  # px in one body unit
        fat = rng.uniform(0.1, 0.2) * (1 + 0.25 * np.cos(2 * np.arctan2(self.y, self.x)))
        wall = rng.uniform(0.09, 0.12)
        skin = _clip01((1 - depth) * edge + 0.5)
        inner = _clip01((1 - 2.5 / self.spacing / edge - depth) * edge + 0.5)
        muscle = _clip01((1 - fat - depth) * edge + 0.5)
        self.cavity = _clip01((1 - fat - wall - depth) * edge + 0.5)
        # Ribs run in the inner half of the wall.
        rim = depth - (1 - fat - wall)
        self.rib_band = _clip01((0.03 - np.abs(rim - 0.045)) * edge + 0.5)
        self.rib_band[np.abs(self.x) < 0.16] = 0
        self.fat_hu, self.muscle_hu = rng.uniform(-115, -95), rng.uniform(50, 65)
        hu = np.full_like(self.x, -1000.0)
        table = _clip01((0.03 - np.abs(self.y - 1.2 + 0.25 * self.x**2)) * edge * 1.2)
        hu += table * (np.abs(self.x) < 0.75) * rng.uniform(300, 600)
        for layer, value in ((skin, 20), (inner, self.fat_hu), (muscle, self.muscle_hu)):
            hu += layer * (value - hu)
        hu += self.cavity * (self.fat_hu - hu)
        tissue = np.where(muscle > 0.5, MUSCLE, SUBCUTANEOUS).astype(np.uint8)
        tissue[inner < 0.5] = BLOCKED
        self.wall_hu, self.wall_tissue = hu, tissue

    def _anatomy(self, rng: np.random.Generator) -> list[Organ]:
        """Organs in the order they are painted; every patient's differ a little."""
        blood, bone, muscle = rng.uniform(110, 190), rng.uniform(450, 900), self.muscle_hu
        liver, spleen = rng.uniform(85, 120), rng.uniform(100, 135)
        kidney, lung = rng.uniform(130, 185), rng.uniform(-860, -760)
        inf = math.inf
        organs = [
            Organ(LUNG, lung, -0.42, 0.02, 150, 0.36, 0.74, 160),
            Organ(LUNG, lung, 0.42, 0.02, 150, 0.34, 0.74, 160),
            Organ(OTHER, blood * 0.9, 0.12, -0.22, 225, 0.33, 0.4, 70),
            Organ(OTHER, blood, -0.06, -0.2, 110, 0.085, 0.12, 75),
            Organ(BLOCKED, -990, 0.0, 0.08, 20, 0.05, 0.07, 120),
            Organ(OTHER, 40, 0.03, 0.2, 100, 0.035, 0.04, 190),
            Organ(LIVER, liver, -0.36, -0.08, 320, 0.47, 0.6, 85),
            Organ(OTHER, 35, 0.36, -0.3, 315, 0.24, 0.24, 50),
            Organ(BLOCKED, -950, 0.36, -0.46, 315, 0.13, 0.07, 35),
            Organ(SPLEEN, spleen, 0.6, 0.2, 320, 0.17, 0.34, 55),
            Organ(OTHER, 90, 0.05, -0.05, 365, 0.28, 0.08, 22),
        ]
        for side in (-1, 1):
            organs += [
                Organ(KIDNEY, kidney, 0.42 * side, 0.4, 385, 0.16, 0.24, 55),
                Organ(OTHER, -60, 0.36 * side, 0.36, 385, 0.055, 0.08, 28),
                Organ(MUSCLE, muscle, 0.2 * side, 0.42, 490, 0.1, 0.15, 120),
            ]
        for _ in range(14):  # loops of bowel, some with gas on top
            x, y, z = rng.uniform(-0.55, 0.55), rng.uniform(-0.6, 0.1), rng.uniform(395, 590)
            rx, ry, rz = rng.uniform(0.1, 0.2), rng.uniform(0.12, 0.2), rng.uniform(25, 50)
            organs += [
                Organ(OTHER, rng.uniform(55, 90), x, y, z, rx, ry, rz),
                Organ(OTHER, rng.uniform(5, 40), x, y, z, rx * 0.78, ry * 0.78, rz * 0.9),
            ]
            if rng.random() < 0.4:
                organs.append(Organ(BLOCKED, -900, x, y - 0.4 * ry, z, rx * 0.5, ry * 0.35, rz / 2))
        organs += [
            Organ(OTHER, 8, 0, -0.2, 575, 0.26, 0.26, 40),
            Organ(OTHER, blood, 0.13, 0.2, 250, 0.07, 0.095, 190),
            Organ(OTHER, blood * 0.9, -0.12, 0.2, 400, 0.065, 0.08, 150),
        ]
        for side in (-1, 1):  # paraspinal muscles and pelvic bones
            organs += [
                Organ(MUSCLE, muscle, 0.24 * side, 0.66, 300, 0.24, 0.17, inf, False),
                Organ(BLOCKED, bone, 0.56 * side, 0.32, 545, 0.13, 0.34, 60),
                Organ(MARROW, 190, 0.56 * side, 0.32, 545, 0.085, 0.27, 55),
                Organ(BLOCKED, bone * 0.8, 0.16 * side, 0.68, 300, 0.1, 0.035, inf, False),
            ]
        organs += [
            Organ(BLOCKED, bone, 0, -0.76, 120, 0.12, 0.06, 110, False),
            Organ(BLOCKED, bone, 0, 0.44, 300, 0.16, 0.19, inf, False),
            Organ(MARROW, 190, 0, 0.44, 300, 0.13, 0.155, inf, False),
            Organ(BLOCKED, bone * 0.9, 0, 0.72, 300, 0.03, 0.15, inf, False),
            Organ(BLOCKED, bone, 0, 0.655, 300, 0.1, 0.1, inf, False),
            Organ(OTHER, 25, 0, 0.645, 300, 0.065, 0.07, inf, False),
        ]
        jitter = lambda o: o._replace(  # noqa: E731
            hu=o.hu * rng.uniform(0.97, 1.03), z=o.z + rng.uniform(-10, 10)
        )
        return [jitter(organ) for organ in organs]

    def plane(self, z: float) -> tuple[np.ndarray, np.ndarray]:
        """The body at height z (mm) -> HU (size, size) float32 and tissue (size, size) uint8."""
        hu, tissue = self.wall_hu.copy(), self.wall_tissue.copy()
        cavity = MEDIASTINUM if z < 275 else ABDOMEN if z < 470 else PELVIS
        tissue[self.cavity > 0.5] = cavity
        for organ in self.organs:
            self._paint(organ, z, hu, tissue)
        if z < 340:
            height = (z + 45 * self.y) / 27
            rib = self.rib_band * np.clip((0.21 - np.abs(height % 1 - 0.5)) * 12, 0, 1)
            hu += rib * (420 - hu)
            tissue[rib > 0.5] = BLOCKED
        self._add_texture(z, hu, tissue)
        return hu, tissue

    def _paint(self, organ: Organ, z: float, hu: np.ndarray, tissue: np.ndarray) -> None:
        scale = 1 - ((z - organ.z) / organ.rz) ** 2
        if scale <= 0:
            return
        scale = math.sqrt(scale)
        # The warp moves an outline by less than 0.1 body units: look no farther than that.
        reach_x = (organ.rx * scale + 0.1) * self.half_width
        reach_y = (organ.ry * scale + 0.1) * self.half_height
        cx = self.centre[0] + organ.x * self.half_width
        cy = self.centre[1] + organ.y * self.half_height
        box = (
            slice(max(int(cy - reach_y), 0), max(int(cy + reach_y) + 2, 0)),
            slice(max(int(cx - reach_x), 0), max(int(cx + reach_x) + 2, 0)),
        )
        q = np.hypot((self.x[box] - organ.x) / organ.rx, (self.y[box] - organ.y) / organ.ry)
        sharpness = min(organ.rx * self.half_width, organ.ry * self.half_height)
        inside = _clip01((scale - q) * sharpness + 0.5)
        if organ.clipped:
            inside *= self.cavity[box]
        hu[box] += inside * (organ.hu - hu[box])
        tissue[box][inside > 0.5] = organ.tissue

    def _add_texture(self, z: float, hu: np.ndarray, tissue: np.ndarray) -> None:
        hu += TEXTURE[tissue] * self._field(self.coarse, z)
        vessels = np.maximum(self._field(self.fine, z) - 1.0, 0)
        hu += (tissue == LUNG) * 350 * vessels

    def _field(self, volume: np.ndarray, z: float) -> np.ndarray:
        at = np.clip(z / BODY_LENGTH, 0, 1) * (len(volume) - 1.001)
        lower, part = int(at), at - int(at)
        # Divided by the root of the squares, a blend of two layers varies as much as one layer.
        mix = ((1 - part) * volume[lower] + part * volume[lower + 1]) / math.hypot(part, 1 - part)
        return cv2.resize(mix, (self.size, self.size), interpolation=cv2.INTER_CUBIC)


# --- lesions and distractors ----------------------------------------------------------------------


@dataclass
class Finding:
    """One object of a key slice. Everything is drawn before it is decided what it is.

    centre and velocity in px and px/mm (x, y); z, half_depth in mm; offset: how far the object's
    widest section is from the key slice, mm.
    """

    outline: Outline
    tissue: int
    centre: np.ndarray
    z: float
    half_depth: float
    offset: float
    velocity: np.ndarray
    hu: float
    core: float  # HU added in the middle: a necrotic or denser core
    waves: np.ndarray  # (k, 4) texture: frequency x, y (1/mm), phase, amplitude (HU)
    edge: float  # px
    is_lesion: bool = False

    def radius_px(self, spacing: float) -> float:
        return float(self.outline.radius.max()) / spacing

    def opacity(self, z: float, thickness: float, size: int, spacing: float, as_lesion: bool):
        """How much of each pixel of the slice at z the object fills, and its HU there.

        Returns (box, opacity (h, w), hu (h, w)), or None if it does not reach the slice. A lesion
        is averaged over the slice thickness; a distractor takes the average that the lesion would
        have in the key slice and carries it along, so the key slice is the same for both.
        """
        away = z - self.z
        centre, fade = self.centre, 1.0
        if not as_lesion:
            centre = centre + self.velocity * away
            fade = min((PERSIST + FADE - abs(away)) / FADE, 1.0)
            away = 0.0
        if fade <= 0 or abs(away + self.offset) - thickness / 2 > self.half_depth:
            return None
        reach = self.radius_px(spacing) + self.edge + 1
        low = np.maximum(np.floor(centre - reach).astype(int), 0)
        high = np.minimum(np.ceil(centre + reach).astype(int) + 1, size)
        if (high <= low).any():
            return None
        box = (slice(low[1], high[1]), slice(low[0], high[0]))
        y, x = np.mgrid[box]
        dx, dy = (x - centre[0]) * spacing, (y - centre[1]) * spacing  # mm
        distance = np.hypot(dx, dy)
        radius = np.interp(
            np.arctan2(dy, dx), OUTLINE_ANGLES, self.outline.radius, period=2 * np.pi
        )
        depths = away + self.offset + _sub_heights(thickness)
        scales = np.sqrt(np.maximum(1 - (depths / self.half_depth) ** 2, 0))
        width = self.edge * spacing
        fills = [np.clip((radius * s - distance) / width + 0.5, 0, 1) * (s > 0) for s in scales]
        hu = self.hu + self.core * np.maximum(1 - distance / radius, 0)
        for fx, fy, phase, amplitude in self.waves:
            hu = hu + amplitude * np.cos(2 * np.pi * (fx * dx + fy * dy) + phase)
        return box, fade * np.mean(fills, axis=0), hu

    def collides(self, other: "Finding", spacing: float) -> bool:
        """Whether the two could touch in any slice, whichever of them moves."""
        reach = PERSIST + FADE
        z = np.arange(max(self.z, other.z) - reach, min(self.z, other.z) + reach + 1)[:, None]
        gap = self.radius_px(spacing) + other.radius_px(spacing) + 3
        mine = [self.centre + self.velocity * (z - self.z) * moves for moves in (0, 1)]
        theirs = [other.centre + other.velocity * (z - other.z) * moves for moves in (0, 1)]
        return any((np.linalg.norm(a - b, axis=1) < gap).any() for a in mine for b in theirs)


def _sub_heights(thickness: float) -> np.ndarray:
    """Heights about 1 mm apart whose mean stands for a slice of that thickness (mm)."""
    n = max(round(thickness), 1)
    return (np.arange(n) - (n - 1) / 2) * thickness / n


def _object_hu(rng: np.random.Generator, tissue: int, background: float) -> float:
    if tissue == LUNG:
        return rng.uniform(-550, -350) if rng.random() < 0.2 else rng.uniform(-40, 70)
    if tissue in FAT_LIKE:
        return rng.uniform(10, 90)
    return background + rng.uniform(35, 85) * (-1 if rng.random() < 0.75 else 1)


def draw_finding(
    rng: np.random.Generator, tissue_map: np.ndarray, hu_map: np.ndarray, z: float, spacing: float
) -> Finding | None:
    """Draw an object and a place for it in the key slice at z; None if it fits nowhere."""
    tissue = int(rng.choice(np.setdiff1d(np.unique(tissue_map), (BLOCKED, OTHER))))
    outline = draw_outline(rng, max(5.0, 5.5 * spacing), 30.0, tissue == LUNG)
    radius = outline.radius.max() / spacing
    depth = cv2.distanceTransform((tissue_map == tissue).astype(np.uint8), cv2.DIST_L2, 5)
    rows, columns = np.nonzero(depth > 0.85 * radius + 1)
    if rows.size == 0:
        return None
    k = rng.integers(rows.size)
    centre = np.array([columns[k], rows[k]]) + rng.uniform(-0.5, 0.5, 2)
    half_depth = outline.diameter * rng.uniform(0.25, 0.5)
    # Large sections must move more before a step can be seen.
    speed = max(1.0, 0.05 * outline.diameter / spacing) * rng.uniform(1.05, 1.4)  # px/mm
    angle = rng.uniform(0, 2 * np.pi)
    velocity = speed * np.array([np.cos(angle), np.sin(angle)])
    for side in (-8, 8):  # a tube must be inside the body at least so many mm farther
        x, y = np.rint(centre + side * velocity).astype(int)
        inside = 0 <= x < tissue_map.shape[1] and 0 <= y < tissue_map.shape[0]
        if not inside or tissue_map[y, x] == BLOCKED:
            return None
    background = float(np.median(hu_map[tissue_map == tissue]))
    k = rng.integers(2, 5)
    frequency = rng.uniform(0.05, 0.2, k) * np.exp(1j * rng.uniform(0, np.pi, k))
    amplitude = rng.uniform(0, 8, k)
    return Finding(
        outline,
        tissue,
        centre,
        z,
        half_depth,
        offset=half_depth * rng.uniform(-0.2, 0.2),
        velocity=velocity,
        hu=_object_hu(rng, tissue, background),
        core=rng.uniform(-25, 10),
        waves=np.stack([frequency.real, frequency.imag, rng.uniform(0, 6.28, k), amplitude], 1),
        edge=rng.uniform(0.8, 1.8),
    )


def measure(finding: Finding, thickness: float, size: int, spacing: float):
    """The finding's mask in its key slice and RECIST points (0-based px), or None if under 5 px.

    Returns (mask (size, size) bool, recist (4, 2)). The edge is where the object fills half as
    much of a pixel as at its fullest: what a reader sees on a thick slice too.
    """
    box, opacity, _ = finding.opacity(finding.z, thickness, size, spacing, as_lesion=True)
    half = 0.5 * opacity.max()
    padded = cv2.copyMakeBorder(opacity, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    mask = np.zeros((size, size), bool)
    mask[box] = opacity >= half
    contour = _contour(padded, half) - 1 + [box[1].start, box[0].start]
    recist = recist_of_contour(contour)
    long, short = np.linalg.norm(recist[1::2] - recist[::2], axis=1)
    return (mask, recist) if long >= 5 and short >= 2.5 else None


def _contour(image: np.ndarray, level: float) -> np.ndarray:
    """The longest level line of an image, to a fraction of a pixel: (n, 2) points (x, y)."""
    from skimage.measure import find_contours

    return max(find_contours(image, level), key=len)[:, ::-1]


# --- a series -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """What is decided about a series before anything is drawn."""

    patient: int
    study: int
    split: int  # 1 train, 2 val, 3 test
    thickness: float  # mm
    size: int
    seed: int
    gender: str
    age: str

    @property
    def name(self) -> str:
        return f"{self.patient:06d}_{self.study:02d}_01"


def plan_series(patients: int, size: int, seed: int) -> list[Series]:
    """The series of all patients: splits by patient, thin and thick alternating within a split."""
    rng = np.random.default_rng([seed, 0])
    held_out = max(1, round(0.15 * patients))
    split_of = np.repeat([1, 2, 3], [patients - 2 * held_out, held_out, held_out])
    lone = np.bincount(split_of)[split_of] == 1
    rng.shuffle(split_of)
    lone = np.bincount(split_of)[split_of] == 1
    series = []
    is_thick = rng.random(4) < 0.5
    for patient in range(1, patients + 1):
        split = int(split_of[patient - 1])
        gender = str(rng.choice(["M", "F"]))
        age = "NaN" if rng.random() < 0.03 else str(rng.integers(18, 88))
        # A split of one patient gets two series, so that it too has thin and thick slices.
        for study in range(1, 2 + bool(lone[patient - 1] or rng.random() < 0.2)):
            thin = 2.0 if rng.random() < 0.15 else 1.0
            thickness = 5.0 if is_thick[split] else thin
            is_thick[split] = not is_thick[split]
            series.append(Series(patient, study, split, thickness, size, seed, gender, age))
    return series


@dataclass
class KeySlice:
    """A key slice: slice index, its findings with mask and RECIST, and the slices around it."""

    index: int
    findings: list[tuple[Finding, np.ndarray, np.ndarray]]
    first: int = 0
    last: int = 0


def _draw_key_slices(rng: np.random.Generator, body: Body, thickness: float) -> list[KeySlice]:
    """One to three key slices, far enough apart that no object of one reaches another."""
    size, spacing = body.size, body.spacing
    margin = 5 * PERSIST
    z, wanted = rng.uniform(40, BODY_LENGTH - margin), int(rng.choice([1, 2, 3], p=(0.6, 0.3, 0.1)))
    keys: list[KeySlice] = []
    for _ in range(100):
        index = max(round(z / thickness), 1)
        placed = [finding for key in keys for finding, _, _ in key.findings]
        findings = _draw_findings(rng, body, index * thickness, thickness, placed)
        if findings:
            keys.append(KeySlice(index, findings))
            z += rng.uniform(28, 40) if rng.random() < 0.6 else rng.uniform(75, 110)
        else:
            z += rng.uniform(3, 10)
        if z > BODY_LENGTH - 30:
            if keys:
                break
            z = rng.uniform(40, BODY_LENGTH - margin)
        if len(keys) == wanted:
            break
    if not keys:
        raise RuntimeError(f"no place for any lesion found; body of {size} px, {spacing} mm")
    reach = math.ceil((30 if size >= 384 else 15) / thickness)
    for key in keys:
        short = [reach, reach]
        if rng.random() < 0.12:  # the scan ends near the key slice
            short[rng.integers(2)] = int(rng.integers(0, 3))
        key.first, key.last = max(key.index - short[0], 1), key.index + short[1]
    # As in DeepLesion, neighbouring ranges are one; and a scan's end hides no key slice.
    for before, after in zip(keys, keys[1:]):
        if after.first <= before.last + 1:
            first, last = min(before.first, after.first), max(before.last, after.last)
            for key in keys:
                if key is after or (key.first, key.last) == (before.first, before.last):
                    key.first, key.last = first, last
    return keys


def _draw_findings(rng, body: Body, z: float, thickness: float, placed: list[Finding]):
    """Two, four or six findings, half of them lesions, as many as fit; empty if none do."""
    hu, tissue = body.plane(z)
    wanted = 2 * int(rng.choice([1, 2, 3], p=(0.65, 0.25, 0.1)))
    found = []
    for _ in range(12 * wanted):
        finding = draw_finding(rng, tissue, hu, z, body.spacing)
        others = placed + [other for other, _, _ in found]
        if finding is None or any(finding.collides(other, body.spacing) for other in others):
            continue
        measured = measure(finding, thickness, body.size, body.spacing)
        if measured is not None:
            found.append((finding, *measured))
        if len(found) == wanted:
            break
    found = found[: len(found) // 2 * 2]
    # Only now is it decided which are lesions: nothing drawn so far can depend on it.
    kinds = rng.permutation(np.arange(len(found)) % 2 == 0)
    for (finding, _, _), kind in zip(found, kinds, strict=True):
        finding.is_lesion = bool(kind)
    return found


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """CT noise: neighbouring pixels correlate by about 0.55; standard deviation 1."""
    white = rng.standard_normal((size + 8, size + 8), dtype=np.float32)
    kernel = cv2.getGaussianKernel(7, 0.65, cv2.CV_32F)
    smooth = cv2.sepFilter2D(white, -1, kernel, kernel)[4:-4, 4:-4]
    return smooth / float((kernel**2).sum())


def render_slice(
    body: Body, z: float, thickness: float, findings: list[Finding], noise: np.ndarray
) -> np.ndarray:
    """One slice -> (size, size) int16 HU: the body averaged over the thickness (mm), objects, noise.

    noise: (size, size) HU of the image noise to add.
    """
    planes = [body.plane(z + dz) for dz in _sub_heights(thickness)]
    hu = np.mean([plane for plane, _ in planes], axis=0)
    passable = np.mean([tissue != BLOCKED for _, tissue in planes], axis=0)
    for finding in findings:
        drawn = finding.opacity(z, thickness, body.size, body.spacing, finding.is_lesion)
        if drawn is not None:
            box, opacity, value = drawn
            hu[box] += opacity * passable[box] * (value - hu[box])
    hu = cv2.GaussianBlur(hu.astype(np.float32), (0, 0), 0.6) + noise
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)


def make_series(root: Path, series: Series) -> dict:
    """Write the slices and truth masks of a series; return its CSV rows and truth.

    A finished series leaves a record by which a later call knows that there is nothing to do.
    """
    record_file = root / "phantom_truth" / "series" / f"{series.name}.json"
    if record_file.exists():
        return json.loads(record_file.read_text())
    rng = np.random.default_rng([series.seed, series.patient, series.study])
    # Patients keep their anatomy; each scan has its own spacing only in as far as the body has.
    body_rng = np.random.default_rng([series.seed, series.patient, 0])
    spacing = round(body_rng.uniform(0.6, 0.9) * math.sqrt(512 / series.size), 6)
    body = Body(body_rng, series.size, spacing)
    keys = _draw_key_slices(rng, body, series.thickness)
    findings = [finding for key in keys for finding, _, _ in key.findings]
    sigma = rng.uniform(20, 28) / math.sqrt(series.thickness)
    # More photons are lost on the way through the middle of the body than near its skin.
    sigma_map = sigma * (0.75 + 0.35 * np.exp(-(body.x**2 + body.y**2)))
    for index in sorted({i for key in keys for i in range(key.first, key.last + 1)}):
        z = index * series.thickness
        noise = sigma_map * _noise(rng, series.size)
        hu = render_slice(body, z, series.thickness, findings, noise)
        pixels = (hu.astype(np.int32) + 32768).astype(np.uint16)
        _write_png(root / "Images_png" / series.name / f"{index:03d}.png", pixels)
    record = {"rows": [], "truth": {}}
    for key in keys:
        rows, truth, labels = _describe(rng, series, body, key)
        _write_png(root / "phantom_truth" / "masks" / f"{series.name}_{key.index:03d}.png", labels)
        record["rows"] += rows
        record["truth"][f"{series.name}/{key.index:03d}.png"] = truth
    _write(record_file, json.dumps(record).encode())
    return record


def _numbers(values) -> str:
    return ", ".join(f"{value:.6g}" for value in np.ravel(values))


def _describe(rng, series: Series, body: Body, key: KeySlice):
    """CSV rows of a key slice's lesions, its truth, and the label image of all its findings."""
    rows, truth = [], {"lesions": [], "distractors": []}
    labels = np.zeros((series.size, series.size), np.uint8)
    lung = any(f.tissue == LUNG and f.is_lesion for f, _, _ in key.findings)
    for finding, mask, recist in key.findings:
        kind = "lesions" if finding.is_lesion else "distractors"
        labels[mask] = len(truth[kind]) + (1 if finding.is_lesion else 101)
        length = np.linalg.norm(recist[1::2] - recist[::2], axis=1)
        truth[kind].append(
            {
                "shape": finding.outline.shape,
                "irregularity": finding.outline.irregularity,
                "diameters_mm": (length * body.spacing).tolist(),
                "bbox": [*(recist.min(0) - 5), *(recist.max(0) + 5)],
                "speed_px_per_mm": float(np.hypot(*finding.velocity)),
            }
        )
        if not finding.is_lesion:
            continue
        noisy = rng.random() < 0.01
        angle = rng.uniform(0, 2 * np.pi, 4)
        reader = rng.uniform(0, 8 if noisy else 0.7, 4)  # px the reader's click is off
        points = recist + reader[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        if not noisy and not _axes_cross(points):
            points = recist
        points = np.clip(points, 0, series.size - 1) + 1  # 1-based, as in DL_info.csv
        place = ((finding.centre - body.centre) / (body.half_width, body.half_height) + 1) / 2
        lesion_type = LESION_TYPE.get(finding.tissue, finding.tissue)
        values = (
            f"{series.name}_{key.index:03d}.png",
            series.patient,
            series.study,
            1,
            key.index,
            _numbers(points),
            _numbers([points.min(0) - 5, points.max(0) + 5]),
            _numbers(np.linalg.norm(points[1::2] - points[::2], axis=1)),
            _numbers([*place, finding.z / BODY_LENGTH]),
            -1 if series.split == 1 else lesion_type,
            int(noisy),
            f"{key.first}, {key.last}",
            _numbers([body.spacing, body.spacing, series.thickness]),
            f"{series.size}, {series.size}",
            "-1500, 500" if lung else "-175, 275",
            series.gender,
            series.age,
            series.split,
        )
        rows.append(list(values))
    return rows, truth, labels


def _axes_cross(points: np.ndarray) -> bool:
    """Whether the segments points[0]-points[1] and points[2]-points[3] cross."""

    def side(a, b, p):
        return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])

    a, b, c, d = points
    return side(a, b, c) * side(a, b, d) <= 0 and side(c, d, a) * side(c, d, b) <= 0


# --- the whole --------------------------------------------------------------------------------------


def _write(path: Path, data: bytes) -> None:
    """Write to a temporary name, then rename: what has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    done, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 2])
    if not done:
        raise RuntimeError(f"{path}: OpenCV could not encode a {pixels.dtype} {pixels.shape} image")
    _write(path, data.tobytes())


def _claim(root: Path, arguments: dict) -> None:
    """Make `root` this phantom's folder; refuse one that holds anything else."""
    note = root / "phantom_truth" / "arguments.json"
    if note.exists():
        there = json.loads(note.read_text())
        if there != arguments:
            raise FileExistsError(
                f"{root} holds a phantom made with {there}, not {arguments}: "
                "give the same arguments to continue it, or another folder"
            )
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} is not an empty folder and holds no phantom: give another")
    else:
        _write(note, json.dumps(arguments).encode())


def make_phantom(
    root: str | Path,
    patients: int,
    size: int = 512,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write a synthetic DeepLesion of `patients` patients and `size` px square slices to `root`.

    Writes DL_info.csv (last, so its presence means all is there), Images_png/ and, kept aside,
    phantom_truth/ with masks and shapes of lesions and distractors. The same patients, size and
    seed give the same bytes, whatever the number of workers. Interrupted, it is continued by the
    same call. Returns the path of DL_info.csv.

    Raises ValueError for options out of range, FileExistsError if `root` holds anything else.
    """
    for option, value, low, high in (
        ("patients", patients, 3, 999_999),
        ("size", size, 128, 1024),
        ("seed", seed, 0, 2**32 - 1),
        ("workers", workers, 1, 1024),
    ):
        if not low <= value <= high:
            raise ValueError(f"{option} is {value}: expected a whole number from {low} to {high}")
    root = Path(root)
    arguments = {"phantom": 1, "patients": patients, "size": size, "seed": seed}
    _claim(root, arguments)
    table = root / "DL_info.csv"
    if not table.exists():
        series = plan_series(patients, size, seed)
        bar = {"total": len(series), "desc": "series", "disable": not progress}
        make = partial(make_series, root)
        if workers == 1:
            records = list(tqdm(map(make, series), **bar))
        else:
            with ProcessPoolExecutor(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
                records = list(tqdm(pool.map(make, series), **bar))
        truth = {name: entry for record in records for name, entry in record["truth"].items()}
        _write(root / "phantom_truth" / "truth.json", json.dumps(truth, indent=1).encode())
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row for record in records for row in record["rows"])
        _write(table, text.getvalue().encode())
    shutil.rmtree(root / "phantom_truth" / "series", ignore_errors=True)
    return table
