"""RoIAlign in NumPy, of one image: what lies between the programs of an exported detector."""

from __future__ import annotations

import numpy as np


def roi_align(
    features: np.ndarray,
    boxes: np.ndarray,
    bins: int,
    scale: float,
    sampling_ratio: int,
    aligned: bool = True,
) -> np.ndarray:
    """Average of bilinear samples in each bin of each box (Mask R-CNN, ICCV 2017, section 3).

    A sample's weights are the product of weights along y and along x, so a box is two matrix
    products with the part of the map that it reads.

    Args:
        features: (H, W, C) float32.
        boxes: (n, 4) float32 x1, y1, x2, y2 before `scale`; they end where they begin or later.
        bins: along each axis.
        sampling_ratio: samples along each side of a bin; 0: as many as a bin is long, rounded up.
        aligned: pixel centres at 0.5; otherwise at 0, and boxes are at least one pixel long.

    Returns:
        (n, C, bins, bins) float32.
    """
    height, width, channels = features.shape
    boxes = boxes * np.float32(scale) - np.float32(0.5 if aligned else 0)
    start, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        size = np.maximum(size, np.float32(1))
    along_x, along_y = (
        axis_weights(start[:, axis], size[:, axis], bins, sampling_ratio, length)
        for axis, length in enumerate((width, height))
    )
    out = np.zeros((len(boxes), bins, bins, channels), np.float32)
    for of_box, y_weights, x_weights in zip(out, along_y, along_x):
        rows, columns = _read(y_weights), _read(x_weights)
        part = features[rows, columns]
        of_rows = np.tensordot(y_weights[:, rows], part, axes=1)  # (bins, columns, C)
        np.matmul(x_weights[:, columns], of_rows, out=of_box)
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def axis_weights(
    start: np.ndarray, size: np.ndarray, bins: int, sampling_ratio: int, length: int
) -> np.ndarray:
    """What each bin takes of each pixel along one axis.

    Args:
        start, size: (n,) float32 of the boxes, in pixels of the map.
        length: pixels of the map.

    Returns:
        (n, bins, length) float32, which add up to at most 1 in each bin.
    """
    number = len(start)
    step = (size / np.float32(bins)).reshape(-1, 1, 1)
    grid = np.full_like(step, sampling_ratio) if sampling_ratio > 0 else np.ceil(step)
    bin_ = np.arange(bins, dtype=np.float32).reshape(-1, 1)
    sample = np.arange(max(1, int(grid.max(initial=1))), dtype=np.float32)
    # The order of the operations is mmcv's: whether a sample is out of the map hangs on the last
    # bit. A box without size has no samples along it.
    with np.errstate(invalid="ignore", divide="ignore"):
        position = start.reshape(-1, 1, 1) + bin_ * step + (sample + np.float32(0.5)) * step / grid
    # A sample up to one pixel out of the map takes the border's value, one beyond it is 0.
    inside = (position >= -1) & (position <= length) & (sample < grid)
    position = np.where(inside, position.clip(0, length - 1), np.float32(0))
    low = np.floor(position)
    fraction = position - low
    share = (inside / np.maximum(grid, 1)).astype(np.float32)
    weights = np.zeros((number * bins, length), np.float32)
    row = np.arange(number * bins).reshape(number, bins, 1)
    for pixel, weight in ((low, share * (1 - fraction)), (low + 1, share * fraction)):
        pixel = np.minimum(pixel, length - 1).astype(np.int64)
        np.add.at(weights, (np.broadcast_to(row, pixel.shape), pixel), weight)
    return weights.reshape(number, bins, length)


def _read(weights: np.ndarray) -> slice:
    """From the first to the last pixel that any bin takes something of."""
    pixels = np.flatnonzero(weights.any(axis=0))
    return slice(pixels[0], pixels[-1] + 1) if len(pixels) else slice(0)
