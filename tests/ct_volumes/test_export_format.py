"""The folder of an exported detector: what is no export, of another version or damaged is refused
in a sentence; a new export takes the place of an old one as a whole."""

import hashlib
import json

import pytest

from ct_volumes.export_format import (
    MANIFEST,
    VERSION,
    check_folder,
    program_path,
    read_manifest,
    remove_others,
    write_manifest,
    write_program,
)
from deeplesion.errors import DataError, MissingDataError, UserError

CODER = dict(means=[0.0] * 4, stds=[1.0] * 4, ratio_clip=0.016, clip="edges")
ROI = dict(bins=7, scale=0.25, sampling_ratio=2, aligned=True)
MANIFEST_OF_ALL = dict(
    kind="onnx",
    experiment="alignshift_3slice",
    software="0.1.0",
    checkpoint_sha256="ab",
    network_sha256="cd",
    trained_as={},
    classes=["lesion"],
    stack=dict(num_slices=3, policy="keep_thick", target_mm=2.0, interpolation="exact"),
    input=dict(
        size=[96, 96], program_size=None, interpolation="linear", air_hu=-1024,
        windows_hu=[[-1024, 2050]],
    ),
    proposals=dict(
        CODER, stride=4, base_anchors=[[0.0, 0.0, 8.0, 8.0]], nms_pre=100, max_per_img=10,
        iou_threshold=0.7, min_size=0,
    ),
    boxes=dict(CODER, **ROI, score_thr=0.05, iou_threshold=0.5, max_per_img=10, shrink=0.0),
    masks=dict(ROI, per_class=True, threshold=0.5, whole_pixels=False),
)  # fmt: skip


def write(folder, **changes):
    names = ("features", "boxes", "masks")
    programs = {name: write_program(folder, name, "onnx", name.encode()) for name in names}
    manifest = {**MANIFEST_OF_ALL, "programs": programs, **changes}
    write_manifest(folder, manifest)
    return manifest


def change(folder, function):
    content = json.loads((folder / MANIFEST).read_text())
    function(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = write(tmp_path / "export")
    found = read_manifest(tmp_path / "export")
    assert {k: v for k, v in found.items() if k not in ("format", "version")} == manifest
    for name in ("features", "boxes", "masks"):
        path = program_path(tmp_path / "export", found, name)
        assert path.read_bytes() == name.encode()
        assert found["programs"][name]["sha256"] == hashlib.sha256(name.encode()).hexdigest()


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda m: m.update(version=VERSION + 1), f"version {VERSION + 1} of the format"),
        (lambda m: m.pop("version"), "version None of the format"),
        (lambda m: m.update(format="another"), "not of an exported detector"),
        (lambda m: m.pop("stack"), "there is no stack"),
        (lambda m: m["stack"].pop("num_slices"), "there is no stack.num_slices"),
        (lambda m: m["boxes"].update(score_thr="high"), "boxes.score_thr is 'high'"),
        (lambda m: m["boxes"].update(bins=True), "boxes.bins is True"),
        (lambda m: m["masks"].pop("threshold"), "there is no masks.threshold"),
        (lambda m: m.update(input=[]), "input is no object"),
        (lambda m: m["programs"].pop("boxes"), "there is no programs.boxes"),
        (lambda m: m.update(kind="tflite"), "kind is 'tflite'"),
    ],
)
def test_what_is_none_is_refused(function, message, tmp_path):
    write(tmp_path)
    change(tmp_path, function)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def test_folders_and_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(MissingDataError, match="no folder of an exported detector"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(MissingDataError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    write(tmp_path)
    content = (tmp_path / MANIFEST).read_text()
    for damaged in (content[:200], "[]", ""):
        (tmp_path / MANIFEST).write_text(damaged)
        with pytest.raises(DataError, match=r"manifest\.json is (damaged|not of)"):
            read_manifest(tmp_path)


def test_a_damaged_program_is_refused(tmp_path):
    manifest = write(tmp_path)
    path = program_path(tmp_path, manifest, "boxes")
    path.write_bytes(b"boxez")
    with pytest.raises(DataError, match="damaged: it is not as it was written"):
        program_path(tmp_path, manifest, "boxes")
    path.unlink()
    with pytest.raises(MissingDataError, match="is not there"):
        program_path(tmp_path, manifest, "boxes")


def test_a_new_export_takes_the_place_of_an_old_one(tmp_path):
    write(tmp_path)
    check_folder(tmp_path)
    new = write_program(tmp_path, "features", "onnx", b"new")
    # Until the manifest is there the old one holds, and an interrupted export leaves it whole.
    old = read_manifest(tmp_path)
    assert program_path(tmp_path, old, "features").read_bytes() == b"features"
    remove_others(tmp_path, old)
    assert not (tmp_path / new["file"]).exists()
    new = write_program(tmp_path, "features", "onnx", b"new")
    write_manifest(tmp_path, {**old, "programs": {**old["programs"], "features": new}})
    found = read_manifest(tmp_path)
    assert program_path(tmp_path, found, "features").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 4  # the old features' program is gone


def test_other_files_are_left_alone(tmp_path):
    check_folder(tmp_path / "new")
    (tmp_path / "features.onnx.new").write_bytes(b"half")  # of an interrupted export
    check_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        check_folder(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "thesis.txt")
    remove_others(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


PARTS = ["features.onnx.new", "boxes.pt2.new.part", "masks.onnx.new.12-0a1b2c3d.part"]
PARTS += ["manifest.json.part", "features-0123456789ab.onnx", "masks-0123456789ab.pt2"]


def test_what_an_interrupted_export_leaves_is_known(tmp_path):
    for name in PARTS:
        (tmp_path / name).write_bytes(b"half")
    check_folder(tmp_path)
    write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "name",
    ["features-final.csv", "boxes-2024.json", "masks-0123456789ab.nii.gz", "features.onnx"]
    + ["masks-of-me.onnx", "manifest.json.bak", "manifest.json5", "xfeatures-0123456789ab.onnx"],
)
def test_files_of_like_names_are_other_files(name, tmp_path):
    write(tmp_path)
    (tmp_path / name).write_bytes(b"years of work")
    write(tmp_path)
    remove_others(tmp_path, None)
    (tmp_path / MANIFEST).unlink()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(UserError, match="holds other files"):
        check_folder(tmp_path)


def test_a_manifest_of_something_else_is_another_file(tmp_path):
    (tmp_path / MANIFEST).write_text('{"name": "a web page"}')
    with pytest.raises(UserError, match="holds other files"):
        check_folder(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "deeplesi')  # damaged: written over
    check_folder(tmp_path)
