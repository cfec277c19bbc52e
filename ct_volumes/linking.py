"""From the detections of single slices to lesions in 3D: suppressed within each slice, linked from
slice to slice, filled in between, measured in mm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ct_volumes.gaps import parts
from ct_volumes.interpolation import centroid, ellipse, interpolate, shrink
from ct_volumes.lesions import Lesion, LesionSlice, Patch, SliceDetections
from ct_volumes.volume import CTVolume
from deeplesion.data.recist import recist_from_mask
from deeplesion.evaluation.froc import box_iou

BRIDGE_MM = 5.0  # one missed slice of those 2 or 2.5 mm apart
# Slices without a gap lie up to so far apart, and are linked. Over a longer gap nothing tells that
# what lies on its two sides is one lesion.
LONGEST_GAP_MM = 10.0
# Beyond a lesion's ends a detector goes on to find something, faintly, and chains grow far too
# long. Chosen on phantom scans, see docs/detecting.md.
MIN_SLICE_SCORE = 0.1
SCORE_SHARE = 0.5
ROUNDING_MM = 1e-3  # positions in headers have so many decimals
WHOLE = 0.99  # more than this share of a slice is the whole slice
SAME_LENGTH_MM = 1e-6  # long axes that differ by no more are equally long


def link(
    slice_detections: Sequence[SliceDetections],
    volume: CTVolume,
    min_score: float = MIN_SLICE_SCORE,
    nms_iou: float = 0.5,
    iou: float = 0.3,
    overlap: float = 0.5,
    bridge_mm: float = BRIDGE_MM,
    lesion_score: float = 0.0,
    score_share: float = SCORE_SHARE,
) -> list[Lesion]:
    """Lesions in 3D from what a detector found on single slices.

    On each slice, of detections that overlap by an IoU above `nms_iou` the best stays. The best
    detection that is left starts a lesion, which grows towards the head and towards the feet: it
    takes, of the detections on the next slice that was looked at which belong to no lesion yet and
    overlap with its own outermost one by `iou` or by `overlap`, the one of the largest IoU. If
    there is none, it looks on the slices behind that one, up to `bridge_mm` from its outermost
    detection. The next slice looked at is within reach however far it lies, but not beyond a gap of
    the scan (`ct_volumes.gaps`) that is longer than 10 mm and than `bridge_mm`. A large and a small
    section of one lesion overlap little in IoU, but the small one lies within the large one: hence
    `overlap`.

    In the end its outer slices are cut off up to the first one that scores at least `score_share`
    of its best; they belong to no other lesion either.

    Slices between those detected get a box, linear in position, and a mask by shape-based
    interpolation (`interpolate`). Where not every slice was looked at, the lesion ends half-way
    between its outermost detected slice and the next one looked at (at half the smaller of the
    steps on its two sides, if they differ): slices up to there repeat the outermost box and mask; a
    slice that lies within reach by half, say, gets half of the area (`shrink`). So each section
    looked at counts for as much of the normal as lies between two of them, by which the volume is
    right on the average over where these happen to lie (Cavalieri's principle). A lesion that is
    found on both sides of a gap fills it; one that ends beside a gap ends there as at an end of the
    scan.

    Args:
        slice_detections: one for each slice that was looked at, also if nothing was found there.
        volume: what was looked at.
        min_score: detections below are left out.
        nms_iou: above it two boxes of a slice show the same.
        iou: of boxes on two slices that belong together.
        overlap: the same, of the intersection over the area of the smaller box.
        bridge_mm: how far apart the detected slices of a lesion may lie.
        lesion_score: lesions whose best slice scores less are left out. Unlike a higher
            `min_score` it takes nothing from those that stay, whose outer slices score less.
        score_share: of the best score, what a lesion's first and last detected slice must reach.

    Returns:
        the lesions by falling score, which is that of their best slice.

    Raises:
        ValueError: a threshold that cannot be; slices that are not in the volume or there twice;
            arrays that do not fit together, boxes that are none or lie outside the slice.
    """
    for name, value, low, high in (
        ("min_score", min_score, 0, 1),
        ("nms_iou", nms_iou, 0, 1),
        ("iou", iou, 0, 1),
        ("overlap", overlap, 0, 1),
        ("bridge_mm", bridge_mm, 0, np.inf),
        ("lesion_score", lesion_score, 0, 1),
        ("score_share", score_share, 0, 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    looked_at = sorted(slice_detections, key=lambda each: each.index)
    _check(looked_at, volume)
    if not looked_at:
        return []
    found = _Found.of(looked_at, volume, min_score, nms_iou)
    chains = _chains(found, iou, overlap, bridge_mm, score_share)
    return [_lesion(found, c) for c in chains if found.scores[c].max() >= lesion_score]


@dataclass(frozen=True, eq=False)
class _Found:
    """The n detections left after suppression, slice by slice.

    Attributes:
        volume: the scan.
        slices: (k,) the slices looked at, rising.
        boxes, scores: (n, 4), (n,).
        place: (n,) the number of each detection's slice among those looked at, rising.
        patches: n masks, None where there is none.
    """

    volume: CTVolume
    slices: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    place: np.ndarray
    patches: list[Patch | None]

    @classmethod
    def of(
        cls, looked_at: list[SliceDetections], volume: CTVolume, min_score: float, nms_iou: float
    ) -> _Found:
        boxes, scores, place, patches = [np.zeros((0, 4))], [np.zeros(0)], [], []
        for number, each in enumerate(looked_at):
            of_slice = np.asarray(each.boxes, np.float64).reshape(-1, 4)
            score = np.asarray(each.scores, np.float64)
            chosen = np.flatnonzero(score >= min_score)
            chosen = chosen[_suppress(of_slice[chosen], score[chosen], nms_iou)]
            boxes.append(of_slice[chosen])
            scores.append(score[chosen])
            place += [number] * len(chosen)
            patches += [None if each.masks is None else each.masks[i] for i in chosen]
        slices = np.array([each.index for each in looked_at])
        place = np.array(place, int)
        return cls(volume, slices, np.concatenate(boxes), np.concatenate(scores), place, patches)

    @property
    def positions_mm(self) -> np.ndarray:
        """(k,) of the slices looked at."""
        return self.volume.positions_mm[self.slices]

    def patch(self, detection: int) -> Patch:
        """The mask of a detection, never empty."""
        patch = self.patches[detection]
        if patch is None or not patch.mask.any():
            patch = ellipse(self.boxes[detection], self.volume.hu.shape[1:])
        return patch


def _by_score(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Numbers of detections by falling score. Their boxes decide between equal scores, not the
    order in which they are given."""
    return np.lexsort((*boxes.T[::-1], -scores))


def _suppress(boxes: np.ndarray, scores: np.ndarray, nms_iou: float) -> np.ndarray:
    """Numbers of the boxes that non-maximum suppression keeps, by falling score."""
    order = _by_score(boxes, scores)
    boxes = boxes[order]
    same = box_iou(boxes[:, None], boxes) > nms_iou
    kept = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if kept[i]:
            kept[i + 1 :] &= ~same[i, i + 1 :]
    return order[kept]


def _chains(
    found: _Found, iou: float, overlap: float, bridge_mm: float, score_share: float
) -> list[list[int]]:
    """The detections of each lesion from head to feet, lesions by falling score."""
    order = _by_score(found.boxes, found.scores)
    upper, lower, ious = _pairs(found, iou, overlap, bridge_mm)
    to_head = _partners(lower, upper, ious, found.place, order)
    to_feet = _partners(upper, lower, ious, found.place, order)
    taken = [False] * len(order)
    chains = []
    for start in order.tolist():
        if taken[start]:
            continue
        taken[start] = True
        chain = [start]
        for partners in (to_head, to_feet):
            end = start
            while (end := next((p for p in partners[end] if not taken[p]), None)) is not None:
                taken[end] = True
                chain.append(end)
        chain.sort(key=found.place.__getitem__)
        strong = np.flatnonzero(found.scores[chain] >= score_share * found.scores[start])
        chains.append(chain[strong[0] : strong[-1] + 1])
    return chains


def _pairs(
    found: _Found, iou: float, overlap: float, bridge_mm: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every two detections that may follow on each other in a lesion: numbers of the one nearer to
    the head and of the other, and their IoU."""
    count = len(found.slices)
    first = np.searchsorted(found.place, np.arange(count + 1))
    positions = found.positions_mm
    part = parts(found.volume.positions_mm, LONGEST_GAP_MM + ROUNDING_MM)[found.slices]
    reach = np.searchsorted(positions, positions + bridge_mm + ROUNDING_MM, side="right")
    # Boxes are counted as x2 - x1 + 1 wide, as everywhere in the benchmark.
    area = (found.boxes[:, 2:] - found.boxes[:, :2] + 1).prod(axis=1)
    pairs = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for here in range(count - 1):
        # All slices within reach at once.
        a = slice(first[here], first[here + 1])
        next_one = here + 1 + (part[here + 1] == part[here])
        b = slice(first[here + 1], first[max(reach[here], next_one)])
        one, other = found.boxes[a, None], found.boxes[b]
        sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
        common = np.maximum(sides + 1, 0).prod(axis=-1)
        own, others = area[a, None], area[b]
        ious = common / (own + others - common)
        linked = (ious >= iou) | (common >= overlap * np.minimum(own, others))
        i, j = np.nonzero(linked & (common > 0))
        pairs.append((i + a.start, j + b.start, ious[i, j]))
    return tuple(np.concatenate(each) for each in zip(*pairs))


def _partners(
    of: np.ndarray, partner: np.ndarray, ious: np.ndarray, place: np.ndarray, order: np.ndarray
) -> list[list[int]]:
    """For each detection its partners in one direction, the best first: those on the nearest slice
    by falling IoU, then those on the next ..."""
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    steps = np.abs(place[partner] - place[of])
    sort = np.lexsort((rank[partner], -ious, steps, of))
    ends = np.searchsorted(of[sort], np.arange(len(order) + 1)).tolist()
    partner = partner[sort].tolist()
    return [partner[a:b] for a, b in pairwise(ends)]


def _lesion(found: _Found, chain: list[int]) -> Lesion:
    """The lesion of a chain of detections, measured."""
    volume, spacing = found.volume, found.volume.spacing_mm
    seen = [
        LesionSlice(
            int(found.slices[found.place[i]]),
            found.boxes[i],
            float(found.scores[i]),
            found.patch(i),
        )
        for i in chain
    ]
    slices = _beyond(found, seen[0], chain[0], -1)[::-1]
    for here, following in pairwise(seen):
        slices += [here, *_between(here, following, volume)]
    slices += [seen[-1], *_beyond(found, seen[-1], chain[-1], 1)]

    index = np.array([each.index for each in slices])
    pixels = np.array([np.count_nonzero(each.patch.mask) for each in slices])
    # Its slices reach half the way to each other, also over a gap.
    halves = np.diff(volume.positions_mm[index]) / 2
    to_head, to_feet = volume.reach_mm[[index[0], index[-1]], [0, 1]]
    extents = np.append(to_head, halves) + np.append(halves, to_feet)
    volumes = pixels * (spacing[0] * spacing[1]) * extents
    centres = np.stack([centroid(each.patch) for each in slices])
    worlds = volume.to_world(centres[:, 0], centres[:, 1], index)
    measured, recist, diameters = _longest(seen, spacing)
    return Lesion(
        score=max(each.score for each in seen),
        slices=tuple(slices),
        volume_mm3=float(volumes.sum()),
        centroid_mm=volumes @ worlds / volumes.sum(),
        recist=recist,
        recist_index=measured.index,
        diameters_mm=diameters,
    )


def _between(here: LesionSlice, following: LesionSlice, volume: CTVolume) -> list[LesionSlice]:
    """The slices between two detected ones."""
    index = range(here.index + 1, following.index)
    if not index:
        return []
    start, *inner, end = volume.positions_mm[here.index : following.index + 1].tolist()
    fractions = [(position - start) / (end - start) for position in inner]
    patches = interpolate(
        here.patch, following.patch, fractions, volume.spacing_mm, volume.hu.shape[1:]
    )
    return [
        LesionSlice(i, (1 - f) * here.bbox + f * following.bbox, None, patch)
        for i, f, patch in zip(index, fractions, patches)
    ]


def _beyond(found: _Found, outermost: LesionSlice, detection: int, way: int) -> list[LesionSlice]:
    """The slices beyond an outermost detected one, to the head (way -1) or to the feet (1), up to
    half the step to the next slice looked at, and not beyond a gap."""
    volume, place = found.volume, found.place[detection]
    distances = np.abs(volume.positions_mm - volume.positions_mm[outermost.index])
    part = parts(volume.positions_mm)
    (own,) = np.nonzero(part == part[outermost.index])
    beside = found.slices[max(place - 1, 0) : place + 2]
    steps = [distances[i] for i in beside if i != outermost.index and i in own]
    reach = min(steps, default=0) / 2
    beyond, index = [], outermost.index + way
    while own[0] <= index <= own[-1] and distances[index] <= reach + ROUNDING_MM:
        # How much of what belongs to this slice lies within reach.
        inner, here, after = distances[index - way], distances[index], index + way
        outer = distances[after] if own[0] <= after <= own[-1] else 2 * here - inner
        share = (2 * reach - inner - here) / (outer - inner)
        bbox, patch = outermost.bbox, outermost.patch
        if share < WHOLE:
            patch = shrink(patch, share, volume.spacing_mm)
            middle = np.tile((bbox[:2] + bbox[2:]) / 2, 2)
            bbox = middle + np.sqrt(max(share, 0)) * (bbox - middle)
        beyond.append(LesionSlice(index, bbox, None, patch))
        index += way
    return beyond


def _longest(
    seen: list[LesionSlice], spacing_mm: tuple[float, float]
) -> tuple[LesionSlice, np.ndarray, np.ndarray]:
    """Of the detected slices the one with the longest long axis (of several the one of the higher
    score), the end points of its axes (4, 2) and their lengths in mm (2,)."""
    # No mask is longer than its patch's diagonal: few need to be measured.
    diagonals = [np.hypot(*(np.array(s.patch.mask.shape) * spacing_mm)) for s in seen]
    best, longest, axes = None, -np.inf, None
    for i in np.argsort(diagonals)[::-1]:
        if diagonals[i] < longest - SAME_LENGTH_MM:
            break
        measured = recist_from_mask(seen[i].patch.mask, spacing_mm)
        length = measured.lengths_mm[0]
        if length > longest + SAME_LENGTH_MM or (
            length > longest - SAME_LENGTH_MM and seen[i].score > best.score
        ):
            best, longest, axes = seen[i], length, measured
    return best, axes.recist + (best.patch.x, best.patch.y), axes.lengths_mm


def _check(looked_at: list[SliceDetections], volume: CTVolume) -> None:
    """Raises ValueError for what is not as `SliceDetections` says, with the slice."""
    count, height, width = volume.hu.shape
    before = None
    for each in looked_at:
        where = f"detections of slice {each.index}"
        if not 0 <= each.index < count:
            raise ValueError(f"{where}: the volume has slices 0..{count - 1}")
        if each.index == before:
            raise ValueError(f"{where} are given twice")
        before = each.index
        boxes, scores = np.asarray(each.boxes, np.float64), np.asarray(each.scores, np.float64)
        if not boxes.size:
            boxes = boxes.reshape(0, 4)
        numbers = {len(boxes), len(scores), len(scores if each.masks is None else each.masks)}
        if boxes.shape[1:] != (4,) or scores.ndim != 1 or len(numbers) > 1:
            raise ValueError(
                f"{where} must be (n, 4) boxes, (n,) scores and n masks or None, got {boxes.shape},"
                f" {scores.shape} and {None if each.masks is None else len(each.masks)}"
            )
        if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
            raise ValueError(f"{where} hold a box that is not finite x1 <= x2, y1 <= y2")
        if (boxes[:, 2:] < -0.5).any() or (boxes[:, :2] > (width - 0.5, height - 0.5)).any():
            raise ValueError(f"{where} hold a box outside the {width} x {height} slice")
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(f"{where} hold a score that is not between 0 and 1")
        for patch in each.masks or ():
            rows, columns = patch.mask.shape
            if min(patch.x, patch.y) < 0 or patch.y + rows > height or patch.x + columns > width:
                raise ValueError(f"{where} hold a mask that reaches out of its slice")
