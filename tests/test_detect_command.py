"""tools/detect.py, from a scan to its files: once, again, interrupted, a folder of scans of which
one is broken; whose scan it is stays out."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from ct_volumes.results_folder import names_patient
from ct_volumes.scan_out import write_dicom_series, write_nifti_scan
from deeplesion.errors import DataError
from deeplesion.evaluation.volume_froc import Calibration, write_calibration
from mmdet_ext.engine.predict import LesionDetector

from .mmdet_ext.small_detector import ROOT, SMALL, body_of, config_of, volume_of, write_checkpoint
from .run_command import command

FILES = ["lesions.csv", "lesions.json", "lesions.nii.gz", "prompts.json", "report.html"]
FILES += ["slices.jsonl"]
DICOM_FILES = sorted([*FILES, "lesions.seg.dcm", "lesions.sr.dcm"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(config_of(), tmp_path_factory.mktemp("weights") / "epoch_1.pth")


@pytest.fixture
def detect(checkpoint, monkeypatch, capsys):
    """Runs the command in this process; returns its exit status, and what it printed."""
    main = runpy.run_path(str(ROOT / "tools/detect.py"))["main"]
    network = [f"{name}={value}".replace(" ", "") for name, value in SMALL.items()]

    def run(*arguments, checkpoint=checkpoint):
        of_all = ["--config", "demo/alignshift_3slice", "--checkpoint", checkpoint]
        of_all += ["--device", "cpu", "--cfg-options", *network]
        command = ["tools/detect.py", *map(str, [*arguments, *of_all])]
        monkeypatch.setattr(sys, "argv", command)
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        text = status if isinstance(status, str) else ""
        return (1 if text else status), printed.out + printed.err + text

    return run


def volume(seed=0, slices=5):
    return volume_of(body_of(slices, 200.0 + 20 * seed), 1.0, (3.0, 3.0))


@pytest.fixture
def scan(tmp_path):
    write_nifti_scan(volume(), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_scan_leaves_its_files_and_is_not_done_twice(detect, scan, tmp_path, monkeypatch):
    out = tmp_path / "out"
    status, text = detect(scan, "--out", out, "--interval", "1")
    assert status is None, text
    assert names(out) == FILES
    content = json.loads((out / "lesions.json").read_text())
    assert content["lesions"] and content["algorithm"]["name"] == "alignshift_3slice"
    assert content["algorithm"]["options"]["interval_mm"] == 1.0
    assert "5 slices of 128 x 128, every 1 mm, pixels of 3 x 3 mm" in text
    assert "number  score  slice  long x short mm  volume mm3" in text
    assert f"{len(content['lesions'])}\n" in text and f"{out}: lesions.json" in text

    monkeypatch.setattr(LesionDetector, "detect_slices", None)  # would fail
    before = (out / "lesions.json").read_bytes()
    status, text = detect(scan, "--out", out, "--interval", "1")
    assert status is None and "finished" in text
    assert (out / "lesions.json").read_bytes() == before

    status, text = detect(scan, "--out", out, "--interval", "2")
    assert status == 1 and "interval_mm 1.0, now 2.0" in text and "another --out" in text
    assert (out / "lesions.json").read_bytes() == before


def test_another_threshold_is_no_other_detection(detect, scan, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise RuntimeError("interrupted while the page is written")

    out, again = tmp_path / "out", tmp_path / "again"
    for folder, score in ((out, "0.4"), (again, "0.6")):
        detect(scan, "--out", folder, "--min-score", score)
    with monkeypatch.context() as patch:
        patch.setattr(LesionDetector, "_detect_batch", None)  # would fail
        # Interrupted, the files are neither of the one threshold nor of the other.
        patch.setattr("ct_volumes.page.write_page", interrupt)
        with pytest.raises(RuntimeError, match="interrupted while the page is written"):
            detect(scan, "--out", again, "--min-score", "0.4")
        assert "lesions.json" not in names(again)
    monkeypatch.setattr(LesionDetector, "_detect_batch", None)
    status, text = detect(scan, "--out", again, "--min-score", "0.4")
    assert status is None and "score 0.4" in text
    for name in ("lesions.csv", "lesions.json", "prompts.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_lesions_are_those_of_the_python_call(detect, checkpoint, scan, tmp_path):
    detect(scan, "--out", tmp_path / "out", "--min-score", "0.3", "--batch-size", "2")
    written = json.loads((tmp_path / "out/lesions.json").read_text())["lesions"]
    detector = LesionDetector(config_of(), checkpoint, "cpu")
    lesions = detector.detect(volume(), min_score=0.3, progress=False)
    assert len(written) == len(lesions) > 0
    np.testing.assert_allclose(
        [w["score"] for w in written], [each.score for each in lesions], atol=1e-5
    )
    assert min(w["score"] for w in written) >= 0.3


def test_without_lesions_it_says_so_and_still_writes(detect, tmp_path):
    hu = np.full((3, 128, 128), -1000)
    hu[:, 100, 10:110] = 200  # a table
    air = volume_of(hu, 1.0, (3.0, 3.0))
    write_nifti_scan(air, tmp_path / "scan.nii")
    write_dicom_series(air, tmp_path / "dicom")
    for name, expected in (("scan.nii", FILES), ("dicom", DICOM_FILES)):
        out = tmp_path / f"out_{name}"
        status, text = detect(tmp_path / name, "--out", out)
        assert status is None, text
        assert "none with a score of 0.5 or more" in text
        assert names(out) == [file for file in expected if file != "lesions.seg.dcm"]
        assert json.loads((out / "lesions.json").read_text())["lesions"] == []


@pytest.mark.parametrize("at", [0, 1, 2])
def test_interrupted_it_goes_on(detect, scan, tmp_path, monkeypatch, at):
    out, calls = tmp_path / "out", []
    batch = LesionDetector._detect_batch

    def interrupted(self, volume, keys, images):
        calls.append(keys)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return batch(self, volume, keys, images)

    options = ("--interval", "1", "--batch-size", "2")
    with monkeypatch.context() as patch:
        patch.setattr(LesionDetector, "_detect_batch", interrupted)
        status, text = detect(scan, "--out", out, *options)
    assert status == 130 and "the same command continues where it stopped" in text
    assert names(out) == ["slices.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(LesionDetector, "_detect_batch", interrupted)
        assert detect(scan, "--out", out, *options)[0] is None
    assert len(calls) == 4  # three batches, of which one was begun twice
    detect(scan, "--out", tmp_path / "whole", *options)
    assert names(out) == FILES
    for name in ("lesions.csv", "lesions.json", "prompts.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_interrupted_while_files_are_written_the_scan_is_not_finished(
    detect, scan, tmp_path, monkeypatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ct_volumes.page.write_page", interrupted)
        assert detect(scan, "--out", tmp_path / "out")[0] == 130
    assert "slices.jsonl" in names(tmp_path / "out")
    assert "lesions.json" not in names(tmp_path / "out")
    monkeypatch.setattr(LesionDetector, "_detect_batch", None)  # nothing is left to detect
    assert detect(scan, "--out", tmp_path / "out")[0] is None
    assert names(tmp_path / "out") == FILES


def test_another_scan_in_its_place_is_noticed(detect, scan, tmp_path):
    out = tmp_path / "out"
    detect(scan, "--out", out)
    write_nifti_scan(volume(seed=1), scan)
    status, text = detect(scan, "--out", out)
    assert status == 1 and "holds other lesions (scan" in text


def test_a_calibration_sets_the_threshold(detect, scan, tmp_path):
    detect(scan, "--out", tmp_path / "all", "--min-score", "0.1")
    algorithm = json.loads((tmp_path / "all/lesions.json").read_text())["algorithm"]
    # At 0.8, 0.5 and 0.2 one, two and four false positives in two scans.
    rates = np.array([0.5, 1.0, 2.0])
    measured = Calibration(np.array([0.8, 0.5, 0.2]), rates, rates / 2, 2, 3, algorithm)
    file = tmp_path / "calibration.json"
    write_calibration(file, measured)
    status, text = detect(
        scan, "--out", tmp_path / "one", "--fp-per-scan", "1", "--calibration", file
    )
    assert status is None and "score 0.5, 1 false positives a scan" in text
    content = json.loads((tmp_path / "one/lesions.json").read_text())
    assert content["algorithm"]["options"] | dict(min_score=0, fp_per_scan=0) == algorithm[
        "options"
    ] | dict(min_score=0, fp_per_scan=0)
    assert content["algorithm"]["options"]["min_score"] == 0.5
    expected = [
        each["score"]
        for each in json.loads((tmp_path / "all/lesions.json").read_text())["lesions"]
        if each["score"] >= 0.5
    ]
    assert [each["score"] for each in content["lesions"]] == expected and expected

    status, text = detect(
        scan, "--out", tmp_path / "two", "--fp-per-scan", "1", "--calibration", file,
        "--interval", "3",
    )  # fmt: skip
    assert status == 1 and "measured otherwise (interval_mm 2.0, now 3.0)" in text


def test_results_do_not_go_among_the_scans(detect, scans):
    status, text = detect(scans, "--out", scans / "out")
    assert status == 1 and "give a folder elsewhere" in text
    assert not (scans / "out").exists()


@pytest.fixture
def scans(tmp_path):
    """Two good scans, and one cut off between them."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        write_nifti_scan(volume(seed, 3), folder / f"{name}.nii")
    (folder / "b.nii").write_bytes((folder / "b.nii").read_bytes()[:5000])
    return folder


def test_a_broken_scan_does_not_stop_the_others(detect, scans, tmp_path, monkeypatch):
    out = tmp_path / "out"
    status, text = detect(scans, "--out", out)
    assert status == 1 and "3 scans, 1 failed" in text
    assert names(out) == ["a", "c"] and names(out / "a") == names(out / "c") == FILES
    assert "b.nii" in text and re.search("^b +FAILED: .*b.nii", text, re.M)

    write_nifti_scan(volume(1, 3), scans / "b.nii")
    looked_at, whole = [], LesionDetector.detect_slices
    monkeypatch.setattr(
        LesionDetector, "detect_slices", lambda *a, **k: looked_at.append(a) or whole(*a, **k)
    )
    status, text = detect(scans, "--out", out)
    assert status is None and "3 scans, 0 failed" in text
    assert text.count("finished before") == 2 and len(looked_at) == 1
    assert names(out) == ["a", "b", "c"]


def test_an_error_of_ours_does_not_stop_the_others_either(detect, scans, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("ct_volumes.page.write_page", broken)
    status, text = detect(scans, "--out", tmp_path / "out")
    assert status == 1 and "3 scans, 3 failed" in text
    assert "Traceback" in text and "RuntimeError: a bug" in text and "please report it" in text


def test_dicom_gets_seg_and_sr_and_nobodys_name(detect, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    whose = dict(patient_name="Mustermann^Erika", patient_id="4711007")
    write_dicom_series(volume(0, 3), folder / "Mustermann_E_CT", **whose)
    write_dicom_series(volume(1, 3), folder / "case 2", patient_name="Doe^Jane", patient_id="8")
    status, text = detect(folder, "--out", tmp_path / "out")
    assert status is None, text
    first, second = names(tmp_path / "out")
    assert first == "case 2" and second.startswith("scan_")
    assert "Mustermann" not in text and "4711007" not in text
    for name in (first, second):
        assert names(tmp_path / "out" / name) == DICOM_FILES
        for file in ("lesions.json", "report.html", "lesions.csv", "prompts.json"):
            content = (tmp_path / "out" / name / file).read_text().casefold()
            assert "mustermann" not in content and "4711007" not in content
    assert detect(folder, "--out", tmp_path / "out")[1].count("finished before") == 2

    status, text = detect(folder, "--out", tmp_path / "identified", "--identify")
    assert names(tmp_path / "identified") == ["Mustermann_E_CT", "case 2"]
    assert "Mustermann" in (tmp_path / "identified/Mustermann_E_CT/lesions.json").read_text()


def test_with_or_without_identify_files_are_written_anew_from_what_was_found(
    detect, tmp_path, monkeypatch
):
    whose = dict(patient_name="Mustermann^Erika", patient_id="4711007")
    write_dicom_series(volume(0, 3), tmp_path / "scan", **whose)
    out = tmp_path / "out"
    assert detect(tmp_path / "scan", "--out", out)[0] is None
    monkeypatch.setattr(LesionDetector, "_detect_batch", None)  # would fail
    for options in (["--identify"], []):
        status, text = detect(tmp_path / "scan", "--out", out, *options)
        assert status is None and "finished" not in text and names(out) == DICOM_FILES
        assert ("Mustermann" in (out / "lesions.json").read_text()) == bool(options)
        assert (str(tmp_path / "scan") in (out / "report.html").read_text()) == bool(options)
        assert "finished" in detect(tmp_path / "scan", "--out", out, *options)[1]


@pytest.mark.parametrize("wrong", ["a note", "refused", "an error of ours"])
def test_the_console_tells_nobodys_name_either(detect, tmp_path, monkeypatch, wrong):
    """A scan whose files have no StudyInstanceUID, and one that fails after it was read."""
    folder = tmp_path / "scans"
    for number in (1, 2):
        whose = dict(patient_name="Mustermann^Erika", patient_id=f"4711{number}")
        write_dicom_series(volume(number, 3), folder / f"{number}_Mustermann", **whose)
    if wrong == "a note":
        for file in (folder / "1_Mustermann").iterdir():
            ds = pydicom.dcmread(file)
            del ds.StudyInstanceUID
            ds.save_as(file)
    else:
        kind = DataError if wrong == "refused" else RuntimeError

        def broken(path, lesions, volume, *_, **__):
            raise kind(f"cannot do it: {volume.source.instances[1].path} of {volume.source.path}")

        monkeypatch.setattr("ct_volumes.page.write_page", broken)
    status, text = detect(folder, "--out", tmp_path / "out")
    assert "Mustermann" not in text
    told = "there is no lesions.seg.dcm: a file has no StudyInstanceUID"
    told = told if wrong == "a note" else "cannot do it: a file of the scan"
    assert told in text and len(re.findall("^scan_.{8} ", text, re.M)) == 2
    assert status == (None if wrong == "a note" else 1)
    assert "Mustermann" in detect(folder, "--out", tmp_path / "identified", "--identify")[1]


def test_half_precision_is_refused_before_a_scan_is_read(detect, scans, tmp_path, monkeypatch):
    status, text = detect(scans, "--out", tmp_path / "out", "--amp")
    assert status == 1 and text.count("half precision") == 1 and "FAILED" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, named",
    [
        ("Mustermann CT", True), ("ct_MUSTERMANN", True), ("erika", True), ("4711-007", True),
        ("mustermannerika", True), ("47110", False), ("series 2", False), ("CT thorax", False),
    ],
)  # fmt: skip
def test_names_are_found_however_they_are_written(text, named, tmp_path):
    from ct_volumes.read import read_volume

    write_dicom_series(
        volume(0, 2), tmp_path / "x", patient_name="Mustermann^Erika", patient_id="4711007"
    )
    scan = read_volume(tmp_path / "x")
    assert names_patient(text, scan) == named


def test_the_list_of_series_needs_no_network(detect, tmp_path, capsys, monkeypatch):
    write_dicom_series(volume(), tmp_path / "scan", description="abdomen", kernel="B30f")
    main = runpy.run_path(str(ROOT / "tools/detect.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["tools/detect.py", str(tmp_path / "scan"), "--list"])
    assert main() is None
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["id", "slices", "size"]
    for part in ("5", "128 x 128", "1 mm", "B30f", "abdomen"):
        assert part in row


def test_a_scan_that_cannot_be_listed_does_not_stop_the_others(repository, scans):
    (scans / "b.nii").write_bytes((scans / "b.nii").read_bytes()[:100])
    text = command(repository, "tools/detect.py", scans, "--list", expect=1)
    first, second, third = text.strip().split("\n\n")
    for name, part in (("a", first), ("c", third)):
        assert part.splitlines()[0] == name and "128 x 128" in part
    assert second.startswith("b\n") and "b.nii is no NIfTI file" in second


@pytest.mark.parametrize(
    "options, message",
    [
        (["--interval", "0"], "--interval must be a positive number"),
        (["--min-score", "2"], "--min-score must be between 0.1 and 1"),
        (["--min-score", "0.05"], "takes part in no lesion"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--fp-per-scan", "1"], "--fp-per-scan and --calibration belong together"),
        (["--amp"], "half precision"),
        (["--series", "9"], "9"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options, message, detect, scan, tmp_path):
    status, text = detect(scan, "--out", tmp_path / "out", *options)
    assert status == 1 and message in text and "Traceback" not in text
    assert not (tmp_path / "out/lesions.json").exists()


def test_what_is_needed_is_said(detect, scan, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "tools/detect.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["tools/detect.py", str(scan), "--out", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--config, --checkpoint" in capsys.readouterr().err


def test_another_network_is_refused_before_the_work(detect, scan, tmp_path):
    config = config_of(**{"stack.policy": "normalize"})
    other = write_checkpoint(config, Path(tmp_path) / "epoch_9.pth")
    status, text = detect(scan, "--out", tmp_path / "out", checkpoint=other)
    assert status == 1 and "another network" in text
    status, text = detect(scan, "--out", tmp_path / "out", "--accept-differences", checkpoint=other)
    assert status is None
