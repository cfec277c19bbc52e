"""tools/evaluate.py as a user types it."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from deeplesion.evaluation.evaluate import evaluate
from deeplesion.evaluation.results import write_results


@pytest.fixture(scope="module")
def result_files(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for result, name in zip(results, ("good", "poor")):
        write_results(folder / name / "results.json.gz", result.records)
    return folder


def command(repository, *arguments, expect=0):
    finished = subprocess.run(
        [sys.executable, "tools/evaluate.py", *map(str, arguments)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == expect, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout if expect == 0 else finished.stderr


@pytest.fixture(scope="module")
def evaluated(result_files, repository, phantom):
    """Two results with everything switched on, and what was printed."""
    output = command(
        repository, result_files / "good/results.json.gz", result_files / "poor/results.json.gz",
        "--by", "Patient_gender", "--table", phantom / "DL_info.csv", "--published",
        "--images", phantom / "Images_png", "--resamples", 150, "--seed", 3,
    )  # fmt: skip
    return result_files / "good" / "evaluation", output


def test_everything_is_written_beside_the_first_result(evaluated, result_files):
    out, output = evaluated
    expected = {
        "evaluation.json", "evaluation.csv", "table.md", "table.tex", "report.html",
        *(f"{name}.{kind}" for name in ("froc", "groups") for kind in ("png", "svg")),
    }  # fmt: skip
    assert {p.name for p in out.iterdir()} == expected
    assert all(name in output for name in expected)
    assert not (result_files / "poor" / "evaluation").exists()


def test_the_numbers_are_those_of_the_library(evaluated, results):
    content = json.loads((evaluated[0] / "evaluation.json").read_text())
    assert [e["name"] for e in content["evaluations"]] == ["good", "poor"]
    expected = evaluate(results[1], resamples=150, seed=3)
    found = content["evaluations"][1]
    assert found["breakdowns"].pop("Patient_gender")
    assert found == {**expected, "name": "poor"}
    (comparison,) = content["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("good", "poor")
    assert comparison["rows"][0]["average"][0] < 0
    assert len(content["published"]) > 50
    rows = list(csv.DictReader((evaluated[0] / "evaluation.csv").open()))
    assert {r["table"] for r in rows} >= {"slices", "lesion type", "Patient_gender", "AP50"}


def test_the_terminal_shows_every_table(evaluated):
    output = evaluated[1]
    for title in ("All, thin", "poor minus good", "PUBLISHED", "By lesion type", "By lesion diam",
                  "By Patient_gender", "AP50", "Diameters"):  # fmt: skip
        assert title in output, title


def test_without_published_there_are_none_and_files_name_themselves(
    result_files, repository, tmp_path
):
    output = command(
        repository, result_files / "good/results.json.gz", "--names", "A & B",
        "--out", tmp_path / "x", "--resamples", 100, "--pixel-offset", 0, "--iou-threshold", 0.6,
    )  # fmt: skip
    assert "PUBLISHED" not in output and "paired" not in output
    content = json.loads((tmp_path / "x" / "evaluation.json").read_text())
    assert "published" not in content and content["evaluations"][0]["name"] == "A & B"
    settings = dict(iou_threshold=0.6, pixel_offset=0, resamples=100, seed=0, resampled="patients")
    assert content["evaluations"][0]["settings"] == settings
    assert r"A \& B" in (tmp_path / "x" / "table.tex").read_text()


def test_sensitivity_by_the_tags_of_lesions(result_files, results, repository, tmp_path):
    """A row a tag: a lesion may have several."""
    rows = [x["lesion_idx"] for r in results[0].records for x in r["lesions"]]
    lines = [f"{row},{tag}" for row in rows[:9] for tag in ("nodule", "left lung")[: 1 + row % 2]]
    (tmp_path / "tags.csv").write_text("\n".join(["lesion_idx,tag", *lines]) + "\n")
    output = command(
        repository, result_files / "good/results.json.gz", "--by", "tag",
        "--table", tmp_path / "tags.csv", "--out", tmp_path / "x", "--resamples", 100,
    )  # fmt: skip
    assert "By tag: sensitivity (%) at false positives per image, those of all images" in output
    content = json.loads((tmp_path / "x" / "evaluation.json").read_text())["evaluations"][0]
    numbers = {row["group"]: row["lesions"] for row in content["breakdowns"]["tag"]}
    odd = sum(row % 2 for row in rows[:9])
    assert numbers == {"left lung": odd, "nodule": 9, "unknown": len(rows) - 9}
    assert content["by_lesion"][-1] == "tag"


def test_detections_of_another_tool_in_cocos_format(results, repository, phantom, tmp_path):
    """The pictures are found in a folder above them, too."""
    annotations = phantom / "annotations" / "test.json"
    images = {i["file_name"]: i["id"] for i in json.loads(annotations.read_text())["images"]}
    records = [r for r in results[0].records if r["file_name"] in images]
    found = [
        dict(image_id=images[r["file_name"]], category_id=1, score=score,
             bbox=[x1, y1, x2 - x1, y2 - y1])
        for r in records
        for (x1, y1, x2, y2), score in zip(r["boxes"], r["scores"])
    ]  # fmt: skip
    (tmp_path / "bbox.json").write_text(json.dumps(found))
    output = command(
        repository, tmp_path / "bbox.json", "--annotations", annotations, "--resamples", 100,
        "--images", phantom,
    )  # fmt: skip
    expected = evaluate(replace(results[0], records=records), resamples=100)["froc"][0]
    content = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert content["evaluations"][0]["froc"][0]["average"] == pytest.approx(expected["average"])
    assert "data:image/jpeg" in (tmp_path / "evaluation" / "report.html").read_text()
    assert f"{expected['average']:.2f}" in output
    error = command(repository, tmp_path / "bbox.json", expect=1)
    assert "give the file of its images and lesions, --annotations FILE" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.json.gz"], "missing.json.gz"),
        (["{good}", "{good}"], "--names must give each of the 2 results a name of its own"),
        (["{good}", "--names", "a", "b"], "each of the 1 results"),
        (["{good}", "--by", "patien"], "did you mean 'patient'?"),
        (["{good}", "--by", "Patient_gendre", "--table", "{csv}"], "mean 'Patient_gender'?"),
        (["{good}", "--annotations", "{csv}"], "--annotations is for detections in COCO's format"),
        (["{good}", "--resamples", "5"], "at least 100"),
        (["{good}", "--iou-threshold", "1.5"], "--iou-threshold must be in (0, 1]"),
        (["{good}", "--table", "{csv}"], "is read for --by alone"),
        (["{good}", "--by", "patient", "--table", "{csv}"], "is not needed for patient"),
        (["{good}", "--images", "nowhere"], "--images nowhere: there is no such folder"),
        (["{good}", "--images", "{folder}"], "key slices are not there, such as 0"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments, message, result_files, repository, phantom, tmp_path
):
    names = dict(
        good=result_files / "good/results.json.gz", csv=phantom / "DL_info.csv", folder=tmp_path
    )
    arguments = [a.format(**names) for a in arguments]
    error = command(repository, *arguments, "--out", tmp_path / "out", expect=1)
    assert error.strip().splitlines()[-1].startswith("evaluate: ") and message in error
    assert not (tmp_path / "out").exists()


def test_results_do_not_go_into_a_file(result_files, repository, tmp_path):
    (tmp_path / "out").touch()
    of_scans = ["--volumes", tmp_path, "--truth", tmp_path / "nothing"]
    for what in ([result_files / "good/results.json.gz"], of_scans):
        error = command(repository, *what, "--out", tmp_path / "out", expect=1)
        assert "is a file: give a folder" in error


def test_a_part_of_the_key_slices_is_said_to_be_one_above_all_tables(results, repository, tmp_path):
    write_results(tmp_path / "results.json.gz", results[0].records, 4817)
    output = command(repository, tmp_path / "results.json.gz", "--resamples", 100)
    note = f"PARTIAL DATA: {len(results[0].records)} of 4,817 key slices"
    assert output.startswith(note)
    assert (tmp_path / "evaluation/table.md").read_text().startswith(note)
