"""DeepLesionDataset, its sampler and the pixel-centre convention."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from deeplesion.dataset import PIXEL_CENTRE, DeepLesionDataset, EpochSampler, SampleKey

PIPELINE = [
    dict(type="LoadCTSlices", num_slices=3),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomAffineResize", size=128, prob=0, flip_prob=0, box_from="corners"),
    dict(type="PackCTInputs"),
]


@pytest.fixture(autouse=True)
def _scope():
    from mmengine.registry import DefaultScope, init_default_scope

    import deeplesion.transforms  # noqa: F401

    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")


def dataset(root, split="train", pipeline=PIPELINE, **options):
    return DeepLesionDataset(
        data_root=str(root),
        ann_file=f"annotations/{split}.json",
        data_prefix=dict(img="Images_png"),
        pipeline=pipeline,
        **options,
    )


def test_every_lesion_of_the_file_arrives_half_a_pixel_further(phantom):
    content = json.loads((phantom / "annotations/train.json").read_text())
    data = dataset(phantom)
    assert len(data) == len(content["images"])
    for i, image in enumerate(content["images"]):
        sample = data[i]["data_samples"]
        expected = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in expected])
        boxes[:, 2:] += boxes[:, :2]
        got = sample.gt_instances.bboxes.tensor.numpy()
        np.testing.assert_allclose(got, boxes + PIXEL_CENTRE, atol=1e-4)
        for mask, annotation in zip(sample.gt_instances.masks.masks, expected):
            np.testing.assert_array_equal(mask, coco_mask.decode(annotation["segmentation"]))
        assert sample.thickness_mm >= 2.0


def test_masks_lie_inside_their_boxes(phantom):
    data = dataset(phantom)
    for i in range(len(data)):
        instances = data[i]["data_samples"].gt_instances
        for box, mask in zip(instances.bboxes.tensor.numpy(), instances.masks.masks):
            rows, columns = np.nonzero(mask)
            assert columns.min() + 0.5 >= box[0] - 0.5 and columns.max() + 0.5 <= box[2] + 0.5
            assert rows.min() + 0.5 >= box[1] - 0.5 and rows.max() + 0.5 <= box[3] + 0.5


def test_sampler_keys_name_seed_epoch_and_sample(phantom):
    data = dataset(phantom)
    sampler = EpochSampler(data, shuffle=True, seed=5)
    sampler.set_epoch(0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert {k.index for k in first} == {k.index for k in second} == set(range(len(data)))
    assert {k.epoch for k in first} == {0} and {k.epoch for k in second} == {1}
    assert {k.seed for k in first} == {5}


def test_two_epochs_augment_differently_and_one_repeats(phantom):
    pipeline = [*PIPELINE[:2], dict(type="RandomAffineResize", size=128, prob=1), PIPELINE[3]]
    data = dataset(phantom, pipeline=pipeline)
    key = SampleKey(0, 0, 1)
    first, again = data[key]["inputs"], data[key]["inputs"]
    assert (first == again).all()
    assert (first != data[key._replace(epoch=1)]["inputs"]).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_mmdets_transforms_draw_by_epoch_and_sample_too(phantom, workers):
    """RandomFlip takes its numbers from numpy's global generator."""
    pipeline = [
        dict(type="LoadCTSlices", num_slices=1),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PackCTInputs", meta_keys=("flip",)),
    ]
    data = dataset(phantom, pipeline=pipeline)
    sampler = EpochSampler(data, shuffle=False, seed=0)
    flips = []
    for sampler.epoch in range(4):
        loader = DataLoader(data, 2, sampler=sampler, num_workers=workers, collate_fn=list)
        flips.append([sample["data_samples"].flip for batch in loader for sample in batch])
    expected = [[data[key]["data_samples"].flip for key in sampler] for sampler.epoch in range(4)]
    assert flips == expected
    assert len({tuple(epoch) for epoch in flips}) == 4, "epochs are flipped alike"


def test_a_resumed_sampler_goes_on_where_it_was(phantom):
    data = range(7)
    sampler = EpochSampler(data, shuffle=True, seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.start = 4
    assert list(sampler) == whole[4:] and len(sampler) == 7
    sampler.start = 7
    assert list(sampler) == []


def test_missing_annotations_say_how_to_get_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prepare_data.py.*make_phantom.py"):
        dataset(tmp_path)


def test_empty_split_is_an_error(phantom, tmp_path):
    content = json.loads((phantom / "annotations/train.json").read_text())
    content["images"] = content["annotations"] = []
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"train.json holds no key slices"):
        dataset(tmp_path)
