"""Whole cases of LiTS, and the crops that training draws of them: against numpy's padding and
slicing, torch's interpolation, and properties of flips and turns."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("monai", reason="needs monai, the extra [volumes]")
pytest.importorskip("nibabel", reason="needs nibabel, the extra [ct]")
from mmdet.registry import DATASETS, TRANSFORMS

from ct_volumes.lits import find_cases, read_case, split
from deeplesion.errors import DataError, MissingDataError, UserError
from mmdet_ext.datasets.lits_volumes import LiTSVolumes, RandomFlipsAndTurns, RandomScaledCrop
from mmdet_ext.datasets.sampler import SampleKey
from mmdet_ext.random_states import random_states, seeded

WINDOW = dict(type="WindowHU", low=-200, high=250)
TRAIN = [
    dict(type="RandomScaledCrop", size=(8, 40, 40)), dict(type="RandomFlipsAndTurns"), WINDOW,
    dict(type="PackVolume"),
]  # fmt: skip


def dataset(phantom_lits, **options):
    options = dict(split="train", pipeline=TRAIN) | options
    return DATASETS.build(
        dict(type="LiTSVolumes", data_root=str(phantom_lits / "files"), **options)
    )


def test_training_has_the_cases_of_its_split_and_testing_whole_volumes(phantom_lits, tmp_path):
    found = find_cases(phantom_lits / "files").cases
    training = dataset(phantom_lits)
    assert [f.number for f in training.files] == [n for n in split()[0] if n in found] == [0, 28]
    (case,) = (read_case(found[n]) for n in split()[1] if n in found)
    for cache in (None, str(tmp_path)):
        testing = dataset(
            phantom_lits, split="val", test_mode=True, cache=cache,
            pipeline=[WINDOW, dict(type="PackVolume")],
        )  # fmt: skip
        packed = testing[0]
        expected = (np.clip(case.volume.hu.astype(float), -200, 250) + 200) / 450
        np.testing.assert_allclose(packed["inputs"][0], expected, atol=1e-6)
        sample = packed["data_samples"]
        assert (sample.patient, sample.name, sample.index) == (29, "lits_029", 0)
        assert "labels" not in sample and sample.img_path.endswith("volume-29.nii")
    assert testing.metainfo["lits"] == dict(folder=str(phantom_lits / "files"))


def test_cases_that_are_not_there_are_said(phantom_lits, monkeypatch):
    said = []
    monkeypatch.setattr(
        "mmdet_ext.datasets.lits_volumes.print_log", lambda text, *rest: said.append(text)
    )
    dataset(phantom_lits, cases=[0, 28])
    assert not said
    dataset(phantom_lits)
    assert "has 2 of the 105 cases of the split train" in said[0]


def test_a_sample_is_a_function_of_its_key_alone(phantom_lits):
    training = dataset(phantom_lits)
    before = random_states()
    one = training[SampleKey(0, 3, 1)]
    other = dataset(phantom_lits)
    other[SampleKey(0, 3, 0)]
    again = other[SampleKey(0, 3, 1)]
    assert str(before) == str(random_states())
    assert torch.equal(one["inputs"], again["inputs"])
    assert torch.equal(one["data_samples"].labels, again["data_samples"].labels)
    assert one["inputs"].shape == (1, 8, 40, 40) and one["inputs"].dtype == torch.float32
    assert one["data_samples"].labels.shape == (8, 40, 40)
    assert one["data_samples"].labels.dtype == torch.uint8
    assert one["inputs"].min() >= 0 and one["inputs"].max() <= 1
    next_epoch = training[SampleKey(0, 4, 1)]
    assert not torch.equal(one["inputs"], next_epoch["inputs"])
    assert training.files[1].number == one["data_samples"].patient == 28


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(split="test"), ValueError, "split must be one of"),
        (dict(cases=[29]), ValueError, r"cases \[29\] are not in the split train"),
        (dict(cases=[0, 1]), DataError, r"no files of cases \[1\]"),
        (dict(data_root="/nowhere"), MissingDataError, "/nowhere is no folder"),
    ],
)
def test_what_is_not_there_is_refused(phantom_lits, options, error, message):
    options = dict(data_root=str(phantom_lits / "files"), split="train") | options
    with pytest.raises(error, match=message):
        LiTSVolumes(**options)


def volume(shape=(9, 12, 10)):
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, shape).astype(np.int16)
    labels = np.zeros(shape, np.uint8)
    labels[2:5, 3:8, 4:9] = 1
    labels[3, 5, 6] = 2
    return dict(volume=hu[None], labels=labels[None])


@pytest.mark.parametrize("around", [(0, 0), (1, 0), (0, 1), (0.3, 0.3)])
@pytest.mark.parametrize("size", [(4, 5, 6), (12, 5, 10), (9, 13, 17)])
def test_a_crop_without_scaling_is_a_box_of_the_padded_volume(size, around):
    sample, starts = volume(), set()
    crop = RandomScaledCrop(size, scale=0, around=around)
    padded = {
        key: np.pad(sample[key][0], 20, constant_values=fill)
        for key, fill in (("volume", -1024), ("labels", 0))
    }
    shape = sample["labels"].shape[1:]
    # Every place where a box may lie: where it is longer than the volume, this is in its middle.
    places = [[-((b - s) // 2)] if b > s else list(range(s - b + 1)) for b, s in zip(size, shape)]
    boxes = {}
    for start in itertools.product(*places):
        box = tuple(slice(20 + a, 20 + a + b) for a, b in zip(start, size))
        boxes[padded["volume"][box].tobytes()] = (start, padded["labels"][box])
    for number in range(60):
        with seeded((number,)):
            drawn = crop.transform(dict(sample))
        start, labels = boxes[drawn["volume"][0].tobytes()]
        np.testing.assert_array_equal(drawn["labels"][0], labels)
        assert drawn["volume"].dtype == np.int16 and drawn["labels"].dtype == np.uint8
        starts.add(start)
        if around == (0, 1):
            assert (labels == 2).any()
        if around == (1, 0):
            assert (labels == 1).any()
    # All places, those about 75 voxels, those about one; 60 are drawn.
    assert len(starts) == 1 if around == (0, 1) else len(starts) > min(len(boxes), 30) / 2
    if around == (0, 1):  # one voxel: one box about it, moved into the volume
        centre = [v - b // 2 for v, b in zip((3, 5, 6), size)]
        (start,) = starts
        expected = [p[0] if len(p) == 1 else min(max(c, 0), p[-1]) for c, p in zip(centre, places)]
        assert list(start) == expected


def test_a_case_without_lesions_is_cropped_anywhere():
    sample = volume()
    sample["labels"][:] = 0
    crop, seen = RandomScaledCrop((4, 5, 6), scale=0, around=(0, 1)), set()
    for number in range(40):
        with seeded((number,)):
            seen.add(crop.transform(dict(sample))["volume"].tobytes())
    assert len(seen) > 20


@pytest.mark.parametrize("number", range(4))
def test_a_scaled_crop_is_a_box_resampled(number, monkeypatch):
    sample = volume((20, 22, 24))
    crop = RandomScaledCrop((8, 9, 7), scale=0.4)
    cuts = []
    plain = RandomScaledCrop.cut
    monkeypatch.setattr(
        RandomScaledCrop, "cut", staticmethod(lambda *a: cuts.append(plain(*a)) or cuts[-1])
    )
    with seeded((number,)):
        drawn = crop.transform(sample)
    hu, labels = (torch.from_numpy(cut.astype(np.float32))[None, None] for cut in cuts)
    ratios = [new / old for new, old in zip((8, 9, 7), hu.shape[2:])]
    assert max(ratios) / min(ratios) < 1.2 and min(ratios) > 0.55 and max(ratios) < 1.5
    expected = F.interpolate(hu, (8, 9, 7), mode="trilinear", align_corners=False)[0]
    np.testing.assert_allclose(drawn["volume"], expected, atol=0.01)
    expected = F.interpolate(labels, (8, 9, 7), mode="nearest-exact")[0]
    np.testing.assert_array_equal(drawn["labels"], expected)


def test_slices_are_turned_and_all_axes_flipped_labels_with_them():
    cube = np.arange(2 * 3 * 3, dtype=np.int16).reshape(1, 2, 3, 3)
    step = TRANSFORMS.build(dict(type="RandomFlipsAndTurns"))
    allowed = {}
    for turns, flips in itertools.product(range(4), itertools.product((1, -1), repeat=3)):
        turned = np.rot90(cube[0], turns, (1, 2))[:: flips[0], :: flips[1], :: flips[2]]
        allowed[np.ascontiguousarray(turned).tobytes()] = None
    assert len(allowed) == 16  # two flips in the plane are half a turn
    seen = set()
    for number in range(200):
        with seeded((number,)):
            moved = step.transform(dict(volume=cube, labels=cube.astype(np.uint8)))
        assert torch.equal(moved["volume"].to(torch.uint8), moved["labels"])
        seen.add(moved["volume"].numpy().astype(np.int16)[0].tobytes())
    assert seen == allowed.keys()
    with pytest.raises(UserError, match="equal height and width"):
        RandomFlipsAndTurns().transform(volume())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(size=(4, 4)), "three numbers"),
        (dict(size=(4, 0, 4)), "three numbers"),
        (dict(size=(4, 4, 4), scale=1), "scale"),
        (dict(size=(4, 4, 4), around=(0.7, 0.7)), "around"),
    ],
)
def test_options_of_a_crop_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RandomScaledCrop(**options)
