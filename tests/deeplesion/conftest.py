"""Two results on the phantom's lesions, made up, for tests of pictures and pages."""

import json
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from deeplesion.data.coco import encode_mask


def made_up_record(image, annotations, rng, skill):
    """Some of an image's lesions found, a little off, and two boxes beside them."""
    lesions, boxes, masks = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        lesions.append(
            dict(
                bbox=[x, y, x + w, y + h],
                mask=annotation["segmentation"],
                recist=annotation["recist"],
                diameters_mm=annotation["diameters_mm"],
                lesion_type=int(rng.choice([1, 2, 5])),
                lesion_idx=annotation["lesion_idx"],
            )
        )
        if rng.uniform() < skill:
            boxes.append((np.array(lesions[-1]["bbox"]) + rng.uniform(-1, 1, 4)).tolist())
            masks.append(annotation["segmentation"])
    for _ in range(2):
        x, y = rng.integers(5, 90, 2)
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        mask[y + 4 : y + 12, x + 4 : x + 14] = 1
        boxes.append([float(v) for v in (x, y, x + 18, y + 16)])
        masks.append(encode_mask(mask))
    scores = np.concatenate([rng.uniform(0.2, 1, len(boxes) - 2), rng.uniform(0, 0.7, 2)])
    order = np.argsort(-scores)
    return dict(
        file_name=image["file_name"],
        patient=image["patient"],
        slice_range=image["slice_range"],
        height=image["height"],
        width=image["width"],
        spacing_mm=image["spacing_mm"],
        thickness_mm=image["thickness_mm"] or math.nan,
        lesions=lesions,
        boxes=[boxes[i] for i in order],
        scores=scores[order].tolist(),
        masks=[masks[i] for i in order],
    )


@pytest.fixture(scope="session")
def results(phantom):
    """A good and a poor result, under names that no page may take for markup."""
    from deeplesion.evaluation.results import Result

    found = []
    for name, skill, seed in (("A3D <b>7</b> & $x$", 0.9, 0), ("</script>, poor", 0.4, 1)):
        rng = np.random.default_rng(seed)
        records = []
        for split in ("train", "val", "test"):
            content = json.loads((phantom / f"annotations/{split}.json").read_text())
            for image in content["images"]:
                lesions = [a for a in content["annotations"] if a["image_id"] == image["id"]]
                assert all(coco_mask.area(a["segmentation"]) for a in lesions)
                records.append(made_up_record(image, lesions, rng, skill))
        found.append(Result(name, records))
    return found


@pytest.fixture(scope="session")
def evaluations(results):
    """Of these results, with as few resamples as there may be."""
    from deeplesion.evaluation.evaluate import evaluate

    return [evaluate(result, resamples=100) for result in results]
