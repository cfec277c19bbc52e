"""An image moved by a matrix, as training and testing bring every slice to the network's size."""

from __future__ import annotations

import cv2
import numpy as np


def resizing(shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The (2, 3) matrix, in pixel-edge coordinates and (x, y) order, from (height, width) `shape`
    to (height, width) `size`."""
    return np.diag([size[1] / shape[1], size[0] / shape[0], 1.0])[:2]


def warp(
    image: np.ndarray,
    matrix: np.ndarray,
    size: tuple[int, int],
    interpolation: int,
    border: int = cv2.BORDER_REFLECT_101,
) -> np.ndarray:
    """Warps (H, W[, D]) by a matrix in pixel-edge coordinates to (height, width) = `size`."""
    if image.shape[:2] == size and np.array_equal(matrix, np.eye(2, 3)):
        return image
    # cv2 counts pixel centres: half a pixel off before, half a pixel on after.
    centred = matrix.copy()
    centred[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    options = dict(flags=interpolation, borderMode=border)
    parts = [image]
    if image.ndim == 3:
        # What cv2 takes at once: 512 channels, of cubics 4.
        most = 4 if interpolation == cv2.INTER_CUBIC else 512
        parts = np.split(image, range(most, image.shape[2], most), axis=2)
    warped = [
        cv2.warpAffine(np.ascontiguousarray(p), centred, size[::-1], **options) for p in parts
    ]
    whole = np.dstack(warped) if len(warped) > 1 else warped[0]
    return whole.reshape(*size, *image.shape[2:])
