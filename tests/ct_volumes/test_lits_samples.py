"""Instances of labels against scikit-image's, and annotation files that are read and refused."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from skimage.measure import label, regionprops

from ct_volumes.lits_samples import instances_of, read_samples, to_coco
from deeplesion.errors import DataError, MissingDataError


def blobs(seed, size=40):
    """Labels with a few ragged parts, as no liver has them."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(size, size))
    for _ in range(3):
        noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3
    return (noise > 0.15).astype(np.uint8) + (noise > 0.3)


@pytest.mark.parametrize("seed", range(5))
def test_instances_are_the_connected_parts_of_liver_and_lesions(seed):
    labels = blobs(seed)
    found = instances_of(labels)
    for category, least in ((1, 1), (2, 2)):
        regions = regionprops(label(labels >= least, connectivity=2))
        expected = {}
        for region in regions:
            y0, x0, y1, x1 = region.bbox
            expected.setdefault((x0 - 0.5, y0 - 0.5, x1 - x0, y1 - y0), set()).update(
                map(tuple, region.coords)
            )
        ours = [i for i in found if i["category_id"] == category]
        assert len(ours) == len(expected) > 1
        for instance in ours:
            mask = coco_mask.decode(instance["segmentation"])
            assert set(map(tuple, np.argwhere(mask))) == expected[tuple(instance["bbox"])]
            assert instance["area"] == mask.sum()


def test_a_lesion_is_liver_too_and_parts_with_one_box_are_one_instance():
    labels = np.zeros((7, 7), np.uint8)
    labels[1:6, 1:6] = 1
    labels[3, 3] = 2
    liver, lesion = instances_of(labels)
    assert (liver["area"], lesion["area"]) == (25, 1)
    assert lesion["bbox"] == [2.5, 2.5, 1, 1]
    # Two interlocking hooks whose boxes are the same.
    hooks = np.zeros((9, 9), np.uint8)
    hooks[0, :7] = hooks[:, 0] = hooks[8, :3] = 1
    hooks[8, 5:] = hooks[:, 8] = hooks[2, 2:] = hooks[0, 8] = 1
    hooks[1:, 1:8][0] = 0
    parts = label(hooks, connectivity=2)
    assert parts.max() == 2 and len({r.bbox for r in regionprops(parts)}) == 2
    assert instances_of(np.zeros((4, 4), np.uint8)) == []


def test_boxes_that_are_the_same_are_merged():
    labels = np.zeros((6, 6), np.uint8)
    labels[0, :5] = labels[:, 0] = 1  # from corner to corner ...
    labels[5, 2:] = labels[2:, 5] = labels[0, 5] = 0
    labels[5, 2:] = labels[2:, 5] = 1  # ... and back
    parts = regionprops(label(labels, connectivity=2))
    boxes = {r.bbox for r in parts}
    assert len(parts) == 2
    assert len(instances_of(labels)) == len(boxes)


def content():
    labels = np.zeros((8, 8), np.uint8)
    labels[2:6, 2:6] = 1
    image = dict(
        file_name="lits_000/000.png", height=8, width=8, thickness_mm=1.5, spacing_mm=0.8,
        slice_range=[0, 1], patient=0, study=1, series=1,
    )  # fmt: skip
    slices = [
        dict(image=image, instances=instances_of(labels)),
        dict(image={**image, "file_name": "lits_000/001.png"}, instances=[]),
    ]
    return to_coco(slices, {"lits": "/data", "step_mm": 1.5})


def written(folder, change=lambda c: None):
    data = content()
    change(data)
    path = folder / "train.json"
    path.write_text(json.dumps(data))
    return path


def test_files_come_back_as_they_were_written(tmp_path):
    assert read_samples(written(tmp_path), need_instances=True) == content()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(categories=c["categories"][:1]), "no annotation file of LiTS"),
        (lambda c: c.update(info={}), "no annotation file of LiTS"),
        (lambda c: c.update(images=[], annotations=[]), "holds no slices"),
        (lambda c: c.update(annotations=[]), "holds no liver"),
        (lambda c: c["annotations"][0].update(category_id=3), "category_id: expected"),
        (lambda c: c["annotations"][0].update(bbox=[6, 2, 4, 4]), "a box within the image"),
        (lambda c: c["annotations"][0].update(image_id=7), "the id of one of the images"),
        (lambda c: c["images"][1].update(patient="x"), "patient: expected the number of the case"),
        (lambda c: c["images"][1].update(id=1), "one that no other image has"),
    ],
)
def test_files_that_are_not_sound_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_samples(written(tmp_path, change), need_instances=True)


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"none\.json"):
        read_samples(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(DataError, match="no annotation file of LiTS"):
        read_samples(tmp_path / "bad.json")
