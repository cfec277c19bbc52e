"""Detections of other tools, in COCO's format."""

import json
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from deeplesion.evaluation.coco_results import is_coco_results, read_coco_results
from deeplesion.evaluation.evaluate import evaluate, froc_table
from deeplesion.evaluation.results import read_results, write_results


@pytest.fixture
def annotations(phantom):
    return phantom / "annotations" / "test.json"


def detections_of(result, content):
    """A result's detections as COCO writes them."""
    numbers = {image["file_name"]: image["id"] for image in content["images"]}
    return [
        dict(
            image_id=numbers[r["file_name"]],
            category_id=1,
            bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]],
            score=score,
            segmentation=mask,
        )
        for r in result.records
        if r["file_name"] in numbers
        for box, score, mask in zip(r["boxes"], r["scores"], r["masks"])
    ]


@pytest.fixture
def content(annotations):
    return json.loads(annotations.read_text())


@pytest.fixture
def found(results, content):
    return detections_of(results[0], content)


def read(folder, found, annotations):
    path = folder / "bbox.json"
    path.write_text(json.dumps(found))
    assert is_coco_results(path)
    return read_coco_results(path, annotations)


def test_the_same_detections_give_the_same_table(results, content, annotations, found, tmp_path):
    names = {image["file_name"]: i for i, image in enumerate(content["images"])}
    own = [r for r in results[0].records if r["file_name"] in names]
    own.sort(key=lambda r: names[r["file_name"]])
    result = read(tmp_path, found, annotations)
    assert len(own) == len(result.records) > 2
    assert froc_table(result.records) == froc_table(own)
    for ours, theirs in zip(own, result.records):
        assert ours["patient"] == theirs["patient"] and ours["masks"] == theirs["masks"]
        np.testing.assert_allclose(ours["boxes"], theirs["boxes"])
    write_results(tmp_path / "results.json.gz", result.records, result.table_key_slices)
    again = read_results(tmp_path / "results.json.gz")
    assert again.table_key_slices == result.table_key_slices == len(names)
    assert not is_coco_results(tmp_path / "results.json.gz")


def test_boxes_alone_of_images_alone(content, found, tmp_path):
    """Neither masks nor patients, spacing or thickness: what a foreign data set may have."""
    plain = dict(
        images=[
            {k: i[k] for k in ("id", "file_name", "height", "width")} for i in content["images"]
        ],
        annotations=[
            {k: a[k] for k in ("id", "image_id", "category_id", "bbox")}
            for a in content["annotations"]
        ],
        categories=[dict(id=1, name="nodule")],
    )
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    for detection in found:
        del detection["segmentation"]
    result = read(tmp_path, found, tmp_path / "plain.json")
    assert math.isnan(result.records[0]["thickness_mm"]) and "masks" not in result.records[0]
    assert result.table_key_slices is None and result.unknown_patients == len(result.records)
    evaluation = evaluate(result, resamples=100)
    assert evaluation["diameters"] is None and evaluation["froc"][0]["average"] > 0
    assert evaluation["settings"]["resampled"] == "images, as patients are unknown"


def test_polygons_become_masks(annotations, found, tmp_path):
    x, y, width, height = (10, 10, 20, 10)
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    for detection in found:
        detection["segmentation"] = [corners]
    result = read(tmp_path, found, annotations)
    mask = next(r["masks"][0] for r in result.records if r["boxes"])
    assert coco_mask.area(mask) == width * height


def test_no_detections_at_all(annotations, tmp_path):
    result = read(tmp_path, [], annotations)
    assert froc_table(result.records)[0]["average"] == 0


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(image_id=10**6), "detection 2: image_id 1000000 is none of"),
        (dict(category_id=3), "detection 2: category_id 3 is not 1"),
        (dict(bbox=[1, 2, 3]), "detection 2: bbox must be x, y, width, height"),
        (dict(bbox=[1, 2, -3, 4]), "detection 2: bbox must be"),
        (dict(score=math.nan), "detection 2: score must be a finite number"),
        (dict(bbox=[900, 2, 3, 4]), "boxes must lie in the image"),
        (dict(segmentation="x"), "not a mask in COCO's format"),
    ],
)
def test_what_is_wrong_is_named(changes, said, annotations, found, tmp_path):
    found[1].update(changes)
    with pytest.raises(ValueError, match=said):
        read(tmp_path, found, annotations)
