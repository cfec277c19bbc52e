"""Regions to ignore on their way from the file to the detector: DeepLesionDataset and the pipeline
hand them on as mmdet does, and lesions beside them are what they are without."""

import json

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.errors import DataError
from mmdet_ext.datasets.deeplesion import DeepLesionDataset
from mmdet_ext.datasets.sampler import SampleKey
from mmdet_ext.datasets.transforms import PackCTInputs, RandomAffineResize
from mmdet_ext.engine.run_card import counts, describe

REGION = [50.25, 60.5, 12.0, 9.5]
PIPELINE = [
    dict(type="LoadCTSlices"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomAffineResize", size=128, prob=1.0),
    dict(type="PackCTInputs"),
]


@pytest.fixture
def scope():
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")


@pytest.fixture(scope="module")
def content(phantom):
    return json.loads((phantom / "annotations/train.json").read_text())


def with_region(content, **changes):
    """A copy whose first key slice has a region to ignore, before its lesions."""
    image = content["images"][0]
    numbers = [a["id"] for a in content["annotations"]]
    region = dict(id=max(numbers) + 1, image_id=image["id"], category_id=1, bbox=REGION, iscrowd=1)
    return {**content, "annotations": [{**region, **changes}, *content["annotations"]]}


def dataset(root, content, path, **options):
    path.write_text(json.dumps(content))
    return DeepLesionDataset(
        stack=dict(num_slices=3),
        data_root=str(root),
        ann_file=str(path),
        data_prefix=dict(img="Images_png"),
        pipeline=PIPELINE,
        **options,
    )


def test_a_region_arrives_and_the_lesions_stay_as_they_are(scope, phantom, content, tmp_path):
    plain = dataset(phantom, content, tmp_path / "plain.json")
    marked = dataset(phantom, with_region(content), tmp_path / "marked.json")
    assert (plain.metainfo["ignored_regions"], marked.metainfo["ignored_regions"]) == (0, 1)
    for key in [SampleKey(0, epoch, 0) for epoch in range(6)] + [SampleKey(0, 0, 1)]:
        expected, found = plain[key], marked[key]
        assert torch.equal(expected["inputs"], found["inputs"])
        expected, found = expected["data_samples"], found["data_samples"]
        # The box comes from the RECIST, which the region has none of.
        assert torch.equal(expected.gt_instances.bboxes.tensor, found.gt_instances.bboxes.tensor)
        np.testing.assert_array_equal(
            expected.gt_instances.masks.masks, found.gt_instances.masks.masks
        )
        assert found.lesions == expected.lesions
        assert len(found.ignored_instances.bboxes) == (key.index == 0)
        assert len(expected.ignored_instances.bboxes) == 0
    assert counts(plain).keys() == {"images", "lesions", "source"}
    assert counts(marked)["lesions"] == counts(plain)["lesions"] == len(content["annotations"])
    number = f"{len(content['annotations'])} lesions and 1 regions to ignore, "
    assert number in describe(counts(marked))


def test_without_augmentation_it_is_the_box_of_the_file(scope, phantom, content, tmp_path):
    data = dataset(phantom, with_region(content), tmp_path / "marked.json")
    data.pipeline.transforms[2] = RandomAffineResize(128, augment=False)
    (box,) = data[0]["data_samples"].ignored_instances.bboxes.tensor.tolist()
    x, y, width, height = REGION
    assert box == [v + PIXEL_CENTRE for v in (x, y, x + width, y + height)]


def test_several_files_count_their_regions_together(scope, phantom, content, tmp_path):
    (tmp_path / "marked.json").write_text(json.dumps(with_region(content)))
    data = DeepLesionDataset(
        stack=dict(num_slices=3),
        data_root=str(phantom),
        ann_file=[str(tmp_path / "marked.json"), "annotations/val.json"],
        data_prefix=dict(img="Images_png"),
        pipeline=[],
    )
    assert data.metainfo["ignored_regions"] == 1


def test_testing_refuses_regions_and_training_a_file_of_nothing_else(
    scope, phantom, content, tmp_path
):
    with pytest.raises(DataError, match="the benchmark knows no regions to ignore"):
        dataset(phantom, with_region(content), tmp_path / "test.json", test_mode=True)
    content = with_region(content)
    with pytest.raises(DataError, match="holds no lesions"):
        dataset(
            phantom, {**content, "annotations": content["annotations"][:1]}, tmp_path / "none.json"
        )


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(iscrowd=2), "iscrowd: expected 0, or 1 of a region to ignore in training, got 2"),
        (dict(iscrowd="yes"), "iscrowd: expected 0, or 1"),
        (dict(iscrowd=0, ignore=1), "ignore: expected 0: what tells regions to ignore is iscrowd"),
        (dict(bbox=[50, 60, 0, 9]), "bbox: expected x, y, width, height, the last two above 0"),
    ],
)
def test_a_bad_region_is_named(scope, phantom, content, tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        dataset(phantom, with_region(content, **changes), tmp_path / "bad.json")


def sample(flags, boxes):
    masks = np.zeros((len(boxes), 40, 40), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = 1
    return dict(
        img=np.zeros((40, 40, 3), np.int16),
        gt_bboxes=HorizontalBoxes(torch.tensor(boxes, dtype=torch.float32)),
        gt_bboxes_labels=np.zeros(len(boxes), np.int64),
        gt_ignore_flags=np.array(flags, bool),
        gt_masks=BitmapMasks(masks, 40, 40),
        thickness_mm=2.0,
    )


def test_of_what_leaves_the_image_a_region_stays_as_long_as_something_of_it_does():
    """Shifted to the left by 20: three quarters of each box at 5 .. 25 are gone, all of 2 .. 12."""
    boxes = [[5, 5, 25, 25], [5, 5, 25, 25], [2, 2, 12, 12], [22, 22, 38, 38]]
    moved = sample([False, True, True, True], boxes)
    RandomAffineResize(40)._move_annotations(moved, np.array([[1.0, 0, -20], [0, 1, 0]]))
    packed = PackCTInputs()(moved)["data_samples"]
    assert packed.gt_instances.bboxes.tensor.tolist() == []
    assert packed.ignored_instances.bboxes.tensor.tolist() == [[0, 5, 5, 25], [2, 22, 18, 38]]


def test_a_region_whose_mask_is_empty_stays():
    both = sample([False, True], [[5, 5, 25, 25], [5, 5, 25, 25]])
    both["gt_masks"].masks[:] = 0
    RandomAffineResize(40)._move_annotations(both, np.eye(2, 3))
    assert both["gt_ignore_flags"].tolist() == [True]
