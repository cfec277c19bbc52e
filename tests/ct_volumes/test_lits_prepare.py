"""Preparing LiTS: slices and masks are those of the resampled cases, and a second call goes on."""

import json
import shutil

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from ct_volumes.lits import STEP_MM, find_cases, read_case, resample
from ct_volumes.lits_prepare import prepare_lits
from ct_volumes.lits_samples import read_samples
from deeplesion.data.slices import SliceFolder
from deeplesion.errors import DataError, MissingDataError, UserError

pytest.importorskip("nibabel")


@pytest.fixture
def copy(phantom_lits, tmp_path):
    """Of the two short cases, 28 for training and 29 for validation."""
    for path in (phantom_lits / "files").glob("*-2*.nii"):
        shutil.copy2(path, tmp_path / path.name)
    return tmp_path


def test_slices_and_masks_are_those_of_the_resampled_cases(phantom_lits):
    prepared = phantom_lits / "prepared"
    samples = {
        name: read_samples(prepared / f"annotations/{name}.json") for name in ("train", "val")
    }
    cases = {n: {i["patient"] for i in c["images"]} for n, c in samples.items()}
    assert cases == {"train": {0, 28}, "val": {29}}
    folder = SliceFolder(prepared / "Images_png")
    for content in samples.values():
        assert content["info"]["step_mm"] == STEP_MM
        masks = {}
        for annotation in content["annotations"]:
            masks.setdefault(annotation["image_id"], []).append(annotation)
        for number in {i["patient"] for i in content["images"]}:
            case = read_case(find_cases(phantom_lits / "files").cases[number])
            expected = resample(case)
            images = [i for i in content["images"] if i["patient"] == number]
            assert len(images) == len(expected.labels)
            for index, image in enumerate(images):
                assert image["file_name"] == f"lits_{number:03d}/{index:03d}.png"
                assert image["slice_range"] == [0, len(images) - 1]
                assert (image["thickness_mm"], image["key_slice"]) == (1.5, index)
                assert (image["spacing_mm"] is None) == (not case.known_geometry)
                labels = np.zeros((128, 128), np.uint8)
                for annotation in masks.get(image["id"], []):
                    mask = coco_mask.decode(annotation["segmentation"])
                    labels = np.maximum(labels, mask * annotation["category_id"])
                np.testing.assert_array_equal(labels, expected.labels[index])
                if index % 7 == 0:
                    hu = folder.read(image["file_name"])
                    np.testing.assert_array_equal(hu, expected.volume.hu[index])


def test_what_is_finished_is_kept_and_what_has_changed_is_done_again(copy):
    out = copy / "out"
    first = prepare_lits(copy, out, workers=1, progress=False)
    assert first.exit_code == 0 and first.without_geometry == (28, 29)
    assert str(first).splitlines()[1].startswith("train: 1 cases, ")
    states = {p: p.stat().st_mtime_ns for p in (out / "Images_png").rglob("*.png")}
    annotations = (out / "annotations/train.json").read_bytes()
    prepare_lits(copy, out, workers=1, progress=False)
    assert states == {p: p.stat().st_mtime_ns for p in (out / "Images_png").rglob("*.png")}
    assert (out / "annotations/train.json").read_bytes() == annotations
    # Case 28 under another state, and 29 gone.
    path = copy / "segmentation-28.nii"
    content = bytearray(path.read_bytes())
    content[352:] = bytes(len(content) - 352)  # no label at all
    path.write_bytes(content)
    (copy / "volume-29.nii").unlink()
    second = prepare_lits(copy, out, workers=1, progress=False)
    assert list(second.slices) == ["train"] and second.slices["train"][2] == 0
    assert not (out / "annotations/val.json").exists()
    assert "val: no case of it" in str(second)
    assert json.loads((out / "annotations/train.json").read_text())["annotations"] == []


def test_a_slice_that_is_gone_is_written_again(copy):
    out = copy / "out"
    prepare_lits(copy, out, workers=1, progress=False)
    slices = {p: p.read_bytes() for p in (out / "Images_png").rglob("*.png")}
    gone = sorted(slices)[3]
    gone.unlink()
    prepare_lits(copy, out, workers=1, progress=False)
    assert {p: p.read_bytes() for p in (out / "Images_png").rglob("*.png")} == slices
    shutil.rmtree(gone.parent)
    prepare_lits(copy, out, workers=1, progress=False)
    assert {p: p.read_bytes() for p in (out / "Images_png").rglob("*.png")} == slices


@pytest.mark.parametrize("record", ["[]", "{}", "7"])
def test_a_record_that_is_none_counts_as_not_there(copy, record):
    out = copy / "out"
    prepare_lits(copy, out, workers=1, progress=False)
    path = out / "cases/lits_028.json"
    before = path.read_bytes()
    path.write_text(record)
    assert prepare_lits(copy, out, workers=1, progress=False).exit_code == 0
    assert path.read_bytes() == before


def test_over_changed_slices_there_is_no_list(copy, monkeypatch):
    out = copy / "out"
    prepare_lits(copy, out, workers=1, progress=False)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ct_volumes.lits_prepare.write_slice", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_lits(copy, out, workers=1, step_mm=3.0, progress=False)
    assert not any((out / "annotations").iterdir())
    prepare_lits(copy, out, workers=1, step_mm=3.0, progress=False)
    assert read_samples(out / "annotations/train.json")["info"]["step_mm"] == 3.0

    for path in copy.glob("volume-2*.nii"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="no case can be read"):
        prepare_lits(copy, out, workers=1, progress=False)
    assert not any((out / "annotations").iterdir())


def test_a_case_that_cannot_be_read_is_left_out_and_named(copy):
    path = copy / "segmentation-29.nii"
    path.write_bytes(path.read_bytes()[:-10])
    found = prepare_lits(copy, copy / "out", workers=1, progress=False)
    assert found.exit_code == 1 and list(found.left_out) == [29]
    assert "case 29 is left out" in str(found) and "copied whole" in str(found)
    (copy / "segmentation-28.nii").write_bytes(b"no image")
    with pytest.raises(DataError, match="no case can be read"):
        prepare_lits(copy, copy / "other", workers=1, progress=False)


def test_a_folder_of_something_else_is_refused(copy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="holds no prepared LiTS"):
        prepare_lits(copy, tmp_path / "full", progress=False)
    with pytest.raises(MissingDataError, match="no case of LiTS"):
        prepare_lits(tmp_path / "full", tmp_path / "out", progress=False)
