"""What mmdet predicts on a slice -> SliceDetections: pixel centres, masks without what is empty,
only what scores enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ct_volumes.lesions import Patch, SliceDetections
from ct_volumes.slice_detector import on_slice, threshold_for


@contextlib.contextmanager
def only_above(model: nn.Module, score: float) -> Iterator[None]:
    """Within it a two-stage detector leaves out most of what scores less than `score` (`at_least`
    takes the rest) before NMS, and before masks are computed.

    What is left is the same: a box suppresses only those that score less, and only those it keeps
    from being among the most that are returned.
    """
    head = getattr(model, "roi_head", None)
    options = getattr(head, "test_cfg", None)
    if score == 0 or options is None:
        yield
        return
    # mmdet takes what scores more than `score_thr`, compared in float32.
    head.test_cfg = ConfigDict(options, score_thr=threshold_for(options.score_thr, score))
    try:
        yield
    finally:
        head.test_cfg = options


def detections(index: int, found: InstanceData, shape: tuple[int, int]) -> SliceDetections:
    """mmdet's instances, by pixel edges, on a slice of `shape` with air on the right or below ->
    pixel centres; what lies in that air is left out."""
    there, boxes = on_slice(found.bboxes.float().cpu().numpy(), shape)
    masks = None
    if found.get("masks") is not None:
        masks = patches(found.masks[torch.from_numpy(there).to(found.masks.device)], shape)
    scores = found.scores.float().cpu().numpy()[there]
    return SliceDetections(index, boxes, scores, masks)


def patches(masks: Tensor, shape: tuple[int, int]) -> tuple[Patch, ...]:
    """(n, H, W) bool, of which `shape` is the slice -> the parts that are not empty."""
    masks = masks[:, : shape[0], : shape[1]]
    sides = [masks.any(dim=axis).cpu().numpy() for axis in (2, 1)]
    found = []
    for mask, rows, columns in zip(masks, *sides):
        y, x = (
            np.flatnonzero(side)[[0, -1]] if side.any() else (0, -1) for side in (rows, columns)
        )
        # A copy: of a view the whole mask would stay in memory.
        part = mask[y[0] : y[1] + 1, x[0] : x[1] + 1].cpu().numpy().copy()
        found.append(Patch(int(x[0]), int(y[0]), part))
    return tuple(found)
