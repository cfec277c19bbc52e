"""LIDC-IDRI's nodules: groups the readings of one nodule as pylidc does, rates it, and splits the
nodules into training and test."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from ct_volumes.lidc import Reading, Scan

READERS = 4  # who read each scan: of one nodule there are at most as many readings
SHRINK, LEAST_TOLERANCE = 0.9, 0.1  # pylidc's cluster_annotations
UNDECIDED = 3  # malignancy of 1 to 5
TEST_PART = 5  # one in five: 4:1


@dataclass(frozen=True, eq=False)
class Nodule:
    """The readings that mean one nodule, in order of their ids."""

    scan: Scan = field(repr=False)
    readings: tuple[Reading, ...]

    @property
    def name(self) -> str:
        """The patient and the id of the first reading; no other nodule has it."""
        return f"{self.scan.patient}_{self.readings[0].id:05d}"

    @cached_property
    def malignancy(self) -> int:
        """The rating that most readings give; of several the smallest."""
        counts = Counter(reading.malignancy for reading in self.readings)
        return min(counts, key=lambda rating: (-counts[rating], rating))

    @property
    def is_one(self) -> bool:
        """Whether there are at most four readings; of more, several nodules are taken together."""
        return len(self.readings) <= READERS

    @property
    def is_rated(self) -> bool:
        """Whether it can be classified: one nodule, rated benign (1, 2) or malignant (4, 5)."""
        return self.is_one and self.malignancy != UNDECIDED


@dataclass(frozen=True)
class Split:
    """Names of nodules.

    Attributes:
        leaking_patients: those with nodules on both sides; none of a split by patient.
    """

    training: tuple[str, ...] = field(repr=False)
    test: tuple[str, ...] = field(repr=False)
    leaking_patients: tuple[str, ...] = ()


def find_nodules(scans: tuple[Scan, ...]) -> tuple[Nodule, ...]:
    """The readings of all scans, grouped; by scan, then by first reading.

    Two readings are of one nodule if the smallest distance between points of their contours, in
    voxel *indices*, is at most the scan's slice thickness in mm, or if readings between connect
    them. That is how pylidc 0.2.3 does it (`Scan.cluster_annotations`). Where a group has more than
    four readings, the tolerance of the scan shrinks by 0.9 until none has, or it would fall below
    0.1: then the group stays as it is (`Nodule.is_one`).
    """
    return tuple(
        Nodule(scan, tuple(scan.readings[i] for i in group))
        for scan in scans
        for group in _groups(scan)
    )


def split(nodules: tuple[Nodule, ...], by: str = "patient", seed: int = 0) -> Split:
    """A fifth of the patients (by='patient') or of the nodules (by='nodule') for the test.

    Those whose name has the smallest SHA-256 together with the seed are taken, so it is the same on
    every machine. Give all nodules of the database, whatever scans are at hand, and leave out what
    is not wanted afterwards: then the sides stay what they are.

    The split by nodule is how the ACS paper words its own. It leaks: nodules of one patient are on
    both sides. A warning says of how many patients.
    """
    if by not in ("patient", "nodule"):
        raise ValueError(f"by must be 'patient' or 'nodule', got {by!r}")
    units = {n.name: n.scan.patient if by == "patient" else n.name for n in nodules}
    order = sorted(
        set(units.values()), key=lambda u: hashlib.sha256(f"lidc-{seed}-{u}".encode()).digest()
    )
    held_out = set(order[: round(len(order) / TEST_PART)])
    sides = {True: [], False: []}
    patients = {True: set(), False: set()}
    for nodule in nodules:
        side = units[nodule.name] in held_out
        sides[side].append(nodule.name)
        patients[side].add(nodule.scan.patient)
    leaking = tuple(sorted(patients[True] & patients[False]))
    if by == "nodule":
        warnings.warn(
            f"the split by nodule leaks: {len(leaking)} of the {len(patients[True])} patients of"
            " the test have nodules in the training as well, so scores come out too high",
            stacklevel=2,
        )
    return Split(tuple(sides[False]), tuple(sides[True]), leaking)


def _groups(scan: Scan) -> list[list[int]]:
    """Indices of readings."""
    count, tolerance = len(scan.readings), scan.slice_thickness_mm
    if count < 2:
        return [[i] for i in range(count)]
    points = [scan.contour_points(reading) for reading in scan.readings]
    low, high = (np.stack([getattr(p, end)(axis=0) for p in points]) for end in ("min", "max"))
    # How far boxes around them are apart. What is beyond the tolerance, which only shrinks, never
    # matters.
    apart = np.maximum(low[:, None] - high, low - high[:, None]).clip(0)
    near = np.linalg.norm(apart, axis=2) <= tolerance
    distances = np.where(np.eye(count, dtype=bool), 0, np.inf)
    trees = {i: cKDTree(points[i]) for i in np.flatnonzero(near.sum(axis=0) > 1)}
    for i, j in np.argwhere(np.triu(near, 1)):
        distances[i, j] = distances[j, i] = trees[i].query(points[j])[0].min()
    while True:
        groups = defaultdict(list)
        for index, group in enumerate(connected_components(distances <= tolerance)[1]):
            groups[group].append(index)
        tolerance *= SHRINK
        if all(len(g) <= READERS for g in groups.values()) or tolerance < LEAST_TOLERANCE:
            return sorted(groups.values())
