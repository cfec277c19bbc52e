"""How near masks drawn from RECIST diameters come to a phantom's true ones."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np

from deeplesion.data.coco import read_json
from deeplesion.data.dl_info import read_dl_info
from deeplesion.data.recist import (
    ellipse_from_recist,
    mask_from_recist,
    quadrilateral_from_recist,
    released_mask_from_recist,
)
from deeplesion.data.slices import SliceFolder

SIZES = {"< 10 mm": (0, 10), "10-30 mm": (10, 30), "> 30 mm": (30, np.inf)}
SHAPES = {
    "round, elliptic": ("round", "elliptic"),
    "lobulated": ("lobulated",),
    "irregular": ("irregular",),
    "spiculated": ("spiculated",),
}


METHODS = {
    "mask_from_recist": mask_from_recist,
    "GrabCut as released": released_mask_from_recist,
    "ellipse": lambda hu, bbox, recist: ellipse_from_recist(recist, hu.shape),
    "quadrilateral": lambda hu, bbox, recist: quadrilateral_from_recist(recist, hu.shape),
}


def ious_by_group(root: Path) -> dict[str, list[list[float]]]:
    """Group -> one row a lesion that is not flagged noisy: the IoU of each method."""
    truth_file = root / "phantom_truth" / "truth.json"
    if not truth_file.is_file():
        raise FileNotFoundError(
            f"{truth_file} not found: ROOT must be a phantom, whose true masks are known; write one"
            f" with python tools/make_phantom.py {root}"
        )
    truth = read_json(truth_file, "the truth of a phantom")
    slices = SliceFolder(root / "Images_png")
    groups = defaultdict(list)
    for file_name, lesions in read_dl_info(root / "DL_info.csv").groupby("file_name", sort=False):
        hu = slices.read(file_name)
        labels = cv2.imread(
            str(root / "phantom_truth" / "masks" / file_name.replace("/", "_")),
            cv2.IMREAD_UNCHANGED,
        )
        # Rows are in the order of the truth, without the lesions that have no label.
        outlines = [
            (number, outline)
            for number, outline in enumerate(truth[file_name]["lesions"], start=1)
            if outline.get("labelled", True)
        ]
        for (number, outline), lesion in zip(outlines, lesions.itertuples(), strict=True):
            if lesion.noisy:
                continue
            true = labels == number
            masks = [method(hu, lesion.bbox, lesion.recist) for method in METHODS.values()]
            row = [(mask & true).sum() / (mask | true).sum() for mask in masks]
            long_mm = outline["diameters_mm"][0]
            groups["all"].append(row)
            for name, (low, high) in SIZES.items():
                if low <= long_mm < high:
                    groups[name].append(row)
            for name, shapes in SHAPES.items():
                if outline["shape"] in shapes:
                    groups[name].append(row)
    return groups
