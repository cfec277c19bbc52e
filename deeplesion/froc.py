"""FROC, the measure of the DeepLesion benchmark: sensitivity against false positives per image.

From boxes and scores to the curve and the operating points that every published table quotes.
Needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

TABLE_FPS = (0.5, 1, 2, 4, 8, 16)
SCORE_FPS = (0.5, 1, 2, 4)


@dataclass(frozen=True, eq=False)
class FROC:
    """A FROC curve: one point a detection, from the highest score to the lowest.

    Attributes:
        thresholds: (n,) scores, falling; point i of the curve counts detections 0..i.
        images: (n,) which image each detection is of.
        false_positives: (n,) bool, reaches no lesion.
        lesion_images: (m,) which image each lesion is of, in input order.
        hit_at: (m,) the point of the curve at which each lesion is hit, n if it never is.
        weights: (images,) int, how many times each image counts: 1, or 0 for those left out.
    """

    thresholds: np.ndarray
    images: np.ndarray
    false_positives: np.ndarray
    lesion_images: np.ndarray
    hit_at: np.ndarray
    weights: np.ndarray

    def of_images(self, chosen: np.ndarray) -> FROC:
        """The curve of some of the images alone: their detections, their lesions.

        For what is a property of an image, such as its slice thickness.

        Args:
            chosen: (images,) bool.
        """
        return replace(self, weights=self.weights * _mask("images", chosen, self.weights.shape))

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
        return int(self.weights.sum())

    @property
    def num_lesions(self) -> int:
        """Lesions in all images together."""
        return int(self.weights[self.lesion_images].sum())

    @cached_property
    def fps_per_image(self) -> np.ndarray:
        """(n,) false positives per image, rising."""
        return np.cumsum(self.false_positives * self.weights[self.images]) / self.num_images

    @cached_property
    def sensitivity(self) -> np.ndarray:
        """(n,) fraction of the lesions hit, rising."""
        points = len(self.thresholds)
        hits = np.bincount(self.hit_at, self.weights[self.lesion_images], points + 1)[:points]
        return np.cumsum(hits) / self.num_lesions

    def sensitivity_at(self, fps: float | Sequence[float] = TABLE_FPS) -> np.ndarray:
        """Sensitivity at given false positives per image, in the shape of ``fps``.

        Linear between the points of the curve, from (0, 0) before its first point, and the last
        sensitivity beyond its last. Where hits raise the curve without a false positive (one x,
        several points) the highest of them counts.

        Raises:
            ValueError: an operating point is negative or NaN.
        """
        # np.interp takes, of points that share an x, the last at that x and the first when
        # coming from the left: just the limits of a curve that is drawn point by point.
        x, y = np.append(0.0, self.fps_per_image), np.append(0.0, self.sensitivity)
        return np.interp(_operating_points(fps), x, y)

    @property
    def score(self) -> float:
        """Mean sensitivity at 0.5, 1, 2 and 4 false positives per image ("Avg." of the papers)."""
        return float(self.sensitivity_at(SCORE_FPS).mean())

    def bootstrap(
        self,
        groups: Sequence,
        fps: Sequence[float] = TABLE_FPS,
        number: int = 1000,
        seed: int = 0,
    ) -> np.ndarray:
        """Sensitivities in image sets drawn from this one with replacement, (number, len(fps)).

        Groups of images are drawn as a whole, as many as there are: give the patients, because the
        images of one are alike (see `patients`...). The 95 % interval of the sensitivities:
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
        if groups.shape != self.weights.shape:
            raise ValueError(
                f"groups has shape {groups.shape}, expected one label for each of the "
                f"{len(self.weights)} images"
            )
        fps = _operating_points(fps)
        labels, group_of_image = np.unique(groups, return_inverse=True)
        rng = np.random.default_rng(seed)
        rows = np.empty((number, len(fps)))
        for row in rows:
            drawn = rng.integers(len(labels), size=len(labels))
            times = np.bincount(drawn, minlength=len(labels))[group_of_image]
            curve = replace(self, weights=self.weights * times)
            row[:] = curve.sensitivity_at(fps) if curve.num_lesions else np.nan
        return rows


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
    lesions already hit is neither.

    Args:
        detections: one (n, 5) array an image, rows x1, y1, x2, y2, score; in any order.
        ground_truths: one (m, 4) array an image, rows x1, y1, x2, y2, in the same pixels; m may
            be 0.
        iou_threshold: overlap that makes a hit, in (0, 1].
        pixel_offset: added to widths and heights (x2 - x1 + pixel_offset). 1 is what the published
            DeepLesion tables used, 0 is the modern definition.

    Raises:
        ValueError: lists of unequal length, wrong shapes, non-finite numbers, x2 < x1 or y2 < y1
            (the message names the image's place in the list), or no lesion at all.
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
    if len(lesions) == 0:
        raise ValueError(
            f"no lesion in any of the {len(ground_truths)} images: sensitivity is undefined"
        )

    order = np.argsort(-found[:, 4], kind="stable")
    found = found[order]
    image = np.repeat(np.arange(len(detections)), found_per_image)[order]

    # Every (detection, lesion) pair of one image, as two index arrays: detection i meets the
    # lesions first_lesion[image[i]], first_lesion[image[i]] + 1, ...
    first_lesion = np.cumsum(lesions_per_image) - lesions_per_image
    partners = lesions_per_image[image]
    detection = np.repeat(np.arange(len(found)), partners)
    nth_partner = np.arange(len(detection)) - np.repeat(np.cumsum(partners) - partners, partners)
    lesion = first_lesion[image[detection]] + nth_partner

    reached = box_iou(found[detection, :4], lesions[lesion], pixel_offset) >= iou_threshold
    detection, lesion = detection[reached], lesion[reached]

    false_positives = np.ones(len(found), bool)
    false_positives[detection] = False
    hit_at = np.full(len(lesions), len(found))
    np.minimum.at(hit_at, lesion, detection)

    return FROC(
        thresholds=found[:, 4],
        images=image,
        false_positives=false_positives,
        lesion_images=np.repeat(np.arange(len(ground_truths)), lesions_per_image),
        hit_at=hit_at,
        weights=np.ones(len(detections), np.int64),
    )


def box_iou(a: np.ndarray, b: np.ndarray, pixel_offset: float = 1) -> np.ndarray:
    """IoU of boxes (..., 4) with boxes (..., 4), broadcast against each other -> (...).

    Rows are x1, y1, x2, y2; a box is x2 - x1 + pixel_offset wide. 0 where neither has an area.
    """
    corners = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.prod(np.maximum(corners + pixel_offset, 0), axis=-1)
    area_a = np.prod(a[..., 2:] - a[..., :2] + pixel_offset, axis=-1)
    area_b = np.prod(b[..., 2:] - b[..., :2] + pixel_offset, axis=-1)
    union = area_a + area_b - intersection
    return np.divide(intersection, union, out=np.zeros(union.shape), where=union > 0)


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


def _concatenate(
    name: str, per_image: Sequence[np.ndarray], columns: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """All boxes (n, columns) in float64 and how many each image has, after checking them."""
    arrays = []
    for index, boxes in enumerate(per_image):
        array = np.asarray(boxes, np.float64)
        if array.size == 0:
            array = array.reshape(0, len(columns))
        if array.ndim != 2 or array.shape[1] != len(columns):
            raise ValueError(
                f"{name}[{index}] has shape {array.shape}, expected (n, {len(columns)}) with "
                f"columns {', '.join(columns)}"
            )
        arrays.append(array)
    counts = np.array([len(array) for array in arrays], np.int64)
    boxes = np.concatenate([np.zeros((0, len(columns))), *arrays])

    for problem, bad in (
        ("a NaN or infinite number", ~np.isfinite(boxes).all(axis=1)),
        ("a box with x2 < x1 or y2 < y1", (boxes[:, 2:4] < boxes[:, :2]).any(axis=1)),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            index = int(np.searchsorted(np.cumsum(counts), row, side="right"))
            raise ValueError(f"{name}[{index}] holds {problem}: {boxes[row].tolist()}")
    return boxes, counts
