"""LIDCDataset on a few random crops: which nodules, what a sample holds, what it refuses."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from ct_volumes.lidc_samples import NoduleSample, crop_path, write_crop, write_samples
from deeplesion.errors import DataError, MissingDataError
from mmdet_ext.datasets.lidc import LIDCDataset
from mmdet_ext.datasets.sampler import SampleKey

INFO = dict(size=12, masks="reading", split_by="patient", leaking_patients=0)
RATINGS = [1, 2, 3, 4, 5, 2]


def make_lidc_samples(root, ratings=RATINGS, size=12, seed=0, **info):
    """Crops of which malignant ones hold larger nodules; every third is of the test."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, rating in enumerate(ratings):
        radius = 2 + rating / 2
        there = np.indices((size,) * 3) - (size - 1) / 2
        mask = (there**2).sum(0) <= radius**2
        hu = np.where(mask, 0, -800) + rng.integers(-100, 100, mask.shape)
        name = f"P-{number:02d}_{number:05d}"
        write_crop(root, name, hu.astype(np.int16), mask)
        samples.append(
            NoduleSample(
                name=name, patient=f"P-{number:02d}", malignancy=rating, is_rated=rating != 3,
                readings=2, reading=number, split="test" if number % 3 == 2 else "train",
                voxels=int(mask.sum()), whole=True,
            )
        )  # fmt: skip
    write_samples(root, {**INFO, "size": size, **info}, samples)
    return samples


def test_segmentation_takes_all_and_classification_the_rated(tmp_path):
    samples = make_lidc_samples(tmp_path)
    data = LIDCDataset(tmp_path, "segmentation", "train")
    assert [data[i]["name"] for i in range(len(data))] == [samples[i].name for i in (0, 1, 3, 4)]
    assert data.metainfo["classes"] == ("background", "nodule")
    with np.load(crop_path(tmp_path, samples[3].name)) as content:
        sample = data[2]
        np.testing.assert_array_equal(sample["volume"], content["hu"][None])
        np.testing.assert_array_equal(sample["labels"], content["mask"][None])
    assert sample["labels"].dtype == np.uint8 and "label" not in sample
    assert (sample["patient"], sample["index"]) == ("P-03", 2)
    assert sample["img_path"] == str(crop_path(tmp_path, samples[3].name))

    data = LIDCDataset(tmp_path, "classification", "train")
    assert [data[i]["label"] for i in range(len(data))] == [0, 0, 1, 1]
    assert "labels" not in data[0] and data.metainfo["classes"] == ("benign", "malignant")
    data = LIDCDataset(tmp_path, "classification", "test")
    assert [data[i]["name"] for i in range(len(data))] == [samples[5].name]  # not the 3
    assert data.ann_file == str(tmp_path / "nodules.json")


def test_a_sample_key_seeds_what_the_pipeline_draws(tmp_path):
    make_lidc_samples(tmp_path)
    data = LIDCDataset(tmp_path, "segmentation", "train")
    data.pipeline = lambda results: (results["index"], np.random.random())  # noqa: NPY002
    assert data[SampleKey(0, 1, 2)] == data[SampleKey(0, 1, 2)]
    assert data[SampleKey(0, 1, 2)][0] == 2
    assert len({data[SampleKey(0, epoch, 2)][1] for epoch in range(4)}) == 4


def test_a_split_that_leaks_is_said(tmp_path, monkeypatch):
    make_lidc_samples(tmp_path, split_by="nodule", leaking_patients=314)
    said = []
    monkeypatch.setattr("mmdet_ext.datasets.lidc.print_log", lambda text, *rest: said.append(text))
    LIDCDataset(tmp_path, "segmentation", "train")
    assert "split by nodule: 314 patients" in said[0] and "too high" in said[0]


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(MissingDataError, match="--lidc --out DIR first"):
        LIDCDataset(tmp_path, "segmentation", "train")
    samples = make_lidc_samples(tmp_path)
    with pytest.raises(ValueError, match="task must be"):
        LIDCDataset(tmp_path, "detection", "train")
    with pytest.raises(ValueError, match="split must be"):
        LIDCDataset(tmp_path, "segmentation", "val")
    write_samples(tmp_path, INFO, [replace(s, is_rated=False) for s in samples])
    with pytest.raises(DataError, match="no nodules for classification in train"):
        LIDCDataset(tmp_path, "classification", "train")
    data = LIDCDataset(tmp_path, "segmentation", "train")
    crop_path(tmp_path, samples[0].name).unlink()
    with pytest.raises(MissingDataError, match="does not exist"), warnings.catch_warnings():
        data[0]
