"""Lesions that nobody has labelled: a teacher's confident detections on the training images that no
label explains, as regions to ignore or as labels of a second round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from deeplesion.data.annotation_check import is_ignored
from deeplesion.data.coco import encode_mask
from deeplesion.errors import DataError
from deeplesion.evaluation.froc import box_iou
from deeplesion.evaluation.matching import match

KINDS = ("ignored", "labels")
# Two boxes are of one lesion if they share more than this of the smaller one: a part of a labelled
# lesion, or a box around it and its neighbourhood, is nothing new.
SAME_LESION = 0.3
HIT_IOU = 0.5


class Mined(NamedTuple):
    """A detection that is taken for an unlabelled lesion.

    `box`: (4,) x1, y1, x2, y2 in pixel centres of the image's file; `mask`: COCO run lengths or
    None.
    """

    file_name: str
    score: float
    box: np.ndarray
    mask: dict | None


class Judged(NamedTuple):
    """What mined lesions of at least `score` are in truth.

    Attributes:
        mined: how many there are.
        lesions: how many unlabelled lesions they hit; a second one on the same lesion hits none.
        distractors: how many of the others hit a distractor.
        unlabelled: how many unlabelled lesions the key slices have.
    """

    score: float
    mined: int
    lesions: int
    distractors: int
    unlabelled: int

    @property
    def precision(self) -> float | None:
        """Of what was mined, the share that is a lesion; None if nothing was."""
        return self.lesions / self.mined if self.mined else None

    @property
    def recall(self) -> float | None:
        """Of the unlabelled lesions, the share that was mined; None if there are none."""
        return self.lesions / self.unlabelled if self.unlabelled else None


def mine(records: Sequence[dict], annotations: dict, score: float) -> list[Mined]:
    """The detections of at least `score` that lie on no labelled lesion, by image and falling
    score.

    Of several on one another (`SAME_LESION`) the best is taken.

    Args:
        records: a teacher's detections on the images of `annotations`, see `write_results`.
        annotations: what `read_annotations` returns, without regions to ignore.
        score: from 0 to 1.

    Raises DataError if there are no detections of some image.
    """
    record_of = {record["file_name"]: record for record in records}
    labelled = labelled_boxes(annotations)
    found = []
    for image in annotations["images"]:
        name = image["file_name"]
        if name not in record_of:
            raise DataError(f"the detections are of other images: there are none of {name}")
        record = record_of[name]
        boxes, scores = np.array(record["boxes"], float).reshape(-1, 4), record["scores"]
        masks, taken = record.get("masks"), labelled[image["id"]]
        for i in np.argsort(-np.array(scores, float), kind="stable").tolist():
            if scores[i] < score:
                break
            empty = (boxes[i, 2:] <= boxes[i, :2]).any()
            if empty or (share_of_smaller(boxes[i], taken) > SAME_LESION).any():
                continue
            taken = np.vstack([taken, boxes[i]])
            found.append(Mined(name, float(scores[i]), boxes[i], masks[i] if masks else None))
    return found


def labelled_boxes(annotations: dict) -> dict[Any, np.ndarray]:
    """Image id -> (n, 4) x1, y1, x2, y2 of its lesions."""
    boxes: dict[Any, list] = {image["id"]: [] for image in annotations["images"]}
    for annotation in annotations["annotations"]:
        if not is_ignored(annotation):
            x, y, width, height = annotation["bbox"]
            boxes[annotation["image_id"]].append([x, y, x + width, y + height])
    return {key: np.array(found, float).reshape(-1, 4) for key, found in boxes.items()}


def share_of_smaller(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area that a box (4,) has in common with others (n, 4), as a share of the smaller one."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.maximum(high - low, 0).prod(1)
    smaller = np.minimum((box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(1))
    return np.divide(common, smaller, out=np.zeros(len(others)), where=smaller > 0)


def with_mined(annotations: dict, mined: Sequence[Mined], kind: str, note: dict) -> dict:
    """The annotation file of a second round: that of the first, and what was mined at its end.

    Args:
        kind: 'ignored' makes them regions to ignore (`iscrowd` 1), which `DeepLesionDataset` hands
            on to the detector; 'labels' makes them lesions with the teacher's masks. One of these
            whose mask is empty is left out.
        note: goes to `info.mined`, with the kind and the number of them.

    A mined annotation carries its `score`, and neither RECIST nor diameters.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    ids = {image["file_name"]: image["id"] for image in annotations["images"]}
    category = annotations["categories"][0]["id"]
    first = max((a["id"] for a in annotations["annotations"]), default=0) + 1
    added = []
    for each in mined:
        x1, y1, x2, y2 = each.box.tolist()
        new = dict(
            id=first + len(added),
            image_id=ids[each.file_name],
            category_id=category,
            bbox=[x1, y1, round(x2 - x1, 5), round(y2 - y1, 5)],
            area=round((x2 - x1) * (y2 - y1), 5),
            iscrowd=int(kind == "ignored"),
            score=each.score,
        )
        if kind == "labels" and each.mask is not None:
            new["segmentation"] = encode_mask(each.mask)
            new["area"] = int(coco_mask.area(new["segmentation"]))
            if not new["area"]:
                continue
        added.append(new)
    info = annotations.get("info")
    info = dict(info if isinstance(info, dict) else {}, mined=dict(kind=kind, number=len(added)))
    info["mined"].update(note)
    return {**annotations, "info": info, "annotations": [*annotations["annotations"], *added]}


def judge(
    mined: Sequence[Mined], annotations: dict, truth: dict, scores: Sequence[float]
) -> list[Judged]:
    """Compares with a phantom's truth, for each of several least scores.

    A lesion counts as unlabelled if no label reaches an IoU of 0.5 with it, the rule of FROC, so
    those that are left out of the table as noisy are, too.

    Args:
        truth: what is in phantom_truth/truth.json.

    Raises DataError if it is of other images.
    """
    labelled = labelled_boxes(annotations)
    unlabelled: dict[str, list[dict]] = {}
    distractors: dict[str, list[dict]] = {}
    for image in annotations["images"]:
        name = image["file_name"]
        try:
            lesions = [dict(bbox=lesion["bbox"]) for lesion in truth[name]["lesions"]]
            distractors[name] = [dict(bbox=each["bbox"]) for each in truth[name]["distractors"]]
        except (KeyError, TypeError, IndexError):
            raise DataError(
                f"the phantom's truth is of other images: {name} is not in it"
            ) from None
        known = labelled[image["id"]]
        unlabelled[name] = [
            lesion
            for lesion in lesions
            if not (box_iou(np.array(lesion["bbox"], float), known) >= HIT_IOU).any()
        ]
    total = sum(map(len, unlabelled.values()))
    judged = []
    for least in scores:
        chosen = [each for each in mined if each.score >= least]
        hits = false = 0
        for name in dict.fromkeys(each.file_name for each in chosen):
            own = [each for each in chosen if each.file_name == name]
            verdicts = verdicts_on(own, unlabelled[name])
            hits += verdicts.count("hit")
            rest = [each for each, verdict in zip(own, verdicts) if verdict != "hit"]
            false += verdicts_on(rest, distractors[name]).count("hit")
        judged.append(Judged(float(least), len(chosen), hits, false, total))
    return judged


def verdicts_on(mined: Sequence[Mined], objects: list[dict]) -> list[str]:
    """What becomes of each by the rule of FROC, see `match`."""
    record = dict(
        boxes=[each.box for each in mined],
        scores=[each.score for each in mined],
        lesions=objects,
    )
    return match(record, HIT_IOU)[0]
