"""Draws a lung with nodules and what several radiologists would make of them; lidc_phantom.py
writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ct_volumes.volume import CTVolume, Source

LENGTH_MM = 80.0  # from the first slice to the last
SPACINGS_MM, THICKNESSES_MM = (0.6, 0.7, 0.8), (1.0, 1.25, 2.0, 2.5)
BODY, LUNG = (0.48, 0.42), (0.36, 0.33)  # half axes along x and y, of the image's width
AIR, LUNG_HU, TISSUE = -1000, -860, 40
NOISE_HU = 25
CLASSES = {1: "benign", 2: "benign", 3: "undecided", 4: "malignant", 5: "malignant"}
GAP_MM = 11.0  # between nodules: readings of two never count as of one
RADII_MM = {"benign": (3.0, 6.0), "undecided": (4.0, 7.0), "malignant": (5.0, 9.0)}
SPIKES = {"benign": 0, "undecided": 4, "malignant": 12}


@dataclass(frozen=True)
class ChestPlan:
    """What is decided about a scan before anything is drawn."""

    number: int  # from 1
    size: int  # pixels a side
    seed: int

    @property
    def patient(self) -> str:
        return f"PHANTOM-{self.number:04d}"

    def rng(self, part: int) -> np.random.Generator:
        """A generator of its own for each part of the drawing, whatever the others take."""
        return np.random.default_rng((self.seed, self.number, part))

    @cached_property
    def _voxel(self) -> tuple[float, float]:
        rng = self.rng(0)
        return float(rng.choice(SPACINGS_MM)), float(rng.choice(THICKNESSES_MM))

    @property
    def spacing(self) -> float:
        return self._voxel[0]

    @property
    def thickness(self) -> float:
        return self._voxel[1]


@dataclass(frozen=True, eq=False)
class DrawnReading:
    """(S, H, W) bool and a malignancy of 1 to 5."""

    mask: np.ndarray = field(repr=False)
    malignancy: int


@dataclass(frozen=True, eq=False)
class DrawnNodule:
    """A nodule as it was drawn, and one to four readings of it."""

    malignancy: int
    radius_mm: float
    centre_mm: np.ndarray
    readings: tuple[DrawnReading, ...]


@dataclass(frozen=True, eq=False)
class Shape:
    """A ball with lobes and spikes: how far its surface is from the centre in each direction.

    Attributes:
        directions, heights, widths: (k, 3), (k,) and (k,) of the bumps: where, how high as a part
            of the radius, and how wide in radians.
        cavity: radius of the hole in its middle as a part of the radius; 0 of a solid one.
    """

    centre: np.ndarray
    radius: float
    directions: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    cavity: float

    @property
    def reach(self) -> float:
        """No reading goes farther from the centre."""
        return self.radius * 1.1 * (1 + self.heights.sum())

    def distances(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of (n, 3) points in mm: the distance to the centre, and that of the surface there."""
        away = points - self.centre
        distance = np.linalg.norm(away, axis=1)
        cosine = away @ self.directions.T / np.maximum(distance, 1e-9)[:, None]
        angle = np.arccos(np.clip(cosine, -1, 1))
        bumps = (self.heights * np.exp(-((angle / self.widths) ** 2))).sum(axis=1)
        return distance, self.radius * (1 + bumps)


def draw_chest(plan: ChestPlan, path: Path) -> tuple[CTVolume, list[DrawnNodule]]:
    """The scan and its nodules, in the order in which the database numbers them."""
    slices = round(LENGTH_MM / plan.thickness) + 1
    axis = (np.arange(plan.size) - (plan.size - 1) / 2) * plan.spacing
    origins = np.zeros((slices, 3))
    origins[:, :2] = axis[0]
    origins[:, 2] = np.round(-plan.thickness * np.arange(slices), 3)
    x, y, z = axis, axis[:, None], origins[:, 2][:, None, None]
    width = plan.size * plan.spacing

    def ellipse(axes: tuple[float, float]) -> np.ndarray:
        return (x / (axes[0] * width)) ** 2 + (y / (axes[1] * width)) ** 2 < 1

    lung = ellipse(LUNG)
    hu = np.where(ellipse(BODY), TISSUE, AIR) + lung * (LUNG_HU - TISSUE)
    hu = np.repeat(hu[None].astype(np.float32), slices, axis=0)
    rng = plan.rng(1)
    for _ in range(12):  # vessels, straight tubes
        start, slope = rng.uniform(-0.25, 0.25, 2) * width, rng.normal(0, 0.4, 2)
        radius = rng.uniform(0.8, 1.8)
        for image, at in zip(hu, origins[:, 2] + LENGTH_MM / 2):
            off = np.hypot(x - start[0] - slope[0] * at, y - start[1] - slope[1] * at)
            inside = (off < radius + 0.5) & lung
            image[inside] += np.clip(radius - off[inside] + 0.5, 0, 1) * (TISSUE - image[inside])

    nodules = []
    grid = np.broadcast_arrays(x, y, z)
    for number, (shape, malignancy) in enumerate(_shapes(plan, width)):
        rng = plan.rng(10 + number)
        near = np.stack([np.abs(g - c) <= shape.reach for g, c in zip(grid, shape.centre)]).all(0)
        distance, surface = shape.distances(np.stack([g[near] for g in grid], axis=1))
        edge = 0.7 if CLASSES[malignancy] == "benign" else 1.4
        share = np.clip((surface - distance) / edge + 0.5, 0, 1)
        inner = np.clip((shape.cavity * shape.radius - distance) / edge + 0.5, 0, 1)
        hu[near] += share * (rng.uniform(-60, 60) - hu[near])
        if shape.cavity:
            hu[near] += inner * (AIR - hu[near])
        readings = []
        for _ in range(rng.integers(1, 5)):
            mask = np.zeros(hu.shape, bool)
            cavity = shape.cavity * shape.radius * rng.uniform(0.9, 1.1)
            mask[near] = (distance < surface * rng.uniform(0.9, 1.1)) & (distance >= cavity)
            rating = malignancy + (rng.choice((-1, 1)) if rng.random() < 0.2 else 0)
            readings.append(DrawnReading(mask, int(np.clip(rating, 1, 5))))
        nodules.append(DrawnNodule(malignancy, shape.radius, shape.centre, tuple(readings)))
    hu += NOISE_HU * plan.rng(2).standard_normal(hu.shape, np.float32)
    hu = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    source = Source(path, "dicom", hu.shape, slice_thickness_mm=plan.thickness)
    spacing = (plan.spacing, plan.spacing)
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), spacing, source), nodules


def _shapes(plan: ChestPlan, width: float) -> list[tuple[Shape, int]]:
    """Up to four, each within the lung and apart from the others."""
    rng = plan.rng(3)
    shapes: list[tuple[Shape, int]] = []
    wanted = rng.integers(2, 5)
    for _ in range(200):
        malignancy = int(rng.choice((1, 2, 3, 4, 5), p=(0.2, 0.25, 0.1, 0.25, 0.2)))
        kind = CLASSES[malignancy]
        spikes = SPIKES[kind]
        directions = rng.normal(size=(spikes + 4, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        heights = np.append(rng.uniform(0, 0.06, 4), rng.uniform(0.02, 0.05, spikes))
        widths = np.append(rng.uniform(0.5, 0.9, 4), rng.uniform(0.15, 0.3, spikes))
        radius = rng.uniform(*RADII_MM[kind])
        cavity = 0.4 if radius > 6 and rng.random() < 0.4 else 0.0
        centre = rng.uniform(-0.5, 0.5, 3) * (2 * LUNG[0] * width, 2 * LUNG[1] * width, LENGTH_MM)
        centre[2] -= LENGTH_MM / 2
        shape = Shape(centre, radius, directions, heights, widths, cavity)
        lung = np.array(LUNG) * width - shape.reach - 2
        inside = (lung > 0).all() and ((centre[:2] / lung) ** 2).sum() < 1
        inside &= shape.reach + 2 < -centre[2] < LENGTH_MM - shape.reach - 2
        apart = all(
            np.linalg.norm(centre - other.centre) > shape.reach + other.reach + GAP_MM
            for other, _ in shapes
        )
        if inside and apart:
            shapes.append((shape, malignancy))
        if len(shapes) == wanted:
            break
    return shapes
