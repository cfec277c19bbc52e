"""Whole phantom scans on disk: DICOM, NIfTI and truth lie on one another."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from ct_volumes import optional, phantom_scans
from ct_volumes.phantom_scans import make_scans
from deeplesion.errors import UserError
from deeplesion.phantom import make
from deeplesion.phantom import scans as drawing

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")
TOOL = Path(__file__).parents[2] / "tools" / "make_phantom.py"
OPTIONS = dict(patients=2, size=128, seed=5, progress=False)


@pytest.fixture(autouse=True)
def short_bodies(monkeypatch):
    """The topmost 120 mm of the patients: a fifth of the work."""
    monkeypatch.setattr(drawing, "BODY_LENGTH", 120.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "BODY_LENGTH", 120.0)
        root = tmp_path_factory.mktemp("scans")
        assert make_scans(root, **OPTIONS) == root / "truth.json"
    return root


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


NAMES = ["phantom_001", "phantom_002"]  # slices of 1 mm and of 5 mm


def array_of(path):
    image = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine


def test_truth_boxes_as_the_3d_evaluation_reads_them(root):
    truth = json.loads((root / "truth.json").read_text())
    details = json.loads((root / "truth_lesions.json").read_text())
    assert list(truth) == ["test"] and sorted(truth["test"]) == sorted(details) == NAMES
    for name, boxes in truth["test"].items():
        labels, _ = array_of(root / "truth" / f"{name}.nii.gz")
        assert boxes == [lesion["box"] for lesion in details[name]["lesions"]] and boxes
        assert details[name]["shape"] == list(labels.shape[::-1])
        assert np.unique(labels).tolist() == list(range(len(boxes) + 1))
        assert len(details[name]["distractors"]) == len(boxes)
        for lesion in details[name]["lesions"]:
            voxels = np.argwhere(labels == lesion["number"])  # x, y, slice
            assert lesion["tight_box"] == [*voxels.min(0).tolist(), *voxels.max(0).tolist()]
            x1, y1, z1, x2, y2, z2 = lesion["box"]
            low, high = np.array([x1, y1, z1]), np.array([x2, y2, z2])
            assert (voxels >= low).all() and (voxels <= high).all()
            assert (high < labels.shape).all() and (low >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_dicom_and_nifti_hold_the_same_voxels_at_the_same_millimetres(root, name):
    hu, affine = array_of(root / "nifti" / f"{name}.nii.gz")
    labels, same = array_of(root / "truth" / f"{name}.nii.gz")
    assert (affine == same).all() and hu.shape == labels.shape
    files = [pydicom.dcmread(path) for path in sorted((root / "dicom" / name).iterdir())]
    assert len(files) == hu.shape[2]
    thickness = 5.0 if name == "phantom_002" else 1.0
    for k, ds in enumerate(files):
        assert np.array_equal(ds.pixel_array.T, hu[:, :, k])
        position = np.array(ds.ImagePositionPatient, float)
        np.testing.assert_allclose(affine[:3] @ (0, 0, k, 1), position * (-1, -1, 1), atol=1e-4)
        assert [float(v) for v in ds.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0]
        assert float(ds.SliceThickness) == float(ds.SpacingBetweenSlices) == thickness
        np.testing.assert_allclose(position[2], -k * thickness)
        # Of the patient nothing that the folder's name holds: detect.py would hide the name.
        number = OPTIONS["seed"], int(name[-3:])
        assert (ds.PatientName, ds.PatientID) == ("Synthetic^Patient", "S{}N{}".format(*number))


@pytest.mark.parametrize("name", NAMES)
def test_lesions_are_where_the_truth_says_in_millimetres(root, name):
    labels, affine = array_of(root / "truth" / f"{name}.nii.gz")
    details = json.loads((root / "truth_lesions.json").read_text())[name]
    voxel = np.prod(details["spacing_mm"]) * details["thickness_mm"]
    for lesion in details["lesions"]:
        ras = np.array(lesion["centroid_mm"]) * (-1, -1, 1)
        at = (np.linalg.inv(affine) @ (*ras, 1))[:3]
        middle = np.argwhere(labels == lesion["number"]).mean(axis=0)
        off_mm = (at - middle) * (*details["spacing_mm"], details["thickness_mm"])
        assert np.abs(off_mm[:2]).max() < 1.0 and abs(off_mm[2]) < 0.5 * details["thickness_mm"] + 1
        filled = (labels == lesion["number"]).sum() * voxel
        assert filled == pytest.approx(lesion["volume_mm3"], rel=0.4)
        assert 5 <= lesion["diameters_mm"][0] <= 30.01
        assert lesion["diameters_mm"][1] <= lesion["diameters_mm"][0] + 1e-6


def test_same_bytes_in_whatever_order_the_scans_are_made(root, tmp_path, monkeypatch):
    def backwards(work, tasks, workers, chunksize):
        yield from reversed([work(task) for task in reversed(tasks)])

    monkeypatch.setattr(phantom_scans, "in_processes", backwards)
    make_scans(tmp_path / "new", **OPTIONS)
    assert contents(tmp_path / "new") == contents(root)


@pytest.mark.parametrize(
    "module, at, call", [(phantom_scans, "write_nifti_labels", 2), (make, "write_whole", 3)]
)
def test_goes_on_after_an_interruption(root, tmp_path, monkeypatch, module, at, call):
    """In the truth of the second scan, or in its record; `make` writes the folder's note first."""
    write, calls, made = getattr(module, at), [], []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(module, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_scans(tmp_path, **OPTIONS)
    assert not (tmp_path / "truth.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(drawing, "BODY_LENGTH", 120.0)
    draw = phantom_scans.draw_scan
    monkeypatch.setattr(phantom_scans, "draw_scan", lambda p: (made.append(p.name), draw(p))[1])
    make_scans(tmp_path, **OPTIONS)
    assert made == NAMES[1:]
    assert contents(tmp_path) == contents(root)


def test_finished_scans_are_left_alone_and_other_folders_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(phantom_scans, "write_scan", None)
    before = contents(root)
    make_scans(root, **OPTIONS)
    assert contents(root) == before
    with pytest.raises(FileExistsError, match=r"'seed': 5.*'seed': 6"):
        make_scans(root, **{**OPTIONS, "seed": 6})
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        make_scans(tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("patients", 0), ("size", 127), ("size", 513), ("seed", -1), ("workers", 0)],
)
def test_options_out_of_range_are_refused(tmp_path, option, value):
    with pytest.raises(UserError, match=rf"{option} is {value}: .* from \d+ to \d+"):
        make_scans(tmp_path / "new", **{**OPTIONS, option: value})
    assert not (tmp_path / "new").exists()


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pydicom and nibabel: pip install .*\[ct\]"):
        make_scans(tmp_path / "new", **OPTIONS)
    assert not (tmp_path / "new").exists()


def test_the_tool_takes_a_phantom_or_scans(root, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")

    run("--scans", tmp_path / "s", "--patients", 2, "--size", 128, "--seed", 5)
    assert capsys.readouterr().out == f"{tmp_path / 's' / 'truth.json'} written\n"
    assert contents(tmp_path / "s") == contents(root)
    for wrong, message in (
        ((), "one of the arguments root --scans --lits --lidc is required"),
        (("a", "--scans", "b"), "not allowed with argument root"),
        (("--scans", tmp_path / "t", "--patients", 0), "patients is 0"),
    ):
        with pytest.raises(SystemExit) as refused:
            run(*wrong)
        assert message in capsys.readouterr().err + str(refused.value)
