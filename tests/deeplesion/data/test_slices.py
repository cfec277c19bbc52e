"""Slices and stacks against np.interp over z and a plain-loop twin of the released code."""

import math
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplesion.data import slices
from deeplesion.data.slices import (
    INTERPOLATIONS,
    POLICIES,
    SliceFolder,
    files_in_reach,
    load_slices,
)
from deeplesion.errors import DataError

SERIES = "000001_01_01"
THICKNESSES = (0.25, 0.3, 0.5, 0.59998, 0.6, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.75, 4.0, 5.0)


class MemoryFolder(SliceFolder):
    """A SliceFolder over a dictionary {index: hu}, which notes what was read."""

    def __init__(self, volume):
        super().__init__("memory")
        self.volume = volume
        self.reads = []

    def read(self, file_name):
        self.reads.append(int(file_name[-7:-4]))
        return self.volume[self.reads[-1]]


def random_volume(low, high, shape=(4, 5), seed=0):
    rng = np.random.default_rng(seed)
    return {i: rng.integers(-1024, 3000, shape).astype(np.int16) for i in range(low, high + 1)}


def write_png(root, index, hu, series=SERIES):
    path = root / series / f"{index:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), (hu.astype(np.int32) + 32768).astype(np.uint16))
    return path


def load(folder, key, thickness, slice_range, num_slices, *args, **kwargs):
    name = f"{SERIES}/{key:03d}.png"
    return load_slices(folder, name, thickness, slice_range, num_slices, *args, **kwargs)


# Reading


def test_read_gives_back_every_hounsfield_value(tmp_path):
    hu = np.arange(-32768, 32768).reshape(128, 512)
    write_png(tmp_path, 7, hu)
    read = SliceFolder(tmp_path).read(f"{SERIES}/007.png")
    assert read.dtype == np.int16
    assert np.array_equal(read, hu)


@pytest.mark.parametrize("shape", [(512, 512), (768, 768), (1024, 1024), (30, 50)])
def test_any_image_size(tmp_path, shape):
    hu = np.random.default_rng(0).integers(-1024, 3000, shape).astype(np.int16)
    write_png(tmp_path, 1, hu)
    stack, _ = load(SliceFolder(tmp_path), 1, 5.0, (1, 1), 3)
    assert stack.shape == (*shape, 3)
    assert all(np.array_equal(stack[..., d], hu) for d in range(3))


def test_folder_takes_text_and_can_be_sent_to_a_worker(tmp_path):
    write_png(tmp_path, 1, np.zeros((2, 2)))
    folder = pickle.loads(pickle.dumps(SliceFolder(str(tmp_path))))
    assert folder.read(f"{SERIES}/001.png").shape == (2, 2)


def test_missing_slice_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"009\.png"):
        SliceFolder(tmp_path).read(f"{SERIES}/009.png")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_slice_is_named(tmp_path, kept):
    path = write_png(tmp_path, 9, np.random.default_rng(0).integers(0, 999, (64, 64)))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"009\.png.*truncated"):
        SliceFolder(tmp_path).read(f"{SERIES}/009.png")


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint16)])
def test_anything_but_16_bit_grey_is_refused(tmp_path, image):
    cv2.imwrite(str(tmp_path / "a.png"), image)
    with pytest.raises(ValueError, match=r"a\.png.*16-bit grey"):
        SliceFolder(tmp_path).read("a.png")


# The two decoders


@pytest.fixture(params=["kornia-rs", "OpenCV alone"])
def decoder(request, monkeypatch):
    if request.param == "kornia-rs":
        pytest.importorskip("kornia_rs")
    else:
        monkeypatch.setattr(slices, "kornia_rs", None)


@pytest.mark.parametrize("row_filter", ["NONE", "SUB", "UP", "AVG", "PAETH"])
@pytest.mark.parametrize("noise", [1, 300])
def test_every_filter_of_the_format(tmp_path, decoder, row_filter, noise):
    rng = np.random.default_rng(0)
    hu = rng.integers(-noise, noise, (40, 57)).cumsum(1).clip(-32768, 32767)
    options = [cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_FILTER_{row_filter}")]
    assert cv2.imwrite(str(tmp_path / "a.png"), (hu + 32768).astype(np.uint16), options)
    read = SliceFolder(tmp_path).read("a.png")
    np.testing.assert_array_equal(read, hu)
    assert read.flags.c_contiguous and read.flags.writeable


def test_where_kornia_is_installed_it_decodes(tmp_path, monkeypatch):
    pytest.importorskip("kornia_rs")
    hu = np.arange(-600, 600).reshape(30, 40)
    write_png(tmp_path, 1, hu)
    monkeypatch.setattr(cv2, "imdecode", None)
    np.testing.assert_array_equal(SliceFolder(tmp_path).read(f"{SERIES}/001.png"), hu)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint16)])
def test_both_refuse_other_images(tmp_path, decoder, image):
    cv2.imwrite(str(tmp_path / "a.png"), image)
    with pytest.raises(ValueError, match=r"a\.png.*16-bit grey"):
        SliceFolder(tmp_path).read("a.png")


def test_both_refuse_damage_and_a_header_that_promises_too_much(tmp_path, decoder):
    path = write_png(tmp_path, 1, np.random.default_rng(0).integers(0, 999, (64, 64)))
    good = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + good[24:29]
    huge = good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:]
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    for content in (good[:-60], huge, bytes(flipped), good[:24], good[:26]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"001\.png: the PNG is truncated or damaged"):
            SliceFolder(tmp_path).read(f"{SERIES}/001.png")


# Resampling


@pytest.mark.parametrize("num_slices", [1, 3, 7, 9])
@pytest.mark.parametrize("thickness", THICKNESSES)
def test_exact_is_np_interp_over_z(thickness, num_slices):
    volume = random_volume(80, 120)
    for key in (80, 81, 95, 120):  # at and near an end too, where np.interp repeats the end
        stack, stack_mm = load(
            MemoryFolder(volume), key, thickness, (80, 120), num_slices, "normalize"
        )
        assert stack_mm == 2.0
        assert stack.dtype == np.int16
        z = np.array([(i - key) * thickness for i in volume])
        for d in range(num_slices):
            at = 2.0 * (d - num_slices // 2)
            for y, x in np.ndindex(stack.shape[:2]):
                expected = np.interp(at, z, [hu[y, x] for hu in volume.values()])
                assert abs(stack[y, x, d] - expected) <= 0.5 + 1e-2


@given(st.floats(0.25, 5), st.sampled_from([3, 5, 7]))
@settings(deadline=None, max_examples=50)
def test_exact_is_np_interp_for_any_thickness(thickness, num_slices):
    volume = random_volume(20, 90, shape=(1, 1))
    stack, _ = load(MemoryFolder(volume), 55, thickness, (20, 90), num_slices, "normalize")
    z = [(i - 55) * thickness for i in volume]
    at = [2.0 * (d - num_slices // 2) for d in range(num_slices)]
    expected = np.interp(at, z, [hu[0, 0] for hu in volume.values()])
    # Positions are rounded to 1e-6 of a slice: 1e-6 * 4000 HU on top of the rounding to integers.
    assert np.abs(stack[0, 0] - expected).max() <= 0.5 + 2e-2


@pytest.mark.parametrize("thickness", THICKNESSES)
def test_volume_linear_in_z_is_reproduced_exactly(thickness):
    slope = 50 / thickness  # whole HU at the own slices
    volume = {
        i: np.full((2, 2), round(slope * thickness * (i - 100)), np.int16) for i in range(200)
    }
    stack, _ = load(MemoryFolder(volume), 100, thickness, (0, 199), 7, "normalize")
    expected = [round(slope * 2 * p, 2) for p in range(-3, 4)]
    assert np.abs(stack[0, 0] - expected).max() <= 0.5
    # Without the half-way cases the rounding is determined.
    decided = np.abs(np.array(expected) % 1 - 0.5) > 0.02
    assert np.array_equal(stack[0, 0][decided], np.rint(expected)[decided])


def released_twin(volume, key, thickness, low, high, num_slices):
    """The released loader as a plain loop, one pixel: weights from the first neighbour only."""
    step = 2.0 / thickness
    a, b = step - math.floor(step), math.ceil(step) - step
    values = [float(volume[key][0, 0])]
    for p in range(1, num_slices // 2 + 1):
        sides = []
        for sign in (-1, 1):
            far = min(max(key + sign * math.ceil(step * p), low), high)
            near = min(max(key + sign * math.floor(step * p), low), high)
            if a == 0:
                sides.append(float(volume[far][0, 0]))
            else:
                sides.append(a * float(volume[far][0, 0]) + b * float(volume[near][0, 0]))
        values = [sides[0], *values, sides[1]]
    return np.array(values)


@pytest.mark.parametrize("thickness", THICKNESSES)
@pytest.mark.parametrize("key", [41, 55, 70])
def test_released_is_the_plain_loop(thickness, key):
    volume = random_volume(40, 70, shape=(1, 1))
    stack, _ = load(
        MemoryFolder(volume), key, thickness, (40, 70), 7, "normalize", interpolation="released"
    )
    expected = released_twin(volume, key, thickness, 40, 70, 7)
    assert np.abs(stack[0, 0] - expected).max() <= 0.5 + 2e-2


@given(st.floats(0.25, 5))
@settings(deadline=None, max_examples=30)
def test_released_equals_exact_with_three_slices(thickness):
    volume = random_volume(0, 40)
    stacks = [
        load(MemoryFolder(volume), 20, thickness, (0, 40), 3, "normalize", interpolation=name)[0]
        for name in INTERPOLATIONS
    ]
    assert np.array_equal(*stacks)


@pytest.mark.parametrize(("thickness", "same"), [(0.25, True), (1, True), (2, True), (5, False)])
def test_released_differs_from_exact_only_where_the_step_is_not_whole(thickness, same):
    volume = random_volume(0, 100)
    stacks = [
        load(MemoryFolder(volume), 50, thickness, (0, 100), 7, "normalize", interpolation=name)[0]
        for name in INTERPOLATIONS
    ]
    assert np.array_equal(*stacks) == same


# Policies


@pytest.mark.parametrize("thickness", [2.001, 2.5, 5.0])
def test_keep_thick_keeps_own_slices(thickness):
    volume = random_volume(103, 115)
    stack, stack_mm = load(MemoryFolder(volume), 109, thickness, (103, 115), 7, "keep_thick")
    assert stack_mm == thickness
    assert all(np.array_equal(stack[..., d], volume[106 + d]) for d in range(7))


@pytest.mark.parametrize("thickness", [0.25, 1.0, 1.5, 2.0])
def test_thin_is_the_same_under_both_policies(thickness):
    volume = random_volume(0, 100)
    kept, normalized = (
        load(MemoryFolder(volume), 50, thickness, (0, 100), 5, policy) for policy in POLICIES
    )
    assert kept[1] == normalized[1] == 2.0
    assert np.array_equal(kept[0], normalized[0])


def test_target_moves_the_border_between_thin_and_thick():
    volume = random_volume(0, 100)
    assert load(MemoryFolder(volume), 50, 3.0, (0, 100), 3, target_mm=3.0)[1] == 3.0
    assert load(MemoryFolder(volume), 50, 2.0, (0, 100), 3, target_mm=1.0)[1] == 2.0
    stack, stack_mm = load(MemoryFolder(volume), 50, 1.0, (0, 100), 3, target_mm=4.0)
    assert stack_mm == 4.0
    assert np.array_equal(stack[..., 2], volume[54])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("thickness", [None, math.nan, math.inf, 0, -1.0])
def test_unknown_thickness_repeats_the_key_slice(thickness, policy):
    folder = MemoryFolder(random_volume(0, 10))
    stack, stack_mm = load(folder, 5, thickness, (0, 10), 3, policy)
    assert stack_mm == math.inf
    assert all(np.array_equal(stack[..., d], folder.volume[5]) for d in range(3))
    assert folder.reads == [5]


@pytest.mark.parametrize("policy", POLICIES)
def test_slices_of_another_range_in_the_folder_are_not_touched(policy):
    folder = MemoryFolder(random_volume(0, 60))  # ranges 0..20, 21..40, 41..60 side by side
    for key in (21, 30, 40):
        stack, _ = load(folder, key, 2.0, (21, 40), 9, policy)
        for d in range(9):
            assert np.array_equal(stack[..., d], folder.volume[min(max(key + d - 4, 21), 40)])
    assert min(folder.reads) == 21
    assert max(folder.reads) == 40


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("thickness", THICKNESSES)
def test_every_file_is_read_at_most_once(thickness, policy, interpolation):
    folder = MemoryFolder(random_volume(45, 55))
    load(folder, 50, thickness, (45, 55), 7, policy, interpolation=interpolation)
    assert len(folder.reads) == len(set(folder.reads))


def test_only_files_with_a_say_are_read():
    folder = MemoryFolder(random_volume(0, 100))
    load(folder, 50, 0.1, (0, 100), 5)  # steps of 20 slices
    assert sorted(folder.reads) == [10, 30, 50, 70, 90]
    # 9 * (3 / 0.9) is 30 on paper and 29.999999999999996 in floating point.
    folder = MemoryFolder(random_volume(0, 100))
    load(folder, 50, 0.9, (0, 100), 19, target_mm=3.0)
    assert {20, 80} < set(folder.reads)
    assert not {21, 79} & set(folder.reads)


@pytest.mark.parametrize("thickness", [*THICKNESSES, 1.7, None])
def test_files_in_reach_are_those_that_some_stack_reads(thickness):
    for key, slice_range in ((60, (0, 120)), (3, (2, 9))):
        folder = MemoryFolder(random_volume(*slice_range, shape=(1, 1)))
        for policy in POLICIES:
            for interpolation in INTERPOLATIONS:
                for d in (1, 3, 5, 7):
                    load(
                        folder, key, thickness, slice_range, d, policy, interpolation=interpolation
                    )
        expected = [f"{SERIES}/{index:03d}.png" for index in sorted(set(folder.reads))]
        assert files_in_reach(f"{SERIES}/{key:03d}.png", thickness, slice_range, 7) == expected


def test_memory_layout_is_contiguous():
    assert load(MemoryFolder(random_volume(0, 9)), 4, 5.0, (0, 9), 5)[0].flags.c_contiguous


# Errors


def test_missing_neighbour_names_file_and_key_slice(tmp_path):
    for index in (1, 2, 4, 5):
        write_png(tmp_path, index, np.zeros((8, 8)))
    with pytest.raises(FileNotFoundError, match=r"003\.png.*000001_01_01/002\.png"):
        load(SliceFolder(tmp_path), 2, 5.0, (1, 5), 3)


def test_truncated_neighbour_names_file_and_key_slice(tmp_path):
    paths = [write_png(tmp_path, index, np.zeros((8, 8))) for index in (1, 2, 3)]
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"003\.png.*000001_01_01/002\.png"):
        load(SliceFolder(tmp_path), 2, 5.0, (1, 3), 3)


def test_neighbour_of_another_size_is_refused():
    folder = MemoryFolder({1: np.zeros((8, 8), np.int16), 2: np.zeros((8, 9), np.int16)})
    with pytest.raises(ValueError, match=r"002\.png.*\(8, 9\).*\(8, 8\)"):
        load(folder, 1, 5.0, (1, 2), 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_slices": 4}, "num_slices"),
        ({"num_slices": 0}, "num_slices"),
        ({"num_slices": -1}, "num_slices"),
        ({"policy": "thin"}, "policy"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"target_mm": 0}, "target_mm"),
        ({"target_mm": math.nan}, "target_mm"),
        ({"slice_range": (6, 9)}, "slice range"),
        ({"file_name": "005.png"}, "file_name"),
        ({"file_name": f"{SERIES}_005.jpg"}, "file_name"),
    ],
)
def test_bad_options_are_named(options, named):
    good = {
        "file_name": f"{SERIES}/005.png",
        "thickness_mm": 5.0,
        "slice_range": (0, 9),
        "num_slices": 3,
    }
    with pytest.raises(ValueError, match=named):
        load_slices(MemoryFolder(random_volume(0, 9)), **{**good, **options})


# Values that are no Hounsfield units


def store(tmp_path, values):
    path = tmp_path / SERIES / "001.png"
    path.parent.mkdir(exist_ok=True)
    assert cv2.imwrite(str(path), values)
    return SliceFolder(tmp_path), f"{SERIES}/001.png"


@pytest.mark.parametrize("intercept", [0, 1024, 8192])
def test_slices_stored_without_the_offset_are_refused(tmp_path, intercept):
    """As unsigned numbers they come out below -24,000 HU, as numbers with a sign on both sides."""
    hu = np.random.default_rng(0).integers(-1000, 1000, (64, 64))
    folder, name = store(tmp_path, (hu + intercept).astype(np.uint16))
    with pytest.raises(DataError, match=r"001\.png holds no Hounsfield units.*store HU \+ 32768"):
        folder.read(name)


@pytest.mark.parametrize("hu", [-3024, -1024, 0, 30_710])
def test_padding_air_and_metal_alone_are_read(tmp_path, hu):
    folder, name = store(tmp_path, np.full((64, 64), hu + 32768, np.uint16))
    assert (folder.read(name) == hu).all()


def test_one_plausible_pixel_is_enough(tmp_path):
    values = np.zeros((64, 64), np.uint16)
    values[3, 5] = 32768
    folder, name = store(tmp_path, values)
    assert folder.read(name)[3, 5] == 0


# Several folders, and files without neighbours


def test_of_several_folders_the_first_with_the_series_counts(tmp_path):
    hu = random_volume(1, 3)
    for folder, series, value in (("a", "1_1_1", 1), ("b", "1_1_1", 2), ("b", "2_1_1", 3)):
        write_png(tmp_path / folder, 1, hu[value], series)
    folder = SliceFolder(tmp_path / "a", tmp_path / "nowhere", tmp_path / "b")
    folder = pickle.loads(pickle.dumps(folder))
    np.testing.assert_array_equal(folder.read("1_1_1/001.png"), hu[1])
    np.testing.assert_array_equal(folder.read("2_1_1/001.png"), hu[3])
    assert folder.root_of("3_1_1/001.png") == tmp_path / "a"


def test_without_a_slice_range_the_key_slice_is_alone(tmp_path):
    hu = random_volume(1, 1)[1]
    path = write_png(tmp_path, 1, hu)
    path.rename(tmp_path / "scan.png")
    stack, thickness = load_slices(SliceFolder(tmp_path), "scan.png", 1.0, None, 3)
    assert thickness == math.inf and stack.shape == (*hu.shape, 3) and stack.dtype == np.int16
    assert (stack == hu[..., None]).all()
    with pytest.raises(ValueError, match="num_slices must be odd"):
        load_slices(SliceFolder(tmp_path), "scan.png", 1.0, None, 2)
