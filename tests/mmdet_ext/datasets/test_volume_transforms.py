"""Crops, turns and flips of volumes against slices of the array and the group of a cube's
symmetries; what is drawn depends on the key alone."""

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
import torch

from deeplesion.errors import DataError, UserError
from mmdet_ext.datasets import volume_transforms
from mmdet_ext.datasets.volume_transforms import (
    CropVolume,
    PackVolume,
    RandomQuarterTurns,
    WindowHU,
)
from mmdet_ext.random_states import seeded


def test_without_monai_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("ct_volumes.optional.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs? monai: pip install monai$"):
        CropVolume(4)


@pytest.fixture
def monai():
    pytest.importorskip("monai", reason="needs the extra [volumes]")


def sample(size=9):
    """Each voxel's HU says where it was."""
    volume = np.arange(size**3, dtype=np.int16).reshape(1, size, size, size)
    return dict(volume=volume, labels=(volume % 7 == 0).view(np.uint8), name="n")


def test_the_middle_is_cut_in_testing(monai):
    given = sample()
    found = CropVolume(5).transform(given)
    np.testing.assert_array_equal(found["volume"].numpy(), given["volume"][:, 2:7, 2:7, 2:7])
    np.testing.assert_array_equal(found["labels"].numpy(), given["labels"][:, 2:7, 2:7, 2:7])
    assert type(found["volume"]) is torch.Tensor and found["name"] == "n"
    assert CropVolume((3, 5, 7)).transform(sample())["volume"].shape == (1, 3, 5, 7)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    CropVolume(5).transform(given)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_training_moves_the_crop_by_every_shift_alike(monai):
    given, counts = sample(8), Counter()
    step = CropVolume(4, shift=1)  # of the middle six
    for number in range(90):
        with seeded((1, number)):
            found = step.transform(given)
        first = int(found["volume"][0, 0, 0, 0])
        z, y, x = np.unravel_index(first, (8, 8, 8))
        expected = given["volume"][:, z : z + 4, y : y + 4, x : x + 4]
        np.testing.assert_array_equal(found["volume"].numpy(), expected)
        np.testing.assert_array_equal(found["labels"].numpy(), (expected % 7 == 0))
        counts[z - 2, y - 2, x - 2] += 1
    assert counts.keys() <= set(product((-1, 0, 1), repeat=3)) and len(counts) > 20
    for axis in range(3):
        sums = Counter()
        for shift, count in counts.items():
            sums[shift[axis]] += count
        assert all(15 < sums[shift] < 45 for shift in (-1, 0, 1))  # 30 each, sd 4.5


def symmetries(cube):
    """The 48 ways to lay a cube on itself -> whether it is mirrored."""
    for axes in permutations((0, 1, 2)):
        for flips in product((1, -1), repeat=3):
            matrix = np.eye(3)[list(axes)] * flips
            turned = cube.transpose(axes)[:: flips[0], :: flips[1], :: flips[2]]
            yield np.ascontiguousarray(turned).tobytes(), np.linalg.det(matrix) < 0


def test_turns_and_flips_lay_a_cube_on_itself(monai):
    given, step = sample(3), RandomQuarterTurns()
    mirrored = dict(symmetries(given["volume"][0]))
    assert len(mirrored) == 48
    seen = Counter()
    for number in range(160):
        with seeded((2, number)):
            found = step.transform(given)
        volume = found["volume"].numpy()
        np.testing.assert_array_equal(found["labels"].numpy(), volume % 7 == 0)
        seen[np.ascontiguousarray(volume[0]).tobytes()] += 1
    assert len(seen) > 36 and seen.keys() <= mirrored.keys()
    # Three in four are flipped: 120, sd 5.5.
    assert 100 < sum(count for way, count in seen.items() if mirrored[way]) < 140


def test_what_is_drawn_depends_on_the_key_alone(monai):
    given, steps = sample(9), [CropVolume(5, shift=2), RandomQuarterTurns()]

    def draw(key):
        with seeded(key):
            results = dict(given)
            for step in steps:
                results = step.transform(results)
            return results["volume"].numpy()

    first = draw((0, 1, 2))
    others = [draw((0, 1, n)) for n in range(3, 9)]
    np.testing.assert_array_equal(draw((0, 1, 2)), first)
    assert len({other.tobytes() for other in [first, *others]}) > 5


def test_the_window_is_a_straight_line(monai):
    hu = np.array([-2000, -1024, -312, 400, 3000], np.int16).reshape(1, 1, 1, 5)
    found = WindowHU(-1024, 400, (-1, 0)).transform(dict(volume=hu))["volume"]
    # v / 255 - 1 of v in [0, 255]
    v = 255 * (hu.clip(-1024, 400).astype(float) + 1024) / 1424
    np.testing.assert_allclose(found.numpy(), v / 255 - 1, atol=1e-6)
    assert found.dtype == torch.float32


def test_the_brightest_voxels_of_int16_are_not_taken_for_air(monai):
    hu = np.array([250, 3071, 32000, 32767, -32768], np.int16).reshape(1, 1, 1, 5)
    found = WindowHU(-200, 250).transform(dict(volume=hu))["volume"]
    assert found.ravel().tolist() == [1, 1, 1, 1, 0]


def test_what_cannot_be_is_refused(monai):
    with pytest.raises(DataError, match=r"a volume: \(9, 9, 9\) voxels are too few"):
        CropVolume(8, shift=1).transform(sample())
    for options in (dict(size=0), dict(size=(3, 3)), dict(size=3, shift=-1)):
        with pytest.raises(ValueError, match="size must be"):
            CropVolume(**options)
    with pytest.raises(ValueError, match="low < high"):
        WindowHU(400, -1024)


def test_packing():
    given = {**sample(3), "patient": "p", "index": 4, "img_path": "x.npz", "label": 1}
    packed = PackVolume().transform(given)
    assert packed["inputs"].shape == (1, 3, 3, 3) and packed["inputs"].dtype == torch.float32
    found = packed["data_samples"]
    assert found.labels.shape == (3, 3, 3) and found.labels.dtype == torch.uint8
    assert found.label == 1 and found.label.dtype == torch.int64
    assert (found.name, found.patient, found.index, found.img_path) == ("n", "p", 4, "x.npz")
    only = PackVolume().transform(dict(volume=given["volume"]))["data_samples"]
    assert not only.keys() and not only.metainfo_keys()


def test_the_module_needs_no_monai():
    assert "monai" not in vars(volume_transforms)
