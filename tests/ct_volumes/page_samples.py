"""A small scan and lesions for the tests of report.html, and what a written page holds."""

import json
import re
from pathlib import Path

import numpy as np

from ct_volumes.lesions import Algorithm, Lesion, LesionSlice, Patch
from ct_volumes.volume import CTVolume, Instance, Source

ALGORITHM = Algorithm(
    "alignshift <b>", "1.2", "ab12" * 16, {"interval_mm": 2.0, "calibration": "/home/doe/fp.json"}
)
SPACING = (0.9, 0.6)
STEPS = [1.0] * 12 + [2.5] * 11


def scan(hu=None, tilt=0.1, steps=STEPS):
    """Oblong pixels, uneven spacing, and a tilted gantry."""
    if hu is None:
        hu = np.random.default_rng(0).normal(0, 60, (24, 120, 150)).astype(np.int16)
        hu[:, :, 75:] -= 800
    below = np.append(0, np.cumsum(steps))[: len(hu)]
    origins = np.stack([0 * below - 45, tilt * below - 54, 300 - below], axis=1)
    source = Source(
        Path("/data/DOE^JANE 4711"), "dicom", hu.shape,
        instances=(Instance(Path("/data/DOE^JANE 4711/1.dcm"), "1.2"),),
        series_uid="1.2.826.99", description="Chest of Jane", kernel="B30f",
        notes=("a gap </script> after /data/DOE^JANE 4711/1.dcm",),
    )  # fmt: skip
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), SPACING, source)


def lesion(volume, first, last, centre, radius, score=0.5, interpolated=()):
    """A disc of `radius` mm on each slice; the middle one is measured and has the best score."""
    y, x = np.indices(volume.hu.shape[1:])
    mask = np.hypot((x - centre[0]) * SPACING[1], (y - centre[1]) * SPACING[0]) <= radius
    patch, middle = Patch.of(mask), (first + last) // 2
    height, width = patch.mask.shape
    box = np.array([patch.x, patch.y, patch.x + width - 1, patch.y + height - 1], float)
    slices = tuple(
        LesionSlice(k, box, None if k in interpolated else score - abs(k - middle) / 50, patch)
        for k in range(first, last + 1)
    )
    dx, dy = radius / SPACING[1], 0.5 * radius / SPACING[0]
    recist = np.add([[-dx, 0], [dx, 0], [0, -dy], [0, dy]], centre)
    index = np.arange(first, last + 1)
    centroid = volume.to_world(*centre, index).mean(0)
    volume_mm3 = mask.sum() * np.prod(SPACING) * volume.extent_mm[index].sum()
    return Lesion(
        score, slices, volume_mm3, centroid, recist, middle, np.array([2.0, 1.0]) * radius
    )


def some_lesions(volume):
    """Not in the order of their scores."""
    return [
        lesion(volume, 10, 14, (40, 50), 4, 0.6, interpolated=(11,)),
        lesion(volume, 2, 5, (120, 30), 7, 0.9),
        lesion(volume, 12, 16, (46, 58), 3, 0.3),
    ]


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def crop_of(volume, crop):
    columns = crop["x"] + crop["stride"] * np.arange(crop["width"])
    rows = crop["y"] + crop["stride"] * np.arange(crop["height"])
    return volume.hu[np.ix_(crop["slices"], rows, columns)]
