"""How a scanner shows the phantom: a slice of body and findings, blur, noise, whole HU."""

from __future__ import annotations

import math

import cv2
import numpy as np

from deeplesion.phantom.body import Body
from deeplesion.phantom.findings import Finding

NOISE_KERNEL = cv2.getGaussianKernel(7, 0.65, cv2.CV_32F)
BLUR_SIGMA = 0.6  # px
BLUR = cv2.getGaussianKernel(7, BLUR_SIGMA, cv2.CV_32F)  # what cv2.GaussianBlur takes for it


def _ct_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise (size, size) of standard deviation 1 whose neighbours correlate by 0.55, as in CT."""
    white = rng.standard_normal((size + 8, size + 8), dtype=np.float32)
    filtered = cv2.sepFilter2D(white, -1, NOISE_KERNEL, NOISE_KERNEL)
    return filtered[4:-4, 4:-4] / float((NOISE_KERNEL**2).sum())


def render_slice(
    body: Body, z: float, thickness: float, findings: list[Finding]
) -> tuple[np.ndarray, list[tuple[Finding, tuple[slice, slice], np.ndarray, np.ndarray]]]:
    """A noiseless slice at z: body, findings, blur.

    Returns HU (size, size) float32 and, of each finding that is there, (finding, box, opacity,
    passable): in the box it fills opacity * passable of each pixel.
    """
    slab = body.slab(z, thickness)
    hu, filled = compose(slab, z, findings)
    return blurred(hu), filled


def compose(
    slab: tuple[np.ndarray, np.ndarray], z: float, findings: list[Finding]
) -> tuple[np.ndarray, list[tuple[Finding, tuple[slice, slice], np.ndarray, np.ndarray]]]:
    """A slice of the body (see `Body.slab`) with findings, before the blur; as `render_slice`."""
    hu, passable = slab[0].copy(), slab[1]
    filled = []
    for finding in findings:
        section = finding.section(z, finding.is_lesion)
        if section is not None:
            box, opacity, value = section
            hu[box] += opacity * passable[box] * (value - hu[box])
            filled.append((finding, box, opacity, passable[box]))
    return hu, filled


def blurred(hu: np.ndarray) -> np.ndarray:
    """As sharp as the scanner shows it, float32."""
    return cv2.GaussianBlur(hu.astype(np.float32), (0, 0), BLUR_SIGMA)


def draw_spacing(rng: np.random.Generator, size: int) -> float:
    """mm a pixel: DeepLesion's at 512 px, wider for fewer pixels, but not by as much."""
    return round(rng.uniform(0.6, 0.9) * math.sqrt(512 / size), 6)


def draw_noise_level(rng: np.random.Generator, body: Body, thickness: float) -> np.ndarray:
    """Standard deviation of the noise of each pixel (size, size), HU."""
    # A thicker slice counts more photons; fewer pass the middle of the body than its rim.
    sigma = rng.uniform(20, 28) / math.sqrt(thickness)
    return sigma * (0.75 + 0.35 * np.exp(-(body.x**2 + body.y**2)))


def add_noise(rng: np.random.Generator, hu: np.ndarray, level: np.ndarray) -> np.ndarray:
    """A noiseless slice as a scanner stores it: noise, whole HU within its 12 bits."""
    return np.clip(np.rint(hu + level * _ct_noise(rng, len(hu))), -1024, 3071)
