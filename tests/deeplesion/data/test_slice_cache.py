"""The slice cache against the PNGs that it is a copy of."""

import json
import shutil
import subprocess
import sys
import zlib
from collections import namedtuple

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplesion.data import slice_cache, slices
from deeplesion.data.slice_cache import CachedSliceFolder, fill_cache
from deeplesion.data.slices import INTERPOLATIONS, POLICIES, SliceFolder, load_slices
from deeplesion.errors import CacheError, MissingDataError

NAME = "000001_01_01/007.png"


@pytest.fixture
def data(phantom, tmp_path):
    """The phantom, its files our own to spoil."""
    root = tmp_path / "DeepLesion"
    shutil.copytree(phantom, root)
    return root


def write_png(root, hu, compression=1):
    path = root / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    image = (hu.astype(np.int32) + 32768).astype(np.uint16)
    assert cv2.imwrite(str(path), image, [cv2.IMWRITE_PNG_COMPRESSION, compression])
    return path


@pytest.fixture
def one(tmp_path):
    """A cache of one slice."""
    write_png(tmp_path / "png", np.random.default_rng(0).integers(-1024, 3000, (24, 30)))
    folder = CachedSliceFolder(tmp_path / "png", tmp_path / "cache")
    assert folder.write(NAME)
    return folder


def entries(root):
    cache = root / "slice_cache"
    return {str(path.relative_to(cache).with_suffix(".png")) for path in cache.rglob("*.b2nd")}


# Content


@pytest.mark.parametrize("shape", [(512, 128), (1, 1), (3, 70), (1024, 1024)])
def test_cached_is_the_png_bit_for_bit(tmp_path, shape):
    hu = np.random.default_rng(0).integers(-32768, 32768, shape)
    if hu.size == 2**16:
        hu = np.arange(-32768, 32768).reshape(shape)
    write_png(tmp_path / "png", hu)
    folder = CachedSliceFolder(tmp_path / "png", tmp_path / "cache")
    assert folder.write(NAME) and not folder.write(NAME)
    read, expected = folder.read(NAME), SliceFolder(tmp_path / "png").read(NAME)
    assert read.dtype == expected.dtype == np.int16 and read.shape == shape
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(read, hu)


def test_it_holds_the_slices_that_training_touches_and_no_other(cached_phantom):
    """Against what load_slices reads under every option."""
    reads = set()

    class Recorder(SliceFolder):
        def read(self, file_name):
            reads.add(file_name)
            return np.zeros((1, 1), np.int16)

    images = json.loads((cached_phantom / "annotations/train.json").read_text())["images"]
    thickness = {image["thickness_mm"] for image in images}
    assert min(thickness) < 2 < max(thickness)
    for image in images:
        for policy in POLICIES:
            for interpolation in INTERPOLATIONS:
                for d in (1, 3, 5, 7):
                    load_slices(
                        Recorder("png"), image["file_name"], image["thickness_mm"],
                        image["slice_range"], d, policy, interpolation=interpolation,
                    )  # fmt: skip
    assert entries(cached_phantom) == reads
    assert reads < {
        f"{p.parent.name}/{p.name}" for p in (cached_phantom / "Images_png").rglob("*.png")
    }


def test_any_program_can_read_it(one):
    blosc2 = pytest.importorskip("blosc2")
    np.testing.assert_array_equal(blosc2.open(str(one.copy(NAME)))[:], one.read(NAME))


# In training


def dataset(root, **options):
    from mmengine.registry import DefaultScope, init_default_scope

    import mmdet_ext.datasets.transforms  # noqa: F401
    from mmdet_ext.datasets.deeplesion import DeepLesionDataset

    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")
    return DeepLesionDataset(
        data_root=str(root),
        ann_file="annotations/train.json",
        data_prefix=dict(img="Images_png"),
        stack=dict(num_slices=7),
        pipeline=[
            dict(type="LoadCTSlices"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomAffineResize", size=128),
            dict(type="PackCTInputs"),
        ],
        **options,
    )


def no_png(*_):
    raise AssertionError("a PNG was decoded")


def test_samples_are_those_of_the_pngs(cached_phantom, monkeypatch):
    from mmdet_ext.datasets.sampler import SampleKey

    keys = [SampleKey(0, 1, index) for index in range(len(dataset(cached_phantom)))]
    expected = [dataset(cached_phantom)[key] for key in keys]
    monkeypatch.setattr(slices, "_decode_png", no_png)
    found = [dataset(cached_phantom, cache="slice_cache")[key] for key in keys]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
        masks = [x["data_samples"].gt_instances.masks.masks for x in (a, b)]
        np.testing.assert_array_equal(*masks)


def test_pngs_are_read_where_no_cache_is(phantom, monkeypatch):
    data = dataset(phantom, cache="slice_cache")
    assert data[0]["inputs"].shape == (1, 7, 128, 128)
    monkeypatch.setattr(slices, "_decode_png", no_png)
    with pytest.raises(AssertionError, match="PNG was decoded"):
        data[0]


def test_training_reads_the_cache_and_testing_the_pngs(repository, cached_phantom, monkeypatch):
    from mmdet_ext.config.experiment import read_experiment

    monkeypatch.setenv("DEEPLESION_ROOT", str(cached_phantom))
    config = read_experiment(repository / "configs/alignshift_7slice.py")
    caches = {}
    for split in ("train", "val", "test"):
        cache = config[f"{split}_dataloader"].dataset.get("cache")
        caches[split] = dataset(cached_phantom, cache=cache).cache
    assert caches == dict(train=str(cached_phantom / "slice_cache"), val=None, test=None)


# Errors


def test_slice_that_is_not_there_is_named_with_the_way_out(one):
    write_png(one.root, np.zeros((4, 4))).rename(one.root / "000001_01_01/008.png")
    with pytest.raises(CacheError, match=r"008\.b2nd is not in the slice cache.*--cache"):
        one.read("000001_01_01/008.png")
    with pytest.raises(MissingDataError, match=r"slice not found: .*007\.png"):
        one.read(NAME)


@pytest.mark.parametrize("on_bad_slice", ["stop", "skip"])
def test_a_cache_with_gaps_stops_training(data, on_bad_slice):
    """Also one that would leave out bad slices: these are good."""
    fill_cache(data, 7, workers=1)
    training = dataset(data, cache="slice_cache", on_bad_slice=on_bad_slice)
    name = training.get_data_info(0)["file_name"]
    (data / "slice_cache" / name).with_suffix(".b2nd").unlink()
    with pytest.raises(CacheError, match=f"not in the slice cache.*stack around {name}"):
        training[0]
    (data / "Images_png" / name).unlink()
    if on_bad_slice == "skip":
        assert training[0]["data_samples"].file_name != name
    else:
        with pytest.raises(MissingDataError, match="slice not found"):
            training[0]


@pytest.mark.parametrize("compression", [0, 1])
def test_another_png_of_the_name_is_noticed(one, compression):
    """Also one of equal size: without compression all are."""
    first, second = np.random.default_rng(1).integers(-1024, 3000, (2, 24, 30))
    second[:4] = first[:4]
    write_png(one.root, first, compression)
    assert one.write(NAME)
    size = one.path(NAME).stat().st_size
    for hu in (second, first + (np.arange(720).reshape(24, 30) == 0)):
        write_png(one.root, hu, compression)
        if compression == 0:
            assert one.path(NAME).stat().st_size == size
        with pytest.raises(CacheError, match=r"007\.b2nd was made of another image.*--cache"):
            one.read(NAME)
    assert one.write(NAME)
    np.testing.assert_array_equal(one.read(NAME), hu)


def test_a_png_copied_elsewhere_is_the_same(one, tmp_path):
    shutil.copytree(one.root, tmp_path / "moved", copy_function=shutil.copyfile)
    moved = CachedSliceFolder(tmp_path / "moved", one.cache)
    np.testing.assert_array_equal(moved.read(NAME), one.read(NAME))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damage_is_named_and_never_read_as_an_image(tmp_path_factory, data):
    root = tmp_path_factory.getbasetemp() / "damaged"
    folder = CachedSliceFolder(root / "png", root / "cache")
    hu = np.random.default_rng(0).integers(-1024, 3000, (24, 30))
    if not folder.path(NAME).exists():
        write_png(root / "png", hu)
    folder.copy(NAME).unlink(missing_ok=True)
    folder.write(NAME)
    content = bytearray(folder.copy(NAME).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    folder.copy(NAME).write_bytes(content)
    try:
        np.testing.assert_array_equal(folder.read(NAME), hu)  # a byte that has no say
    except CacheError as error:
        assert "007.b2nd" in str(error) and "--cache" in str(error)
        assert folder.write(NAME)
        np.testing.assert_array_equal(folder.read(NAME), hu)


def test_wrong_values_under_a_right_frame_are_noticed(one):
    """The checksum is that of the pixels."""
    blosc2 = pytest.importorskip("blosc2")
    array = blosc2.ndarray_from_cframe(one.copy(NAME).read_bytes(), copy=True)
    assert array.schunk.vlmeta["crc32"] == zlib.crc32(one.read(NAME))
    array.schunk.vlmeta["crc32"] ^= 1
    one.copy(NAME).write_bytes(array.to_cframe())
    with pytest.raises(CacheError, match=r"007\.b2nd is damaged"):
        one.read(NAME)


def test_without_blosc2_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(CacheError, match=r"pip install blosc2.*cache=None"):
        CachedSliceFolder("png", "cache")


# Filling


def test_again_nothing_is_written_and_deeper_stacks_are_added(cached_phantom, data):
    shutil.copytree(cached_phantom / "slice_cache", data / "slice_cache")
    before = entries(data)
    report = fill_cache(data, 7, workers=1)
    assert (report.written, report.slices) == (0, len(before))
    deeper = fill_cache(data, 9, workers=1)
    assert deeper.written == len(entries(data) - before) == deeper.slices - report.slices > 0
    assert f"{deeper.written} written, {len(before)} were there" in str(deeper)


def test_interrupted_it_continues(data, monkeypatch):
    whole, done = slice_cache.write_whole, []

    def stop_at_ten(path, content):
        if len(done) == 10:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".part").write_bytes(content[:50])
            raise KeyboardInterrupt
        whole(path, content)
        done.append(path)

    monkeypatch.setattr(slice_cache, "write_whole", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(data, 7, workers=1)
    assert len(entries(data)) == 10
    monkeypatch.undo()
    report = fill_cache(data, 7, workers=2)
    assert report.written == report.slices - 10 and report.exit_code == 0
    assert not list((data / "slice_cache").rglob("*.part"))


def test_what_cannot_be_read_is_listed_and_the_rest_written(data):
    image = json.loads((data / "annotations/train.json").read_text())["images"][0]
    path = data / "Images_png" / image["file_name"]
    path.write_bytes(path.read_bytes()[:-40])
    report = fill_cache(data, 1, workers=1)
    assert report.exit_code == 1 and report.written == report.slices - 1
    assert path.name in report.problems[0] and f"UNREADABLE: cannot read {path}" in str(report)


def test_a_full_disk_is_said_before_anything_is_written(data, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs .* MB more, 1,000 bytes are free"):
        fill_cache(data, 7, workers=1)
    assert not entries(data)


def test_command(repository, data):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, repository / "tools/prepare_data.py", *arguments],
            capture_output=True,
            text=True,
        )

    done = run(data, "--workers", "1", "--cache")
    assert done.returncode == 0, done.stderr
    assert "Slice cache for training on up to 7 slices" in done.stdout.splitlines()[-1]
    assert entries(data)
    wrong = run("--cache", data)
    assert wrong.returncode == 2 and "ROOT goes before --cache" in wrong.stderr
