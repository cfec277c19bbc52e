"""Lesions and distractors of the phantom: outline, section in any slice, mask and RECIST."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
from skimage.measure import find_contours

from deeplesion.data.recist import recist_from_contour
from deeplesion.phantom.body import FAT_LIKE, FREQUENCY, LUNG, sub_heights
from deeplesion.phantom.courses import FADE, PERSIST, Course, draw_course

ANGLES = np.linspace(0, 2 * np.pi, 256, endpoint=False)
ANGLES_AROUND = np.concatenate([[ANGLES[-1] - 2 * np.pi], ANGLES, [2 * np.pi]])


class Scan(NamedTuple):
    """Geometry of a series: pixels a side, mm a pixel, mm a slice. Slice k is at k * thickness."""

    size: int
    spacing: float
    thickness: float


@dataclass(frozen=True)
class Outline:
    """Star-shaped: `radius` in mm at each of the ANGLES, `diameter` the longest one in mm."""

    shape: str
    radius: np.ndarray
    diameter: float
    irregularity: float  # standard deviation of radius / radius of the underlying ellipse


def draw_outline(rng: np.random.Generator, min_mm: float, max_mm: float, in_lung: bool) -> Outline:
    """Draw an outline, `min_mm` to `max_mm` long: mostly lobulated or irregular, some smooth."""
    diameter = 0.0
    while not min_mm <= diameter <= max_mm:
        diameter = math.exp(rng.normal(math.log(12.0), 0.45))
    shapes = ("round", "elliptic", "lobulated", "irregular", "spiculated")
    odds = (0.15, 0.1, 0.25, 0.2, 0.3) if in_lung else (0.1, 0.15, 0.4, 0.35, 0)
    shape = str(rng.choice(shapes, p=odds))
    aspect = rng.uniform(0.92, 1.0) if shape == "round" else rng.uniform(0.55, 0.95)
    waves, strength = {
        "lobulated": ((3, 4, 5), 0.6),
        "irregular": ((2, 3, 4, 5, 6, 7), 0.6),
        "spiculated": ((2, 3, 4, 5), 0.2),
    }.get(shape, ((), 0))
    deviation = np.zeros_like(ANGLES)
    for n in waves:
        amplitude, phase = strength / n * rng.uniform(0.3, 1), rng.uniform(0, 2 * np.pi)
        deviation += amplitude * np.cos(n * ANGLES + phase)
    if shape == "spiculated":
        for direction in rng.uniform(0, 2 * np.pi, rng.integers(5, 10)):
            away = np.angle(np.exp(1j * (ANGLES - direction)))
            deviation += rng.uniform(0.2, 0.45) * np.exp(-0.5 * (away / 0.14) ** 2)
    deviation = np.maximum(deviation, -0.6)
    radius = (1 + deviation) / np.hypot(np.cos(ANGLES), np.sin(ANGLES) / aspect)
    radius = np.roll(radius, rng.integers(ANGLES.size))
    points = radius * np.exp(1j * ANGLES)
    radius *= diameter / np.abs(points[:, None] - points).max()
    return Outline(shape, radius, diameter, float(deviation.std()))


@dataclass
class Finding:
    """One object of a key slice. All but `is_lesion` is drawn before it is decided what it is."""

    scan: Scan
    outline: Outline
    tissue: int
    centre: np.ndarray  # (x, y), px
    z: float  # of the key slice, mm
    half_depth: float  # of the lesion it may become, mm
    offset: float  # of the key slice from the lesion's widest section, mm
    course: Course  # of the distractor it may become
    hu: float
    core: float  # HU added towards the middle: necrotic or denser
    waves: np.ndarray  # (k, 4) texture: frequency x, y (1/mm), phase, amplitude (HU)
    edge: float  # width of the rim, px
    is_lesion: bool = False

    @property
    def reach(self) -> float:
        """Radius in px of the circle that holds the object's section."""
        return float(self.outline.radius.max()) / self.scan.spacing

    @cached_property
    def radius_around(self) -> np.ndarray:
        """The outline's radius at each of the ANGLES_AROUND, mm."""
        radius = self.outline.radius
        return np.concatenate([radius[-1:], radius, radius[:1]])

    @property
    def velocity(self) -> np.ndarray:
        """(x, y) px/mm of the distractor it may become."""
        return self.course.velocity

    def section(
        self, z: float, as_lesion: bool
    ) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray] | None:
        """What it fills of each pixel of the slice at z: (box, opacity (h, w), HU (h, w)) or None.

        A lesion is averaged over the slice thickness. A distractor carries along the average that
        the lesion would have in the key slice, instead of smearing its own motion: so thick key
        slices are the same for both too.
        """
        size, spacing, thickness = self.scan
        away, centre, fade, size_there = z - self.z, self.centre, 1.0, 1.0
        if not as_lesion:
            centre = centre + self.velocity * away
            fade, size_there = self.course.at(away)
            away = 0.0
        heights = away + self.offset + sub_heights(thickness)
        if fade <= 0 or np.abs(heights).min() >= self.half_depth:
            return None
        margin = self.reach + self.edge + 1
        x0, y0 = np.maximum(np.floor(centre - margin), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(centre + margin) + 1, size).astype(int)
        if x1 <= x0 or y1 <= y0:
            return None
        dx = (np.arange(x0, x1) - centre[0]) * spacing  # mm
        dy = (np.arange(y0, y1)[:, None] - centre[1]) * spacing
        distance = np.hypot(dx, dy)
        radius = np.interp(np.arctan2(dy, dx) % (2 * np.pi), ANGLES_AROUND, self.radius_around)
        scales = np.sqrt(np.maximum(1 - (heights / self.half_depth) ** 2, 0))
        rim = self.edge * spacing
        fills = [
            np.clip((scale * size_there * radius - distance) / rim + 0.5, 0, 1)
            for scale in scales[scales > 0]
        ]
        opacity = fade * np.sum(fills, axis=0) / heights.size
        hu = self.hu + self.core * np.maximum(1 - distance / radius, 0)
        for fx, fy, phase, amplitude in self.waves:
            hu = hu + amplitude * np.cos(2 * np.pi * (fx * dx + fy * dy) + phase)
        return np.s_[y0:y1, x0:x1], opacity, hu

    def may_meet(self, other: Finding) -> bool:
        """Whether the two could touch in any slice, whichever of them moves."""
        far = PERSIST + FADE
        z = np.arange(max(self.z, other.z) - far, min(self.z, other.z) + far + 1)[:, None]
        mine, theirs = (
            [f.centre + moves * f.velocity * (z - f.z) for moves in (0, 1)] for f in (self, other)
        )
        gap = self.reach + other.reach + 3
        return any((np.linalg.norm(a - b, axis=1) < gap).any() for a in mine for b in theirs)


def draw_half_depth(rng: np.random.Generator, outline: Outline) -> float:
    """mm from a lesion's widest section to its end."""
    return outline.diameter * rng.uniform(0.25, 0.5)


def draw_offset(rng: np.random.Generator, half_depth: float) -> float:
    """mm from a lesion's widest section to its key slice."""
    return half_depth * rng.uniform(-0.2, 0.2)


def _draw_hu(rng: np.random.Generator, tissue: int, background: float) -> float:
    if tissue == LUNG:
        return rng.uniform(-550, -350) if rng.random() < 0.2 else rng.uniform(-40, 70)
    if tissue in FAT_LIKE:
        return rng.uniform(10, 90)
    return background + rng.uniform(40, 90) * (-1 if rng.random() < 0.75 else 1)


def stays_in_tissue(centre: np.ndarray, course: Course, tissue: np.ndarray, kind: int) -> bool:
    """Whether a distractor is in its own tissue 6 mm up and down, by the key slice's tissue map.

    One that left it at once would vanish as a lesion does.
    """
    for away in (-6, 6):
        x, y = np.rint(centre + away * course.velocity).astype(int)
        inside = 0 <= x < tissue.shape[1] and 0 <= y < tissue.shape[0]
        if not inside or tissue[y, x] != kind:
            return False
    return True


def draw_finding(
    rng: np.random.Generator,
    scan: Scan,
    hu: np.ndarray,
    tissue: np.ndarray,
    z: float,
    distractors: str = "oblique",
) -> Finding | None:
    """Draw an object and a place for it on the body plane (hu, tissue) at z; None if none fits.

    `distractors`: how those among them run that become one, see `courses`.
    """
    there = np.unique(tissue)
    kind = int(rng.choice(there, p=FREQUENCY[there] / FREQUENCY[there].sum()))
    outline = draw_outline(rng, max(5.0, 5.5 * scan.spacing), 30.0, kind == LUNG)
    room = cv2.distanceTransform((tissue == kind).astype(np.uint8), cv2.DIST_L2, 5)
    rows, columns = np.nonzero(room > 0.85 * outline.radius.max() / scan.spacing + 1)
    if rows.size == 0:
        return None
    k = rng.integers(rows.size)
    centre = np.array([columns[k], rows[k]]) + rng.uniform(-0.5, 0.5, 2)
    course = draw_course(rng, distractors, outline.diameter / scan.spacing)
    if not stays_in_tissue(centre, course, tissue, kind):
        return None
    half_depth = draw_half_depth(rng, outline)
    k = rng.integers(2, 5)
    frequency = rng.uniform(0.05, 0.2, k) * np.exp(1j * rng.uniform(0, np.pi, k))
    phase, amplitude = rng.uniform(0, 2 * np.pi, k), rng.uniform(0, 8, k)
    return Finding(
        scan,
        outline,
        kind,
        centre,
        z,
        half_depth,
        offset=draw_offset(rng, half_depth),
        course=course,
        hu=_draw_hu(rng, kind, float(np.median(hu[tissue == kind]))),
        core=rng.uniform(-25, 10),
        waves=np.stack([frequency.real, frequency.imag, phase, amplitude], axis=1),
        edge=rng.uniform(0.8, 1.8),
    )


def mask_and_recist(finding: Finding) -> tuple[np.ndarray, np.ndarray]:
    """Mask (size, size) bool and RECIST points (4, 2), 0-based px, of a finding in its key slice.

    Its edge is where it fills half as much of a pixel as in its middle: what a reader sees.
    """
    box, opacity, _ = finding.section(finding.z, as_lesion=True)
    level = 0.5 * opacity.max()
    mask = np.zeros((finding.scan.size,) * 2, bool)
    mask[box] = opacity >= level
    contour = max(find_contours(np.pad(opacity, 1), level), key=len)[:, ::-1] - 1
    return mask, recist_from_contour(contour + (box[1].start, box[0].start))
