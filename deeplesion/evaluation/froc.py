"""FROC, the measure of the DeepLesion benchmark: sensitivity against false positives per image.

From boxes and scores to the curve and the operating points that every published table quotes.
Needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from deeplesion.evaluation.intervals import draw_groups

TABLE_FPS = (0.5, 1, 2, 4, 8, 16)
AVERAGE_FPS = (0.5, 1, 2, 4)

BLOCK = 512  # false positives counted at a time in a bootstrap


@dataclass(frozen=True, eq=False)
class FROC:
    """A FROC curve: one point a detection, from the highest score to the lowest.

    Attributes:
        thresholds: (n,) scores, falling; point i of the curve counts detections 0..i.
        images: (n,) which image each detection is of.
        false_positives: (n,) bool, reaches no lesion.
        lesion_images: (m,) which image each lesion is of, in input order.
        hit_at: (m,) the point of the curve at which each lesion is hit, n if it never is.
        counted: (images,) bool, False for images that are left out.
    """

    thresholds: np.ndarray
    images: np.ndarray
    false_positives: np.ndarray
    lesion_images: np.ndarray
    hit_at: np.ndarray
    counted: np.ndarray

    def of_images(self, chosen: np.ndarray) -> FROC:
        """The curve of some of the images alone: their detections, their lesions.

        For what is a property of an image, such as its slice thickness.

        Args:
            chosen: (images,) bool.
        """
        return replace(self, counted=self.counted & _mask("images", chosen, self.counted.shape))

    def of_lesions(self, chosen: np.ndarray) -> FROC:
        """The curve of some of the lesions over the false positives of all images.

        For what is a property of a lesion, such as its type: a false positive has none. The
        operating points stay those of the whole set, as in Yan et al., 3DCE (MICCAI 2018), whose
        sensitivities by type and size these are. Detections that reach other lesions are no false
        positives.

        Args:
            chosen: (m,) bool, in the order of `lesion_images`.
        """
        chosen = _mask("lesions", chosen, self.hit_at.shape)
        return replace(self, lesion_images=self.lesion_images[chosen], hit_at=self.hit_at[chosen])

    @property
    def num_images(self) -> int:
        """Images looked at, those without lesions included."""
        return int(self.counted.sum())

    @property
    def num_lesions(self) -> int:
        """Lesions in all images together."""
        return int(self.counted[self.lesion_images].sum())

    @cached_property
    def fps_per_image(self) -> np.ndarray:
        """(n,) false positives per image, rising."""
        return np.cumsum(self.false_positives & self.counted[self.images]) / self.num_images

    @cached_property
    def sensitivity(self) -> np.ndarray:
        """(n,) fraction of the lesions hit, rising; NaN where there are no lesions."""
        points = len(self.thresholds)
        if not self.num_lesions:
            return np.full(points, np.nan)
        hit_at = self.hit_at[self.counted[self.lesion_images]]
        return np.cumsum(np.bincount(hit_at, minlength=points + 1)[:points]) / self.num_lesions

    def sensitivity_at(self, fps: float | Sequence[float] = TABLE_FPS) -> np.ndarray:
        """Sensitivity at given false positives per image, in the shape of ``fps``.

        Linear between the points of the curve, from (0, 0) before its first point, and the last
        sensitivity beyond its last. Where hits raise the curve without a false positive (one x,
        several points) the highest of them counts. NaN where there are no lesions.

        Raises:
            ValueError: an operating point is negative or NaN.
        """
        fps = _operating_points(fps)
        if not self.num_lesions:
            return np.full(fps.shape, np.nan)
        # np.interp takes, of points that share an x, the last at that x and the first when
        # coming from the left: just the limits of a curve that is drawn point by point.
        x, y = np.append(0.0, self.fps_per_image), np.append(0.0, self.sensitivity)
        return np.interp(fps, x, y)

    def fps_per_image_at(self, scores: float | Sequence[float]) -> np.ndarray:
        """False positives per image of at least these scores, in the shape of ``scores``."""
        points = np.searchsorted(-self.thresholds, -np.asarray(scores, np.float64), side="right")
        return np.append(0.0, self.fps_per_image)[points]

    @property
    def average(self) -> float:
        """Mean sensitivity at 0.5, 1, 2 and 4 false positives per image ("Avg." of the papers)."""
        return float(self.sensitivity_at(AVERAGE_FPS).mean())

    def bootstrap(
        self,
        groups: Sequence,
        fps: Sequence[float] = TABLE_FPS,
        number: int = 1000,
        seed: int = 0,
    ) -> np.ndarray:
        """Sensitivities in image sets drawn from this one with replacement, (number, len(fps)).

        Groups of images are drawn as a whole, as many as there are: give the patients, because the
        images of one are alike. A 95 % interval of the sensitivities:
        ``np.nanquantile(curve.bootstrap(patients), (0.025, 0.975), axis=0)``.

        Row i is of one and the same draw for every curve with the same groups and seed: rows of two
        detectors on the same images, or of a set and a part of it, can be subtracted. A draw
        without any of the curve's lesions has no sensitivity: its row is NaN.

        Args:
            groups: one label an image, of all images.
            fps: operating points, false positives per image.
            number: how many draws.
            seed: of the random generator; the same seed draws the same sets.

        Raises:
            ValueError: not one label an image; a bad operating point.
        """
        groups = np.asarray(groups)
        if groups.shape != self.counted.shape:
            raise ValueError(
                f"groups has shape {groups.shape}, expected one label for each of the "
                f"{len(self.counted)} images"
            )
        fps = _operating_points(fps)
        group, times = draw_groups(groups, number, seed)

        # The most false positives a draw may have at each operating point: the largest whole number
        # c with c / images <= fps, in the arithmetic of the curve.
        images = (times @ np.bincount(group[self.counted], minlength=times.shape[1]))[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            most = np.floor(fps * images) + 1
            for _ in range(2):
                most -= most / images > fps

        points = np.flatnonzero(self.false_positives & self.counted[self.images])
        first = _first_beyond(most, group[self.images[points]], times)
        ends = np.append(points, len(self.thresholds))[first]

        # The curve is a staircase: what is hit before the first false positive too many counts.
        lesions = np.flatnonzero(self.counted[self.lesion_images])
        lesions = lesions[np.argsort(self.hit_at[lesions])]
        lesion_group, hit_at = group[self.lesion_images[lesions]], self.hit_at[lesions]
        sensitivity = np.empty(first.shape)
        for row, drawn, end in zip(sensitivity, times, ends):
            hits = np.append(0, np.cumsum(drawn[lesion_group]))
            row[:] = hits[np.searchsorted(hit_at, end)] / hits[-1] if hits[-1] else np.nan
        return sensitivity


def froc(
    detections: Sequence[np.ndarray],
    ground_truths: Sequence[np.ndarray],
    iou_threshold: float = 0.5,
    pixel_offset: float = 1,
) -> FROC:
    """FROC curve of the detections of a set of images.

    Detections of all images are taken by falling score, ties in input order (image by image, row
    by row). A detection whose IoU with a lesion of its image reaches the threshold hits every such
    lesion not hit before. One that reaches no lesion is a false positive; one that only reaches
    lesions already hit is neither. Without any lesion the sensitivity is NaN, and there are false
    positives alone.

    Args:
        detections: one (n, 5) array an image, rows x1, y1, x2, y2, score; in any order.
        ground_truths: one (m, 4) array an image, rows x1, y1, x2, y2, in the same pixels; m may
            be 0.
        iou_threshold: overlap that makes a hit, in (0, 1].
        pixel_offset: added to widths and heights (x2 - x1 + pixel_offset). 1 is what the published
            DeepLesion tables used, 0 is the modern definition.

    Raises:
        ValueError: lists of unequal length, wrong shapes, non-finite numbers, x2 < x1 or y2 < y1
            (the message names the image's place in the list), or no image.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in (0, 1], got {iou_threshold}")
    if not pixel_offset >= 0:
        raise ValueError(f"pixel_offset must be 1 (published tables) or 0, got {pixel_offset}")
    if len(detections) != len(ground_truths):
        raise ValueError(
            f"detections has {len(detections)} images, ground_truths {len(ground_truths)}: "
            "give both one entry an image, empty where there is nothing"
        )
    found, found_per_image = _concatenate(
        "detections", detections, ("x1", "y1", "x2", "y2", "score")
    )
    lesions, lesions_per_image = _concatenate(
        "ground_truths", ground_truths, ("x1", "y1", "x2", "y2")
    )
    if not len(ground_truths):
        raise ValueError("no images: there is nothing to evaluate")

    # Most detections are far from every lesion: those in the rectangle around all lesions of their
    # image are few.
    image = np.repeat(np.arange(len(detections)), found_per_image)
    lesion_images = np.repeat(np.arange(len(detections)), lesions_per_image)
    near = np.ones(len(image), bool)
    for low, high in ((0, 2), (1, 3)):
        first, last = np.full(len(detections), np.inf), np.full(len(detections), -np.inf)
        np.minimum.at(first, lesion_images, lesions[low])
        np.maximum.at(last, lesion_images, lesions[high])
        near &= found[low] <= np.repeat(last + pixel_offset, found_per_image)
        near &= found[high] >= np.repeat(first - pixel_offset, found_per_image)
    near = np.flatnonzero(near)

    # Each of them with every lesion of its image, pair by pair, as two index arrays.
    partners = lesions_per_image[image[near]]
    first_lesion = np.cumsum(lesions_per_image) - lesions_per_image
    first_pair = np.cumsum(partners) - partners
    detection = np.repeat(near, partners)
    lesion = np.arange(len(detection)) + np.repeat(first_lesion[image[near]] - first_pair, partners)

    a, b = found[:4].take(detection, axis=1).T, lesions.take(lesion, axis=1).T
    reached = box_iou(a, b, pixel_offset) >= iou_threshold
    detection, lesion = detection[reached], lesion[reached]

    order, thresholds = _falling(found[4])
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    false_positives = np.ones(len(order), bool)
    false_positives[rank[detection]] = False
    hit_at = np.full(lesions.shape[1], len(order))
    np.minimum.at(hit_at, lesion, rank[detection])

    return FROC(
        thresholds=thresholds,
        images=image[order],
        false_positives=false_positives,
        lesion_images=lesion_images,
        hit_at=hit_at,
        counted=np.ones(len(detections), bool),
    )


def box_iou(a: np.ndarray, b: np.ndarray, pixel_offset: float = 1) -> np.ndarray:
    """IoU of boxes (..., 4) with boxes (..., 4), broadcast against each other -> (...).

    Rows are x1, y1, x2, y2; a box is x2 - x1 + pixel_offset wide. 0 where neither has an area.
    """
    a_x1, a_y1, a_x2, a_y2 = np.moveaxis(a, -1, 0)
    b_x1, b_y1, b_x2, b_y2 = np.moveaxis(b, -1, 0)
    width = np.minimum(a_x2, b_x2) - np.maximum(a_x1, b_x1) + pixel_offset
    height = np.minimum(a_y2, b_y2) - np.maximum(a_y1, b_y1) + pixel_offset
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    area_a = (a_x2 - a_x1 + pixel_offset) * (a_y2 - a_y1 + pixel_offset)
    area_b = (b_x2 - b_x1 + pixel_offset) * (b_y2 - b_y1 + pixel_offset)
    union = area_a + area_b - intersection
    return np.divide(intersection, union, out=np.zeros(np.shape(union)), where=union > 0)


def _first_beyond(most: np.ndarray, group: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Where a count of items, each as often as its group is drawn, first exceeds a limit.

    Args:
        most: (draws, k) limits.
        group: (n,) of each item.
        times: (draws, groups).

    Returns:
        (draws, k) int, n where the limit is never exceeded.
    """
    # Counting item by item takes n additions a draw. Instead: whole blocks of items by one matrix
    # product for all draws, then item by item in the block where the limit is passed.
    blocks = -(-len(group) // BLOCK)
    num_groups = times.shape[1]
    block_of_item = np.arange(len(group)) // BLOCK
    per_block = np.bincount(block_of_item * num_groups + group, minlength=blocks * num_groups)
    per_block = per_block.reshape(blocks, num_groups).astype(np.float64)
    counts = np.cumsum(times.astype(np.float64) @ per_block.T, axis=1)  # exact: whole numbers

    padded = np.zeros(blocks * BLOCK, np.intp)
    padded[: len(group)] = group
    items = padded.reshape(blocks, BLOCK)
    first = np.full(most.shape, len(group))
    for row, limits, count, drawn in zip(first, most, counts, times):
        block = np.searchsorted(count, limits, side="right")
        passed = block < blocks
        block = block[passed]
        within = np.cumsum(drawn[items[block]], axis=1)
        missing = limits[passed] - np.append(0, count)[block]
        row[passed] = block * BLOCK + np.argmax(within > missing[:, None], axis=1)
    return first


def _operating_points(fps: float | Sequence[float]) -> np.ndarray:
    fps = np.asarray(fps, np.float64)
    if not np.all(fps >= 0):
        raise ValueError(f"fps must be >= 0 false positives per image, got {fps.tolist()}")
    return fps


def _mask(name: str, chosen: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    chosen = np.asarray(chosen)
    if chosen.dtype != bool or chosen.shape != shape:
        raise ValueError(
            f"chosen must be one bool for each of the {shape[0]} {name}, got {chosen.dtype} of "
            f"shape {chosen.shape}"
        )
    return chosen


def _falling(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``np.argsort(-scores, kind="stable")``, several times faster, and the scores so ordered."""
    order = np.argsort(-scores)
    ordered = scores[order]
    # The quick sort leaves ties in any order. Number the distinct scores from the highest on and
    # sort by number, then place; in place, since fresh memory costs as much as the arithmetic.
    key = np.zeros(len(order), np.int64)
    np.cumsum(ordered[1:] != ordered[:-1], out=key[1:])
    key *= len(order)
    order += key
    order.sort()
    order -= key
    return order, ordered


def _concatenate(
    name: str, per_image: Sequence[np.ndarray], columns: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """All boxes, (columns, n) float64, and how many each image has, after checking them."""
    arrays = [np.asarray(boxes, np.float64) for boxes in per_image]
    for index, array in enumerate(arrays):
        if array.ndim != 2 or array.shape[1] != len(columns):
            if array.size > 0:
                raise ValueError(
                    f"{name}[{index}] has shape {array.shape}, expected (n, {len(columns)}) with "
                    f"columns {', '.join(columns)}"
                )
            arrays[index] = array.reshape(0, len(columns))
    counts = np.array([len(array) for array in arrays], np.int64)
    boxes = np.empty((len(columns), counts.sum()))
    if arrays:
        np.concatenate(arrays, out=boxes.T)

    x1, y1, x2, y2 = boxes[:4]
    for problem, bad in (
        ("a NaN or infinite number", ~np.isfinite(boxes)),
        ("a box with x2 < x1 or y2 < y1", np.stack([x2 < x1, y2 < y1])),
    ):
        if bad.any():
            place = int(np.argmax(bad.any(axis=0)))
            index = int(np.searchsorted(np.cumsum(counts), place, side="right"))
            raise ValueError(f"{name}[{index}] holds {problem}: {boxes[:, place].tolist()}")
    return boxes, counts
