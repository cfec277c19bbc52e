"""Folders of lesions.json against boxes in 3D: what is read, what is refused, the command."""

import json
import pickle
import runpy
import subprocess
import sys

import numpy as np
import pytest

from deeplesion.errors import DataError, MissingDataError
from deeplesion.evaluation.volume_evaluation import (
    CRITERIA,
    evaluate_volumes,
    patient_of,
    read_volume_detections,
)
from deeplesion.evaluation.volume_froc import read_calibration, volume_froc
from deeplesion.report.volumes import write_volume_evaluation

ALGORITHM = {"name": "alignshift_3slice", "checkpoint_sha256": "0" * 64, "options": {}}
NAMES = ["000001_01_01_103-115", "000001_02_01_008-023", "000002_01_01_001-040", "mine"]


def write_lesions(folder, name, rows, algorithm=ALGORITHM):
    """rows: x1, y1, first, x2, y2, last, score."""
    lesions = [dict(number=n, box=row[:6], score=row[6]) for n, row in enumerate(rows, 1)]
    (folder / name).mkdir(parents=True)
    content = dict(algorithm=algorithm, lesions=lesions)
    (folder / name / "lesions.json").write_text(json.dumps(content))


@pytest.fixture
def detected(tmp_path):
    """Four scans: a hit and a false positive, nothing, a near miss, a hit; none in the second."""
    folder = tmp_path / "detected"
    write_lesions(folder, NAMES[0], [[10, 10, 2, 29.5, 29, 4, 0.9], [99, 9, 0, 110, 20, 12, 0.3]])
    write_lesions(folder, NAMES[1], [])
    write_lesions(folder, NAMES[2], [[10, 10, 2, 50, 50, 9, 0.8]])
    write_lesions(folder, NAMES[3], [[1, 1, 1, 5, 5, 5, 0.7]])
    return folder


TRUTHS = {
    NAMES[0]: np.array([[10, 10, 105, 29, 29, 107]]),  # FIRST, 103, and slices 2 to 4
    NAMES[1]: np.zeros((0, 6)),
    NAMES[2]: np.array([[10, 10, 3, 20, 20, 10]]),
    NAMES[3]: np.array([[1, 1, 1, 5, 5, 5]]),
}


def test_slices_of_sub_volumes_are_numbered_as_their_files(detected):
    found = read_volume_detections(detected, NAMES)
    assert found.boxes[0].tolist() == [
        [10, 10, 105, 29.5, 29, 107, 0.9],
        [99, 9, 103, 110, 20, 115, 0.3],
    ]
    assert found.boxes[1].shape == (0, 7)
    assert found.boxes[2].tolist() == [[10, 10, 3, 50, 50, 10, 0.8]]
    assert found.boxes[3].tolist() == [[1, 1, 1, 5, 5, 5, 0.7]]
    assert (found.algorithm, found.missing, found.others) == (ALGORITHM, [], [])


def test_scans_without_a_file_are_refused_or_counted(detected):
    names = [*NAMES[:3], "a", "b"]
    with pytest.raises(MissingDataError, match=r"lacks 2 of 5 scans: a, b\..*--count-missing"):
        read_volume_detections(detected, names)
    found = read_volume_detections(detected, names, count_missing=True)
    assert (found.missing, found.others) == (["a", "b"], ["mine"])
    assert [len(rows) for rows in found.boxes] == [2, 0, 1, 0, 0]
    with pytest.raises(MissingDataError, match="holds none of the 2 scans"):
        read_volume_detections(detected, ["a", "b"], count_missing=True)
    with pytest.raises(MissingDataError, match="no folder"):
        read_volume_detections(detected / "nothing", names)


def test_scans_of_different_algorithms_are_refused(detected):
    write_lesions(detected, "other", [], {**ALGORITHM, "options": {"interval_mm": 5.0}})
    with pytest.raises(DataError, match=r"000001_01_01.*other.*different algorithms"):
        read_volume_detections(detected, [*NAMES, "other"])


def test_slices_beyond_those_of_the_name_are_refused(detected):
    write_lesions(detected, "000009_01_01_001-004", [[1, 1, 0, 2, 2, 4, 0.5]])
    with pytest.raises(DataError, match="slices 1 to 4 of its series"):
        read_volume_detections(detected, ["000009_01_01_001-004"])


GOOD = dict(box=[1, 1, 0, 2, 2, 4], score=0.5)


@pytest.mark.parametrize(
    "content",
    [
        [],
        dict(lesions=[GOOD]),
        dict(algorithm=ALGORITHM),
        dict(algorithm=ALGORITHM, lesions=5),
        dict(algorithm=ALGORITHM, lesions=[5]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, box=[1, 1, 0, 2, 2])]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, box=[1, 1, 0, 2, 2, "4"])]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, box=[1, 1, 5, 2, 2, 4])]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, box=[1, 1, 0.5, 2, 2, 4])]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, box=[1, 1, -1, 2, 2, 4])]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, score=1.5)]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, score=None)]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, score=float("nan"))]),
        dict(algorithm=ALGORITHM, lesions=[dict(GOOD, box=[10**400, 1, 0, 2, 2, 4])]),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/lesions.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"a/lesions.json must hold 'lesions'"):
        read_volume_detections(tmp_path, ["a"])
    (tmp_path / "a/lesions.json").write_text("{")
    with pytest.raises(DataError, match=r"a/lesions.json is not"):
        read_volume_detections(tmp_path, ["a"])


def test_patients_of_deeplesion_are_told_by_the_name():
    assert [patient_of(name) for name in NAMES] == ["000001", "000001", "000002", "mine"]


def test_rows_are_those_of_the_curves(detected):
    found = read_volume_detections(detected, NAMES)
    truths = list(TRUTHS.values())
    rows, curve = evaluate_volumes(found.boxes, truths, [patient_of(n) for n in NAMES], 200)
    assert [(row["overlap"], row["threshold"]) for row in rows] == list(CRITERIA)
    for row in rows:
        expected = volume_froc(found.boxes, truths, row["overlap"], row["threshold"])
        values = list(row["sensitivity"].values())
        np.testing.assert_allclose(values, 100 * expected.sensitivity_at())
        assert row["average"] == pytest.approx(np.mean(values))
        assert row["interval"].keys() == {*row["sensitivity"], "average"}
    # Of three lesions two; the box of the third is too large for its lesion by either measure.
    assert curve.sensitivity[-1] == pytest.approx(2 / 3)
    assert curve.fps_per_image[-1] == 2 / 4


def test_of_one_patient_there_is_no_interval_and_without_lesions_no_number():
    boxes, truths = [np.array([[1, 1, 1, 2, 2, 2, 0.5]])] * 2, [np.array([[1, 1, 1, 2, 2, 2]])] * 2
    rows, _ = evaluate_volumes(boxes, truths, ["a", "a"], 200)
    assert "interval" not in rows[0]
    rows, _ = evaluate_volumes(boxes, [np.zeros((0, 6))] * 2, ["a", "b"], 200)
    assert set(rows[0]["sensitivity"].values()) == {None}
    assert rows[0]["average"] is None


# The command


def test_the_command(detected, tmp_path, repository):
    truth = tmp_path / "boxes.pkl"
    truth.write_bytes(pickle.dumps({"val": {"x": np.zeros((0, 6))}, "test": TRUTHS}))
    run = subprocess.run(
        [sys.executable, "tools/evaluate.py", "--volumes", detected, "--truth", truth],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    for text in ("3D IoBB >= 0.3", "3D IoU >= 0.1", "1/8", "66.67", "calibration.json"):
        assert text in run.stdout
    out = detected / "evaluation"
    assert {p.name for p in out.iterdir()} == {
        "evaluation.json", "evaluation.csv", "table.md", "table.tex", "calibration.json"
    }  # fmt: skip
    content = json.loads((out / "evaluation.json").read_text())
    assert (content["scans"], content["scans_without_lesions"], content["lesions"]) == (4, 1, 3)
    assert content["algorithm"] == ALGORITHM
    calibration = read_calibration(out / "calibration.json")
    assert calibration.algorithm == ALGORITHM
    assert calibration.score_at(0.5) == 0.3
    assert calibration.score_at(0.3) == 0.7


def test_what_was_written_into_the_folder_is_no_scan(detected, tmp_path):
    truth = tmp_path / "truth.json"
    boxes = {name: rows.tolist() for name, rows in TRUTHS.items() if name != "mine"}
    truth.write_text(json.dumps({"test": {**boxes, "lost": []}}))
    written = []
    (detected / "evaluation").mkdir()
    (detected / "evaluation/calibration.json").write_text("of an earlier evaluation")
    for _ in range(2):
        with pytest.raises(MissingDataError, match="lost"):
            write_volume_evaluation(detected, truth, detected / "evaluation")
        printed = write_volume_evaluation(
            detected, truth, detected / "evaluation", count_missing=True, resamples=150
        )
        assert "PARTIAL DATA: 1 scans without detections" in printed
        assert "1 scans have no lesions.json: counted as empty." in printed
        assert "1 scans of the folder are not of this split: left out." in printed
        # Of one scan it is not known how many false positives it has.
        assert "Hence there is no calibration.json" in printed
        assert not (detected / "evaluation/calibration.json").exists()
        written.append((detected / "evaluation/evaluation.json").read_text())
    assert written[0] == written[1]
    assert json.loads(written[0])["counted_without_detections"] == ["lost"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a RESULT, or --volumes"),
        (["--volumes", "x"], "needs --truth"),
        (["a.json", "--truth", "x"], "--truth cannot be given without --volumes"),
        (
            ["a.json", "--volumes", "x", "--truth", "y", "--published"],
            "RESULT, --published cannot be given with --volumes",
        ),
        (["--volumes", "x", "--truth", "{truth}", "--split", "train"], "its splits are test"),
        (["--volumes", "x", "--truth", "nothing.json"], "nothing.json is not there"),
    ],
)
def test_the_command_refuses(arguments, message, repository, tmp_path, monkeypatch, capsys):
    truth = tmp_path / "truth.json"
    truth.write_text('{"test": {"a": []}}')
    arguments = [a.format(truth=truth) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "tools/evaluate.py"), run_name="__main__")
    assert end.value.code != 0
    assert message in f"{end.value.code} {capsys.readouterr().err}"
