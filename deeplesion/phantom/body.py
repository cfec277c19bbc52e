"""The patient of the synthetic DeepLesion: a noiseless body in Hounsfield units at any height.

Organs are warped ellipsoids painted one over another; a tissue map says what lies where, so that
lesions get a plausible place.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

# Tissues 1 to 8 are numbered as DeepLesion's coarse lesion types. Nothing is placed in, or passes
# through, BLOCKED (air, skin, cortical bone, gas); objects pass through OTHER but start elsewhere.
BLOCKED, MARROW, ABDOMEN, MEDIASTINUM, LIVER, LUNG, KIDNEY, MUSCLE, PELVIS = range(9)
SPLEEN, SUBCUTANEOUS, OTHER = 9, 10, 11
LESION_TYPE = {SPLEEN: ABDOMEN, SUBCUTANEOUS: MUSCLE}
FAT_LIKE = (ABDOMEN, MEDIASTINUM, PELVIS, SUBCUTANEOUS)
# How often an object is looked for in a tissue that is there, after DeepLesion's types.
FREQUENCY = np.array([0, 0.4, 2.4, 1.7, 1.4, 2.4, 0.6, 0.5, 1.2, 0.4, 0.3, 0])
# Standard deviation of each tissue's smooth texture, HU.
TEXTURE = np.array([0, 25, 9, 9, 8, 30, 9, 9, 9, 8, 7, 7], np.float32)
# Small vessels: HU above the background of their brightest dots.
VESSELS = np.zeros(12, np.float32)
VESSELS[[LUNG, ABDOMEN, PELVIS]] = 350, 60, 60

BODY_LENGTH = 600.0  # mm from the top of the chest (z = 0) to the pelvic floor


class Organ(NamedTuple):
    """An ellipsoid: centre and radii in body units (half widths) in-plane, in mm along z."""

    tissue: int
    hu: float
    x: float
    y: float
    z: float
    rx: float
    ry: float
    rz: float
    clipped: bool = True  # to the cavity inside ribs and abdominal wall


class Body:
    """One patient on a square image of `size` pixels, `spacing` mm each, filling most of it."""

    def __init__(self, rng: np.random.Generator, size: int, spacing: float):
        self.size, self.spacing = size, spacing
        self.half_width = 0.5 * size * rng.uniform(0.88, 0.92)  # px
        self.half_height = self.half_width * rng.uniform(0.66, 0.76)
        self.centre = np.array([size / 2 + rng.uniform(-2, 2), size * 0.47 + rng.uniform(-2, 2)])
        self._lay_out_grid(rng)
        self._build_walls(rng)
        self.organs = self._draw_organs(rng)
        field = size * spacing
        self.coarse = _noise(rng, int(BODY_LENGTH // 9) + 2, *[int(field // 7) + 4] * 2)
        self.fine = _noise(rng, int(BODY_LENGTH // 5) + 2, *[int(field // 3.5) + 4] * 2)

    def _lay_out_grid(self, rng: np.random.Generator) -> None:
        """Body coordinates of each pixel, gently warped so that no outline is an exact ellipse."""
        y, x = np.mgrid[: self.size, : self.size].astype(np.float32)
        warp_x, warp_y = (_resize(0.022 * _noise(rng, 7, 7), self.size) for _ in "xy")
        self.x = (x - self.centre[0]) / self.half_width + warp_x
        self.y = (y - self.centre[1]) / self.half_height + warp_y

    def _build_walls(self, rng: np.random.Generator) -> None:
        """What is the same at every height: skin, fat, muscle wall, and the table below."""
        depth = (np.abs(self.x) ** 2.3 + np.abs(self.y) ** 2.3) ** (1 / 2.3)  # 1 on the skin
        fat = rng.uniform(0.1, 0.2) * (1 + 0.25 * np.cos(2 * np.arctan2(self.y, self.x)))
        wall = rng.uniform(0.09, 0.12)
        skin = 2.5 / self.spacing / self.half_height
        layer_hu = (20, rng.uniform(-115, -95), rng.uniform(50, 65))
        fat_hu, self.muscle_hu = layer_hu[1:]
        table = _clip01((0.03 - np.abs(self.y - 1.2 + 0.25 * self.x**2)) * self.half_height)
        hu = -1000 + table * (np.abs(self.x) < 0.75) * rng.uniform(300, 600)
        for rim, layer in zip((1, 1 - skin, 1 - fat), layer_hu, strict=True):
            hu += _clip01((rim - depth) * self.half_height + 0.5) * (layer - hu)
        inner = 1 - fat - wall
        self.cavity = _clip01((inner - depth) * self.half_height + 0.5)
        hu += self.cavity * (fat_hu - hu)
        self.wall_hu = hu
        self.wall_tissue = np.where(depth < 1 - fat, MUSCLE, SUBCUTANEOUS).astype(np.uint8)
        self.wall_tissue[depth > 1 - skin] = BLOCKED
        # Ribs run in the inner half of the wall and leave room for sternum and spine.
        self.ribs = _clip01((0.03 - np.abs(depth - inner - 0.045)) * self.half_height + 0.5)
        self.ribs[np.abs(self.x) < 0.16] = 0

    def _draw_organs(self, rng: np.random.Generator) -> list[Organ]:
        """Organs in the order they are painted; every patient's differ a little."""
        blood, bone, muscle = rng.uniform(110, 190), rng.uniform(450, 900), self.muscle_hu
        liver, spleen = rng.uniform(85, 120), rng.uniform(100, 135)
        kidney, lung = rng.uniform(130, 185), rng.uniform(-850, -760)
        inf = math.inf
        organs = [
            Organ(LUNG, lung, -0.42, 0.02, 150, 0.36, 0.74, 160),
            Organ(LUNG, lung, 0.42, 0.02, 150, 0.34, 0.74, 160),
            Organ(OTHER, 0.9 * blood, 0.12, -0.22, 225, 0.33, 0.4, 70),  # heart
            Organ(OTHER, blood, -0.06, -0.2, 110, 0.085, 0.12, 75),  # ascending aorta
            Organ(BLOCKED, -990, 0.0, 0.08, 20, 0.05, 0.07, 120),  # trachea
            Organ(OTHER, 40, 0.03, 0.2, 100, 0.035, 0.04, 190),  # oesophagus
            Organ(LIVER, liver, -0.36, -0.08, 320, 0.47, 0.6, 85),
            Organ(OTHER, 35, 0.36, -0.3, 315, 0.24, 0.24, 50),  # stomach
            Organ(BLOCKED, -950, 0.36, -0.46, 315, 0.13, 0.07, 35),  # gas in it
            Organ(SPLEEN, spleen, 0.6, 0.2, 320, 0.17, 0.34, 55),
            Organ(OTHER, 90, 0.05, -0.05, 365, 0.28, 0.08, 22),  # pancreas
        ]
        for side in (-1, 1):
            organs += [
                Organ(KIDNEY, kidney, 0.42 * side, 0.4, 385, 0.16, 0.24, 55),
                Organ(OTHER, -60, 0.36 * side, 0.36, 385, 0.055, 0.08, 28),  # renal sinus
                Organ(MUSCLE, muscle, 0.2 * side, 0.42, 490, 0.1, 0.15, 120),  # psoas
            ]
        for _ in range(14):  # loops of bowel: wall, contents, gas on top of some
            x, y, z = rng.uniform(-0.55, 0.55), rng.uniform(-0.6, 0.1), rng.uniform(395, 590)
            rx, ry, rz = rng.uniform(0.1, 0.2), rng.uniform(0.12, 0.2), rng.uniform(25, 50)
            organs += [
                Organ(OTHER, rng.uniform(55, 90), x, y, z, rx, ry, rz),
                Organ(OTHER, rng.uniform(5, 40), x, y, z, 0.78 * rx, 0.78 * ry, 0.9 * rz),
            ]
            if rng.random() < 0.4:
                organs += [Organ(BLOCKED, -900, x, y - 0.4 * ry, z, rx / 2, ry / 3, rz / 2)]
        organs += [
            Organ(OTHER, 8, 0, -0.2, 575, 0.26, 0.26, 40),  # bladder
            Organ(OTHER, blood, 0.13, 0.2, 250, 0.07, 0.095, 190),  # descending aorta
            Organ(OTHER, 0.9 * blood, -0.12, 0.2, 400, 0.065, 0.08, 150),  # vena cava
        ]
        for side in (-1, 1):
            organs += [
                Organ(
                    MUSCLE, muscle, 0.24 * side, 0.66, 300, 0.24, 0.17, inf, False
                ),  # of the back
                Organ(BLOCKED, bone, 0.56 * side, 0.32, 545, 0.13, 0.34, 60),  # pelvic bone
                Organ(MARROW, 190, 0.56 * side, 0.32, 545, 0.085, 0.27, 55),
                Organ(BLOCKED, 0.8 * bone, 0.16 * side, 0.68, 300, 0.1, 0.035, inf, False),
            ]
        organs += [
            Organ(BLOCKED, bone, 0, -0.76, 120, 0.12, 0.06, 110, False),  # sternum
            Organ(BLOCKED, bone, 0, 0.44, 300, 0.16, 0.19, inf, False),  # vertebra
            Organ(MARROW, 190, 0, 0.44, 300, 0.13, 0.155, inf, False),
            Organ(BLOCKED, 0.9 * bone, 0, 0.72, 300, 0.03, 0.15, inf, False),
            Organ(BLOCKED, bone, 0, 0.655, 300, 0.1, 0.1, inf, False),
            Organ(OTHER, 25, 0, 0.645, 300, 0.065, 0.07, inf, False),  # spinal canal
        ]
        return [
            organ._replace(hu=organ.hu * rng.uniform(0.97, 1.03), z=organ.z + rng.uniform(-10, 10))
            for organ in organs
        ]

    def plane(self, z: float) -> tuple[np.ndarray, np.ndarray]:
        """The body at height z (mm) -> HU (size, size) float32 and tissue (size, size) uint8."""
        hu, tissue = self.wall_hu.copy(), self.wall_tissue.copy()
        tissue[self.cavity > 0.5] = MEDIASTINUM if z < 275 else ABDOMEN if z < 470 else PELVIS
        for organ in self.organs:
            self._paint(organ, z, hu, tissue)
        if z < 340:  # each rib slopes down towards the front
            phase = (z + 45 * self.y) / 27 % 1
            rib = self.ribs * np.clip((0.21 - np.abs(phase - 0.5)) * 12, 0, 1)
            hu += rib * (420 - hu)
            tissue[rib > 0.5] = BLOCKED
        hu += TEXTURE[tissue] * self._texture(self.coarse, z)
        hu += VESSELS[tissue] * np.maximum(self._texture(self.fine, z) - 1, 0)
        return hu, tissue

    def slab(self, z: float, thickness: float) -> tuple[np.ndarray, np.ndarray]:
        """A slice of that thickness (mm) around z -> mean HU, and the share not BLOCKED in 0..1."""
        planes = [self.plane(z + dz) for dz in sub_heights(thickness)]
        hu = np.mean([hu for hu, _ in planes], axis=0)
        return hu, np.mean([tissue != BLOCKED for _, tissue in planes], axis=0)

    def _paint(self, organ: Organ, z: float, hu: np.ndarray, tissue: np.ndarray) -> None:
        rest = 1 - ((z - organ.z) / organ.rz) ** 2
        if rest <= 0:
            return
        scale = math.sqrt(rest)
        # The warp moves an outline by less than 0.1 body units: look no farther than that.
        middle = self.centre + (organ.x * self.half_width, organ.y * self.half_height)
        reach = (np.array([organ.rx, organ.ry]) * scale + 0.1) * (self.half_width, self.half_height)
        x0, y0 = np.maximum(middle - reach, 0).astype(int)
        x1, y1 = np.maximum(middle + reach + 2, 0).astype(int)
        box = np.s_[y0:y1, x0:x1]
        q = np.hypot((self.x[box] - organ.x) / organ.rx, (self.y[box] - organ.y) / organ.ry)
        radius = min(organ.rx * self.half_width, organ.ry * self.half_height)
        inside = _clip01((scale - q) * radius + 0.5)
        if organ.clipped:
            inside *= self.cavity[box]
        hu[box] += inside * (organ.hu - hu[box])
        tissue[box][inside > 0.5] = organ.tissue

    def _texture(self, volume: np.ndarray, z: float) -> np.ndarray:
        at = np.clip(z / BODY_LENGTH, 0, 1) * (len(volume) - 1.001)
        low, part = int(at), at - int(at)
        # Divided by the root of the squares, a blend of two layers varies as much as one layer.
        mix = ((1 - part) * volume[low] + part * volume[low + 1]) / math.hypot(part, 1 - part)
        return _resize(mix, self.size)


def sub_heights(thickness: float) -> np.ndarray:
    """Heights (mm) about 1 mm apart, whose planes averaged make a slice of that thickness (mm)."""
    n = max(round(thickness), 1)
    return (np.arange(n) - (n - 1) / 2) * thickness / n


def _noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def _clip01(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 1, out=x)
