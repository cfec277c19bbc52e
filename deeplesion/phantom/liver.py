"""The phantom's liver, scanned as a liver segmentation data set has it: the abdomen alone, every
voxel labelled, and the liver full of lesions and of vessels that look like them on one slice.

Body, findings and noise are those of the synthetic DeepLesion (make.py), the patients others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from deeplesion.phantom.body import BLOCKED, BODY_LENGTH, LIVER, Body, sub_heights
from deeplesion.phantom.findings import Finding, Scan
from deeplesion.phantom.make import draw_findings
from deeplesion.phantom.render import add_noise, draw_noise_level, draw_spacing, render_slice

# In the generators' seeds above those of make_phantom's and of whole scans.
FIRST_PATIENT = 2_000_000
BEYOND_MM = (10.0, 60.0)  # how far the scan goes on above and below the liver
STEPS_MM = (6.0, 22.0)  # from one group of findings to the next
LARGER = 1.8  # times the size of the synthetic DeepLesion's, for a part of the findings
WITHOUT_LESIONS = 0.1  # of the patients; 13 of LiTS's 131 have none
ORGAN, LESION = 1, 2


@dataclass(frozen=True, eq=False)
class LiverScan:
    """A scan and its labels.

    Attributes:
        scan: size, spacing and thickness; slice k is at the height first_mm + k * thickness.
        hu: (S, size, size) int16; rows to the patient's left, columns to posterior, slices head to
            feet.
        labels: (S, size, size) uint8: 1 liver, 2 lesion, else 0.
        first_mm: height of the first slice below the top of the chest.
    """

    scan: Scan
    hu: np.ndarray
    labels: np.ndarray
    first_mm: float


class LiverBody(Body):
    """A body that says how much of each pixel of the last slab was liver."""

    liver: np.ndarray  # (size, size), 0 to 1

    def slab(self, z: float, thickness: float) -> tuple[np.ndarray, np.ndarray]:
        planes = [self.plane(z + dz) for dz in sub_heights(thickness)]
        self.liver = np.mean([tissue == LIVER for _, tissue in planes], axis=0)
        hu = np.mean([hu for hu, _ in planes], axis=0)
        return hu, np.mean([tissue != BLOCKED for _, tissue in planes], axis=0)


class _LiverAlone:
    """A body in which nothing but the liver takes findings."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def plane(self, z: float) -> tuple[np.ndarray, np.ndarray]:
        hu, tissue = self.body.plane(z)
        return hu, np.where(tissue == LIVER, LIVER, BLOCKED).astype(np.uint8)


def draw_liver_scan(number: int, size: int, seed: int, thickness: float) -> LiverScan:
    """Draw the scan of patient `number`; equal arguments give the same scan.

    A voxel is of a lesion if its share is at least half of the greatest share that the lesion has
    of any, as in whole phantom scans, and of the liver if half of it is.
    """
    body_rng, rng = (np.random.default_rng([seed, FIRST_PATIENT + number, k]) for k in (0, 1))
    spacing = draw_spacing(body_rng, size)
    body = LiverBody(body_rng, size, spacing)
    scan = Scan(size, spacing, thickness)
    (organ,) = (organ for organ in body.organs if organ.tissue == LIVER)
    top, bottom = organ.z - organ.rz, organ.z + organ.rz
    first = max(top - rng.uniform(*BEYOND_MM), 0.0)
    last = min(bottom + rng.uniform(*BEYOND_MM), BODY_LENGTH)
    findings = _draw_all_findings(rng, body, scan, top, bottom)
    level = draw_noise_level(rng, body, thickness)
    count = int((last - first) / thickness) + 1
    hu = np.empty((count, size, size), np.int16)
    labels = np.zeros(hu.shape, np.uint8)
    shares: dict[int, list] = {}
    for index in range(count):
        slice_, filled = render_slice(body, first + index * thickness, thickness, findings)
        hu[index] = add_noise(rng, slice_, level)
        labels[index][body.liver >= 0.5] = ORGAN
        for finding, box, opacity, passable in filled:
            if finding.is_lesion:
                shares.setdefault(id(finding), []).append((index, box, opacity * passable))
    for parts in shares.values():
        least = 0.5 * max(share.max() for _, _, share in parts)
        for index, box, share in parts:
            labels[index][box][share >= least] = LESION
    return LiverScan(scan, hu, labels, first)


def _draw_all_findings(
    rng: np.random.Generator, body: Body, scan: Scan, top: float, bottom: float
) -> list[Finding]:
    """Lesions and as many vessels, in groups all along the liver."""
    with_lesions = rng.random() >= WITHOUT_LESIONS
    findings: list[Finding] = []
    z = top + rng.uniform(8, 20)
    while z < bottom - 8:
        larger = LARGER if rng.random() < 0.35 else 1.0
        # A larger finding is drawn as if the pixels were smaller, and then grows with them.
        drawn_at = scan._replace(spacing=scan.spacing / larger)
        drawn = draw_findings(rng, _LiverAlone(body), drawn_at, z, findings)
        findings += [_grown(finding, scan, larger) for finding, _, _ in drawn]
        z += rng.uniform(*STEPS_MM) if drawn else rng.uniform(3, 10)
    for finding in findings:
        finding.is_lesion &= with_lesions
    return findings


def _grown(finding: Finding, scan: Scan, factor: float) -> Finding:
    outline = replace(
        finding.outline,
        radius=finding.outline.radius * factor,
        diameter=finding.outline.diameter * factor,
    )
    waves = finding.waves / np.array([factor, factor, 1, 1])
    return replace(
        finding,
        scan=scan,
        outline=outline,
        half_depth=finding.half_depth * factor,
        offset=finding.offset * factor,
        waves=waves,
    )
