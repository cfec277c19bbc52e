"""Whole CT scans of phantom patients, head to feet, and the truth on every lesion in them.

Body, lesions, distractors and noise are drawn as the synthetic DeepLesion's are (make.py), so a
detector trained on that can work here at the same size. The patients are others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deeplesion.conventions import RECIST_MARGIN
from deeplesion.data.recist import recist_from_contour
from deeplesion.phantom.body import BODY_LENGTH, LESION_TYPE, Body
from deeplesion.phantom.findings import ANGLES, Finding, Scan
from deeplesion.phantom.make import draw_findings
from deeplesion.phantom.render import add_noise, draw_noise_level, draw_spacing, render_slice

# Numbers of the scans' patients in the generators' seeds start above those of make_phantom's.
FIRST_PATIENT = 1_000_000
THIN, THICK = 1.0, 5.0  # mm
MARGIN_MM = 40.0  # from the scan's ends to the first and the last place of findings
STEPS_MM = (45.0, 110.0)  # from one place of findings to the next


@dataclass(frozen=True)
class ScanPlan:
    """What is decided about a scan before anything is drawn: odd numbers are thin, even thick."""

    number: int  # from 1
    size: int  # pixels a side
    seed: int

    @property
    def name(self) -> str:
        return f"phantom_{self.number:03d}"

    @property
    def thickness(self) -> float:
        return THIN if self.number % 2 else THICK


@dataclass(frozen=True, eq=False)
class TrueFinding:
    """A lesion, or a distractor, as it was drawn.

    Attributes:
        shape: 'round', 'elliptic', 'lobulated', 'irregular' or 'spiculated'.
        lesion_type: of the tissue it lies in, numbered as DeepLesion's coarse lesion types.
        diameters_mm: (2,) long and short axis of its widest section; a distractor's section, the
            same everywhere, is up to 2 % smaller.
        centroid: (3,) x, y in pixel centres and the height below the top of the chest in mm. Of a
            distractor, which wanders, that of its middle section.
    """

    shape: str
    lesion_type: int
    diameters_mm: np.ndarray
    centroid: np.ndarray


@dataclass(frozen=True, eq=False)
class TrueLesion(TrueFinding):
    """A lesion and what it fills.

    Attributes:
        number: in the label map.
        volume_mm3: of what it fills, partly filled voxels by their share.
        tight_box: (6,) int x1, y1, z1, x2, y2, z2 around its voxels, inclusive; z counts slices.
        box: (6,) int, the same with the benchmark's margin around a RECIST measurement in x and y,
            within the image.
    """

    number: int
    volume_mm3: float
    tight_box: np.ndarray
    box: np.ndarray


@dataclass(frozen=True, eq=False)
class PhantomScan:
    """A scan and its truth.

    Attributes:
        scan: size, spacing and thickness; slice k is at the height k * thickness.
        hu: (S, size, size) int16; rows to the patient's left, columns to posterior, slices head to
            feet.
        labels: (S, size, size) uint8, the number of the lesion whose voxel it is, else 0.
    """

    scan: Scan
    hu: np.ndarray
    labels: np.ndarray
    lesions: tuple[TrueLesion, ...]
    distractors: tuple[TrueFinding, ...]


def draw_scan(plan: ScanPlan) -> PhantomScan:
    """Draw the whole scan; the same plan gives the same scan.

    A voxel belongs to a lesion if its share is at least half of the greatest share that the lesion
    has of any: at the edge that a reader sees. So small lesions have voxels in thick slices too,
    whose voxels they never fill.
    """
    body_rng, rng = (
        np.random.default_rng([plan.seed, FIRST_PATIENT + plan.number, k]) for k in (0, 1)
    )
    spacing = draw_spacing(body_rng, plan.size)
    body = Body(body_rng, plan.size, spacing)
    scan = Scan(plan.size, spacing, plan.thickness)
    findings = _draw_all_findings(rng, body, scan)
    level = draw_noise_level(rng, body, plan.thickness)
    hu = np.empty((round(BODY_LENGTH / plan.thickness), plan.size, plan.size), np.int16)
    true_lesions = [finding for finding in findings if finding.is_lesion]
    shares: dict[int, list] = {id(finding): [] for finding in true_lesions}
    for index in range(len(hu)):
        slice_, filled = render_slice(body, index * plan.thickness, plan.thickness, findings)
        hu[index] = add_noise(rng, slice_, level)
        for finding, box, opacity, passable in filled:
            if finding.is_lesion:
                shares[id(finding)].append((index, box, opacity * passable))
    labels = np.zeros(hu.shape, np.uint8)
    lesions = tuple(
        _paint(labels, number, finding, shares[id(finding)])
        for number, finding in enumerate(true_lesions, 1)
    )
    distractors = tuple(TrueFinding(**_describe(f)) for f in findings if not f.is_lesion)
    return PhantomScan(scan, hu, labels, lesions, distractors)


def _draw_all_findings(rng: np.random.Generator, body: Body, scan: Scan) -> list[Finding]:
    """Lesions and as many distractors, in groups all along the body."""
    findings: list[Finding] = []
    while not findings:
        z = MARGIN_MM + rng.uniform(0, 20)
        while z < BODY_LENGTH - MARGIN_MM:
            height = round(z / scan.thickness) * scan.thickness
            drawn = draw_findings(rng, body, scan, height, findings)
            findings += [finding for finding, _, _ in drawn]
            z += rng.uniform(*STEPS_MM) if drawn else rng.uniform(3, 10)
    return findings


def _paint(labels: np.ndarray, number: int, finding: Finding, shares: list) -> TrueLesion:
    """Write a lesion's voxels into the label map; `shares`: (slice, box, share of each pixel)."""
    least = 0.5 * max(share.max() for _, _, share in shares)
    corners = []
    for index, box, share in shares:
        y, x = np.nonzero(share >= least)
        if len(y):
            x, y = x + box[1].start, y + box[0].start
            labels[index, y, x] = number
            corners.append([x.min(), y.min(), index, x.max(), y.max(), index])
    tight = np.concatenate([np.min(corners, axis=0)[:3], np.max(corners, axis=0)[3:]])
    box = tight.copy()
    box[:2] = np.maximum(tight[:2] - RECIST_MARGIN, 0)
    box[3:5] = np.minimum(tight[3:5] + RECIST_MARGIN, finding.scan.size - 1)
    voxel = finding.scan.spacing**2 * finding.scan.thickness
    volume = voxel * sum(share.sum() for _, _, share in shares)
    return TrueLesion(
        **_describe(finding), number=number, volume_mm3=volume, tight_box=tight, box=box
    )


def _describe(finding: Finding) -> dict:
    """The fields of a `TrueFinding`, from the outline and not from pixels."""
    radius, spacing = finding.outline.radius, finding.scan.spacing
    direction = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
    recist = recist_from_contour(radius[:, None] * direction)
    # The centroid of a star: of the triangles between neighbouring angles.
    offset = 2 / 3 * (radius[:, None] ** 3 * direction).sum(0) / (radius**2).sum()
    # A lesion is widest where its height and offset cancel; a distractor stays its key section.
    height = finding.z - finding.offset if finding.is_lesion else finding.z
    return {
        "shape": finding.outline.shape,
        "lesion_type": LESION_TYPE.get(finding.tissue, finding.tissue),
        "diameters_mm": np.linalg.norm(recist[1::2] - recist[::2], axis=1),
        "centroid": np.array([*(finding.centre + offset / spacing), height]),
    }
