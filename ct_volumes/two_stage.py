"""What a two-stage detector does between and after its networks, in NumPy: anchors and their
scores become proposals, scores of proposals become boxes, small masks become those of a slice.

Everything is float32 and in the order of MMDetection's operations, so that results are the same to
the networks' rounding. The options are those of an export's manifest (`ct_volumes.export_format`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ct_volumes.lesions import Patch
from ct_volumes.nms import first_kept


def proposals(
    logits: np.ndarray, deltas: np.ndarray, shape: tuple[int, int], options: Mapping
) -> np.ndarray:
    """The boxes that the second stage looks at, by falling score.

    Args:
        logits: (h, w, A) of the A anchors at every place of the map.
        deltas: (h, w, 4 A).
        shape: (height, width) of the image without its padding, to which boxes are clipped.
        options: 'stride', 'base_anchors' (A, 4) of the map's first place, 'nms_pre', 'max_per_img',
            'iou_threshold', 'min_size', and those of `decoded`.

    Returns (n, 4) float32.
    """
    _, width, anchors_each = logits.shape
    scores = sigmoid(logits).ravel()
    best = falling(scores, options["nms_pre"])
    place, anchor = np.divmod(best, anchors_each)
    y, x = np.divmod(place, width)
    corner = np.stack([x, y, x, y], axis=1).astype(np.float32) * np.float32(options["stride"])
    anchors = np.asarray(options["base_anchors"], np.float32)[anchor] + corner
    boxes = decoded(anchors, deltas.reshape(-1, 4)[best], shape, options)
    if options["min_size"] is not None:
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2] > options["min_size"]).all(1)]
    return boxes[first_kept(boxes, options["iou_threshold"], options["max_per_img"])]


def best_boxes(
    regions: np.ndarray,
    logits: np.ndarray,
    deltas: np.ndarray,
    shape: tuple[int, int],
    options: Mapping,
    score_thr: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the box head makes of the proposals, by falling score.

    Args:
        regions: (n, 4) proposals.
        logits: (n, K + 1) of the K classes, the last of the background.
        deltas: (n, 4 K), or (n, 4) for all classes.
        shape: as of `proposals`.
        options: 'max_per_img', 'iou_threshold', and those of `decoded`.
        score_thr: what does not score more is left out.

    Returns (m, 4) float32 boxes, (m,) float32 scores and (m,) classes.
    """
    classes = logits.shape[1] - 1
    scores = softmax(logits)[:, :-1]
    each = deltas.shape[1] // 4
    boxes = decoded(np.repeat(regions, each, 0), deltas.reshape(-1, 4), shape, options)
    boxes = np.broadcast_to(boxes.reshape(len(regions), each, 4), (len(regions), classes, 4))
    boxes, scores = boxes.reshape(-1, 4), scores.ravel()
    labels = np.tile(np.arange(classes), len(regions))
    above = np.flatnonzero(scores > np.float32(score_thr))
    above = above[np.argsort(-scores[above], kind="stable")]
    boxes, scores, labels = boxes[above], scores[above], labels[above]
    # Boxes of different classes suppress none of each other: they are moved apart.
    apart = labels.astype(np.float32) * (boxes.max(initial=0) + np.float32(1))
    most = options["max_per_img"] if options["max_per_img"] > 0 else len(boxes)
    kept = first_kept(boxes + apart[:, None], options["iou_threshold"], most)
    return boxes[kept], scores[kept], labels[kept]


def decoded(
    boxes: np.ndarray, deltas: np.ndarray, shape: tuple[int, int], options: Mapping
) -> np.ndarray:
    """(n, 4) boxes moved and scaled by (n, 4) deltas (R-CNN, CVPR 2014, appendix C).

    `options`: 'means', 'stds' of the deltas; 'ratio_clip', the most that a side is scaled by; and
    'clip': 'edges' of the image, or 'pixels', which leaves of a box outside of it the pixels at its
    border (the geometry of mmdet 1.x).
    """
    means, stds = (np.asarray(options[name], np.float32) for name in ("means", "stds"))
    deltas = deltas * stds + means
    centre = (boxes[:, :2] + boxes[:, 2:]) * np.float32(0.5)
    size = boxes[:, 2:] - boxes[:, :2]
    most = np.float32(abs(np.log(options["ratio_clip"])))
    centre = centre + size * deltas[:, :2]
    half = size * np.exp(deltas[:, 2:].clip(-most, most)) * np.float32(0.5)
    found = np.concatenate([centre - half, centre + half], axis=1)
    end = np.float32([shape[1], shape[0]] * 2)
    one = np.float32([0, 0, 1, 1] if options["clip"] == "pixels" else [0] * 4)
    return found.clip(one, end - one[::-1])


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(100) is infinite, and 1 / infinity is right
        return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def falling(scores: np.ndarray, most: int) -> np.ndarray:
    """The numbers of the highest scores by falling score, at most `most` (0 or less: all); of equal
    ones the first."""
    if 0 < most < len(scores):
        least = np.partition(scores, len(scores) - most)[len(scores) - most]
        numbers = np.flatnonzero(scores >= least)
    else:
        numbers, most = np.arange(len(scores)), len(scores)
    return numbers[np.argsort(-scores[numbers], kind="stable")][:most]


def pasted(
    mask: np.ndarray, box: np.ndarray, field: tuple[int, int], shape: tuple[int, int], least: float
) -> Patch:
    """The pixels of a slice where a mask, stretched over its box, is at least `least`.

    Args:
        mask: (m, m) float32, 0 to 1.
        box: (4,) float32 by pixel edges.
        field: (rows, columns) of the slice with the air added to it.
        shape: (rows, columns) of the slice.
    """
    sides = []
    for axis in (0, 1):
        first, last = box[axis], box[2 + axis]
        start = max(int(np.floor(first)) - 1, 0)
        end = min(int(np.ceil(last)) + 1, field[1 - axis], shape[1 - axis])
        sides.append((start, _bilinear(start, end, first, last, mask.shape[1 - axis])))
    (x, across), (y, down) = sides
    part = Patch.of(down @ mask @ across.T >= least)
    return Patch(part.x + x, part.y + y, part.mask) if part.mask.size else part


def _bilinear(start: int, end: int, first: np.float32, last: np.float32, length: int) -> np.ndarray:
    """(end - start, length): what each pixel takes of each cell of a mask that lies from `first` to
    `last`; nothing is beyond its cells (PyTorch's `grid_sample`, align_corners=False)."""
    pixel = np.arange(start, end, dtype=np.float32) + np.float32(0.5)
    with np.errstate(divide="ignore"):
        at = (pixel - first) / (last - first) * 2 - 1
    at[np.isinf(at)] = 0
    cell = ((at + 1) * length - 1) / 2
    return np.maximum(0, 1 - np.abs(cell[:, None] - np.arange(length, dtype=np.float32)))
