"""AP50 against COCO's definition written out."""

import numpy as np
import pytest

from deeplesion.data.coco import encode_mask
from deeplesion.evaluation.average_precision import ap50
from deeplesion.evaluation.froc import box_iou


def loop_ap(records, overlap):
    """The definition: greedy matching by score, precision envelope, mean over 101 recalls.

    `overlap(record, d, l)`: IoU of detection d and lesion l.
    """
    outcomes = []  # score, image, whether it is a true positive
    for image, record in enumerate(records):
        free = set(range(len(record["lesions"])))
        order = np.argsort(-np.array(record["scores"]), kind="stable")[:100]
        for d in order:
            found = [(overlap(record, d, j), j) for j in sorted(free)]
            best = max(found, default=(0, None))
            if best[0] >= 0.5:
                free.remove(best[1])
            outcomes.append((record["scores"][d], image, best[0] >= 0.5))
    outcomes.sort(key=lambda outcome: -outcome[0])
    hits = np.cumsum([outcome[2] for outcome in outcomes])
    recall = hits / sum(len(r["lesions"]) for r in records)
    precision = hits / np.arange(1, len(hits) + 1)
    at = [precision[recall >= r - 1e-12].max(initial=0) for r in np.linspace(0, 1, 101)]
    return 100 * np.mean(at)


def boxes_overlap(record, d, j):
    a, b = np.array(record["boxes"][d]), np.array(record["lesions"][j]["bbox"])
    return float(box_iou(a, b, pixel_offset=0))


def mask_of(box):
    mask = np.zeros((64, 64), bool)
    x1, y1, x2, y2 = (int(v) for v in box)
    mask[y1:y2, x1:x2] = True
    return mask


def random_records(masks):
    rng = np.random.default_rng(3)
    records = []
    for _ in range(25):
        lesions, boxes = [], []
        for x in rng.choice([2, 24, 44], rng.integers(0, 3), replace=False):
            box = np.array([x, 10, x + 14, 10 + rng.integers(8, 20)], float)
            lesions.append(box.tolist())
            boxes += [(box + rng.integers(-3, 4, 4)).clip(0, 63).tolist() for _ in range(2)]
        boxes += [[x, 45.0, x + 9, 60.0] for x in rng.uniform(0, 50, 3).round()]
        record = dict(
            height=64,
            width=64,
            lesions=[
                dict(bbox=b, mask=encode_mask(mask_of(b)) if masks else None) for b in lesions
            ],
            boxes=boxes,
            scores=rng.permutation(1000)[: len(boxes)] / 1000,
        )
        record["scores"] = record["scores"].tolist()
        if masks:
            record["masks"] = [encode_mask(mask_of(b)) for b in boxes]
        records.append(record)
    return records


def test_boxes_equal_the_definition():
    records = random_records(masks=False)
    found = ap50(records)
    assert found["segm"] is None
    assert found["bbox"] == pytest.approx(loop_ap(records, boxes_overlap))
    assert 10 < found["bbox"] < 90


def test_masks_equal_the_definition():
    def masks_overlap(record, d, j):
        a, b = mask_of(record["boxes"][d]), mask_of(record["lesions"][j]["bbox"])
        return (a & b).sum() / max((a | b).sum(), 1)

    records = random_records(masks=True)
    assert ap50(records)["segm"] == pytest.approx(loop_ap(records, masks_overlap))


def test_widths_are_without_the_pixel_of_the_old_tables():
    record = dict(height=64, width=64, scores=[0.5], lesions=[dict(bbox=[0.0, 0, 9, 9])])
    # IoU 0.51 and 0.49; with a pixel more both would be above 0.5.
    assert ap50([{**record, "boxes": [[0.0, 0, 9, 4.6]]}])["bbox"] == pytest.approx(100)
    assert ap50([{**record, "boxes": [[0.0, 0, 9, 4.4]]}])["bbox"] == 0


def test_only_the_best_hundred_of_an_image_count():
    (record, *_) = (r for r in random_records(masks=False) if r["lesions"])
    record["boxes"] = [[50.0, 50, 60, 60]] * 100 + [record["lesions"][0]["bbox"]]
    record["scores"] = [0.9] * 100 + [0.1]
    assert ap50([record])["bbox"] == 0
    record["scores"][-1] = 0.95
    assert ap50([record])["bbox"] > 0


def test_perfect_and_empty_results(capsys):
    records = random_records(masks=False)
    for record in records:
        record["boxes"] = [x["bbox"] for x in record["lesions"]]
        record["scores"] = [0.5] * len(record["boxes"])
    assert ap50(records)["bbox"] == pytest.approx(100)
    for record in records:
        record["boxes"], record["scores"] = [], []
    assert ap50(records)["bbox"] == 0
    assert capsys.readouterr().out == ""
