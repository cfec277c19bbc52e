"""LiTSDataset: samples carry the labels' instances, and training leaves slices out as it says."""

import json
from collections import Counter

import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.registry import DefaultScope, init_default_scope

from ct_volumes.lits import find_cases, read_case, resample
from deeplesion.errors import MissingDataError
from mmdet_ext.engine.run import load_config


@pytest.fixture
def build(repository, phantom_lits):
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")

    def build(split="train", name="volumetric_attention/lits_mask_rcnn_r50_va", **options):
        config = load_config(str(repository / f"configs/{name}.py"), {"stack.num_slices": 9})
        dataset = config[f"{split}_dataloader"].dataset
        dataset.data_root = str(phantom_lits / "prepared")
        for step in dataset.pipeline:
            if step.type == "RandomAffineResize":
                step.update(size=128, flip_prob=0)
        return DATASETS.build({**dataset, **options})

    return build


@pytest.fixture(scope="module")
def cases(phantom_lits):
    found = find_cases(phantom_lits / "files").cases
    return {number: resample(read_case(files)) for number, files in found.items()}


def test_a_sample_is_the_slices_around_and_the_instances_on_the_middle_one(build, cases):
    dataset = build(background_step=1, liver_step=1)
    assert dataset.metainfo["classes"] == ("liver", "lesion")
    assert len(dataset) == len(cases[0].labels) + len(cases[28].labels)
    with_lesion = [
        i
        for i in range(len(dataset))
        if any(x["bbox_label"] == 1 for x in dataset.get_data_info(i)["instances"])
    ]
    assert with_lesion
    for index in (0, with_lesion[0], len(dataset) - 1):
        packed = dataset[index]
        sample = packed["data_samples"]
        case, slice_ = sample.patient, int(sample.file_name[-7:-4])
        hu, labels = cases[case].volume.hu, cases[case].labels[slice_]
        around = np.clip(np.arange(slice_ - 4, slice_ + 5), 0, len(hu) - 1)
        np.testing.assert_array_equal(packed["inputs"][0].numpy(), hu[around])
        assert sample.thickness_mm == 1.5 and sample.lesions == []
        found = np.zeros_like(labels)
        instances = sample.gt_instances
        for mask, label, box in zip(
            instances.masks.masks, instances.labels, instances.bboxes.tensor, strict=True
        ):
            found = np.maximum(found, mask * (int(label) + 1))
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        np.testing.assert_array_equal(found, labels)


def test_training_leaves_out_slices_as_it_says_and_testing_none(build, phantom_lits):
    def kinds(dataset):
        samples = map(dataset.get_data_info, range(len(dataset)))
        return Counter(max((x["bbox_label"] for x in s["instances"]), default=-1) for s in samples)

    every = kinds(build(background_step=1))
    assert kinds(build(background_step=4)) == {**every, -1: -(-every[-1] // 4)}
    some = kinds(build(background_step=1000, liver_step=5))
    assert some == {**every, -1: 1, 0: -(-every[0] // 5)}
    content = json.loads((phantom_lits / "prepared/annotations/val.json").read_text())
    tested = build("test", background_step=4, liver_step=9)
    assert sum(kinds(tested).values()) == len(content["images"])
    names = [tested.get_data_info(i)["file_name"] for i in range(len(tested))]
    assert names == [image["file_name"] for image in content["images"]]


def test_what_does_not_fit_is_refused(build, tmp_path):
    with pytest.raises(ValueError, match=r"holds slices 1\.5 mm apart, and .*target_mm is 2\.0"):
        build(stack=dict(num_slices=9, policy="normalize"))
    with pytest.raises(ValueError, match="background_step=0 and liver_step=1 must be"):
        build(background_step=0)
    with pytest.raises(MissingDataError, match="FOLDER --lits --out"):
        build(data_root=str(tmp_path))
