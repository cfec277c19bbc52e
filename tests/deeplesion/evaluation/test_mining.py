"""Mining of unlabelled lesions against plain loops, what is written of them, and how they are
judged by a truth."""

import json

import numpy as np
import pytest

from deeplesion.data.annotation_check import annotation_problems
from deeplesion.data.coco import encode_mask, read_annotations
from deeplesion.errors import DataError
from deeplesion.evaluation.mining import Judged, Mined, judge, mine, share_of_smaller, with_mined

SIDE = 100


def annotations_of(boxes_of_images):
    """A file with the lesions x1, y1, x2, y2 of each image, the ids of images no row of numbers."""
    images, annotations = [], []
    for i, boxes in enumerate(boxes_of_images):
        images.append(dict(id=7 * i + 3, file_name=f"a/{i:03d}.png", height=SIDE, width=SIDE))
        for x1, y1, x2, y2 in boxes:
            number = 2 * len(annotations) + 5
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(dict(id=number, image_id=7 * i + 3, category_id=4, bbox=box))
    categories = [dict(id=4, name="lesion")]
    return dict(images=images, annotations=annotations, categories=categories, info=dict(a=1))


def record(number, boxes, scores, masks=None):
    found = dict(file_name=f"a/{number:03d}.png", boxes=boxes, scores=scores)
    return found if masks is None else {**found, "masks": masks}


def square(x1, y1, x2, y2):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return encode_mask(mask)


def random_case(seed, images=6):
    rng = np.random.default_rng(seed)

    def boxes(most):
        corner = rng.uniform(0, 70, (rng.integers(most), 2))
        return np.hstack([corner, corner + rng.uniform(5, 29, corner.shape)]).round(3).tolist()

    annotations = annotations_of([boxes(4) for _ in range(images)])
    records = []
    for number in rng.permutation(images).tolist():
        found = boxes(30)
        records.append(record(number, found, rng.uniform(0, 1, len(found)).round(2).tolist()))
    return annotations, records


def share(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("score", [0.2, 0.5, 0.9])
def test_mined_are_those_of_a_plain_loop(seed, score):
    annotations, records = random_case(seed)
    expected = []
    for image in annotations["images"]:
        (own,) = (r for r in records if r["file_name"] == image["file_name"])
        taken = [
            [a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]
            for a in annotations["annotations"]
            if a["image_id"] == image["id"]
        ]
        for found, box in sorted(zip(own["scores"], own["boxes"]), key=lambda pair: -pair[0]):
            if found >= score and all(share(box, other) <= 0.3 for other in taken):
                taken.append(box)
                expected.append((image["file_name"], found, box))
    mined = mine(records, annotations, score)
    assert [(m.file_name, m.score, m.box.tolist()) for m in mined] == expected
    assert len(expected) > 0 or score == 0.9


def test_a_part_of_a_lesion_and_a_box_around_it_are_nothing_new():
    annotations = annotations_of([[(40, 40, 60, 60)]])
    part, around, beside = [42, 42, 50, 50], [20, 20, 80, 80], [58, 40, 78, 60]
    mined = mine([record(0, [part, around, beside], [0.9, 0.8, 0.7])], annotations, 0.5)
    assert [m.box.tolist() for m in mined] == [beside]  # a tenth of it is the lesion's


def test_edges_of_what_is_taken():
    annotations = annotations_of([[], []])
    records = [
        record(0, [[1, 1, 9, 9], [20, 20, 30, 30], [50, 50, 50, 60]], [0.5, 0.4999, 0.9]),
        record(1, [], []),
    ]
    mined = mine(records, annotations, 0.5)
    assert [m.box.tolist() for m in mined] == [[1, 1, 9, 9]]  # 0.5 is enough, no width is not
    with pytest.raises(DataError, match=r"there are none of a/001\.png"):
        mine(records[:1], annotations, 0.5)
    assert share_of_smaller(np.array([1.0, 1, 1, 5]), np.array([[0.0, 0, 9, 9]])).tolist() == [0]


def test_regions_to_ignore_are_no_labels():
    annotations = annotations_of([[(40, 40, 60, 60)]])
    annotations["annotations"][0]["iscrowd"] = 1
    assert len(mine([record(0, [[40, 40, 60, 60]], [0.9])], annotations, 0.5)) == 1


@pytest.mark.parametrize("kind", ["ignored", "labels"])
def test_the_new_file_is_the_old_one_and_what_was_mined(kind, tmp_path):
    annotations = annotations_of([[(40, 40, 60, 60)], []])
    before = json.dumps(annotations)
    whole = square(5, 5, 14, 14)
    mined = [
        Mined("a/000.png", 0.8, np.array([4.5, 4.5, 14.5, 15.125]), whole),
        Mined(
            "a/001.png", 0.7, np.array([-0.5, 50, 20, 99.5]), encode_mask(np.zeros((SIDE, SIDE)))
        ),
        Mined("a/001.png", 0.6, np.array([60, 60, 70, 80]), square(60, 60, 69, 79)),
    ]
    content = with_mined(annotations, mined, kind, dict(score=0.6))
    assert json.dumps(annotations) == before
    assert content["images"] == annotations["images"]
    assert content["annotations"][:1] == annotations["annotations"]
    new = content["annotations"][1:]
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
    labels = kind == "labels"  # one without a pixel is no lesion to learn a mask of
    assert [a["score"] for a in new] == ([0.8, 0.6] if labels else [0.8, 0.7, 0.6])
    assert [a["image_id"] for a in new] == ([3, 10] if labels else [3, 10, 10])
    assert new[0]["bbox"] == [4.5, 4.5, 10, 10.625]
    assert all(a["category_id"] == 4 and a["iscrowd"] == int(not labels) for a in new)
    assert all(("segmentation" in a) == labels for a in new)
    if labels:
        assert new[0]["segmentation"] == whole and [a["area"] for a in new] == [100, 200]
    assert content["info"] == dict(a=1, mined=dict(kind=kind, number=len(new), score=0.6))
    assert annotation_problems(content["annotations"], content["images"], 4, True) == []
    path = tmp_path / "train_mined.json"
    path.write_text(json.dumps(content))
    assert read_annotations(path, need_lesions=True, regions=True) == content
    if labels:
        assert read_annotations(path) == content
    else:
        with pytest.raises(DataError, match="knows no regions to ignore"):
            read_annotations(path)


def test_a_detector_without_masks_gives_labels_without():
    annotations = annotations_of([[]])
    mined = mine([record(0, [[1, 1, 9, 9]], [0.5])], annotations, 0.5)
    (new,) = with_mined(annotations, mined, "labels", {})["annotations"]
    assert "segmentation" not in new and (new["id"], new["area"]) == (1, 64)
    with pytest.raises(ValueError, match="kind must be one of ignored, labels, got 'label'"):
        with_mined(annotations, mined, "label", {})


def test_judged_by_the_truth():
    """Image 0: a lesion that is labelled, two that are not, a distractor. Image 1: one that is
    not, as a noisy label is not in the file."""
    labelled, hidden, other = (10, 10, 30, 30), (50, 10, 70, 30), (10, 50, 30, 70)
    distractor, far = (50, 50, 70, 70), (80, 80, 95, 95)
    annotations = annotations_of([[labelled], []])
    # Labels are read off, up to a pixel beside the truth.
    truth = {
        "a/000.png": dict(
            lesions=[dict(bbox=[11, 10, 31, 30]), dict(bbox=hidden), dict(bbox=other)],
            distractors=[dict(bbox=distractor)],
        ),
        "a/001.png": dict(lesions=[dict(bbox=hidden)], distractors=[]),
        "a/999.png": dict(lesions=[dict(bbox=hidden)], distractors=[]),  # no key slice any more
    }
    mined = [
        Mined("a/000.png", 0.9, np.array(hidden, float), None),
        Mined("a/000.png", 0.8, np.array(distractor, float), None),
        Mined("a/000.png", 0.7, np.array(far, float), None),
        Mined("a/000.png", 0.7, np.array(hidden, float) + 2, None),  # the same lesion again
        Mined("a/001.png", 0.6, np.array(hidden, float), None),
    ]
    judged = judge(mined, annotations, truth, [0.6, 0.7, 0.75, 0.95])
    assert judged == [
        Judged(0.6, 5, 2, 1, 3),
        Judged(0.7, 4, 1, 1, 3),
        Judged(0.75, 2, 1, 1, 3),
        Judged(0.95, 0, 0, 0, 3),
    ]
    assert (judged[0].precision, judged[0].recall) == (0.4, 2 / 3)
    assert (judged[3].precision, judged[3].recall) == (None, 0.0)
    assert Judged(0.5, 0, 0, 0, 0).recall is None
    del truth["a/001.png"]
    with pytest.raises(DataError, match=r"truth is of other images: a/001\.png is not in it"):
        judge(mined, annotations, truth, [0.5])
