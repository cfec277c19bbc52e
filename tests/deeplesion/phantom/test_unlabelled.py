"""Lesions left out of the phantom's table: as many as asked for, of the training split alone, and
nothing else is another."""

import copy
import csv
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from deeplesion.data.dl_info import read_dl_info
from deeplesion.errors import UserError
from deeplesion.phantom import make as phantom
from deeplesion.phantom.make import make_phantom
from deeplesion.phantom.unlabelled import hide

OPTIONS = dict(patients=12, size=128, seed=5, progress=False)
TRUTH = "phantom_truth/truth.json"


def quick(monkeypatch):
    """Without the images, which cost the time; the rest of a series is drawn as ever."""
    monkeypatch.setattr(phantom, "render_slice", lambda *_: (0, []))
    monkeypatch.setattr(phantom, "add_noise", lambda *_: 0)
    monkeypatch.setattr(phantom, "write_slice", lambda *_: None)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled")
    make, known = phantom.make_series, {}

    def once(root, series):
        if series not in known:
            known[series] = make(root, series)
        return copy.deepcopy(known[series])

    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        patch.setattr(phantom, "make_series", once)
        for name, share in (("whole", 0), ("half", 0.5), ("most", 0.9)):
            make_phantom(folder / name, **OPTIONS, unlabelled=share)
    return folder


def rows(root):
    with open(root / "DL_info.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_images_and_masks_stay_and_without_the_option_every_byte(tmp_path, monkeypatch):
    """The body costs the time and is left out; noise, of the generator that all else comes from,
    is in the images."""
    monkeypatch.setattr(phantom, "render_slice", lambda body, *_: (np.zeros_like(body.x), []))
    options = dict(patients=3, size=128, seed=1, progress=False)
    make_phantom(tmp_path / "half", **options, unlabelled=0.5)
    make_phantom(tmp_path / "none", **options, unlabelled=0.0)
    monkeypatch.delattr(phantom, "hide")
    make_phantom(tmp_path / "whole", **options)
    whole, half, none = (contents(tmp_path / name) for name in ("whole", "half", "none"))
    assert none == whole and sum(path.parts[0] == "Images_png" for path in whole) > 20
    for file in (TRUTH, "phantom_truth/arguments.json"):
        assert b"labelled" not in whole[Path(file)]
    assert whole.keys() == half.keys()
    other = {path.as_posix() for path in whole if whole[path] != half[path]}
    assert other == {"DL_info.csv", TRUTH, "phantom_truth/arguments.json"}


@pytest.mark.parametrize("name, share", [("half", 0.5), ("most", 0.9)])
def test_that_share_of_the_training_split_is_gone_and_no_other_row(roots, name, share):
    whole, left = rows(roots / "whole"), rows(roots / name)
    clean = [row for row in whole if row["Train_Val_Test"] == "1" and row["Possibly_noisy"] == "0"]
    hidden = [row for row in whole if row not in left]
    assert len(hidden) == round(share * len(clean)) > 5
    assert all(row in clean for row in hidden)
    assert left == [row for row in whole if row not in hidden]  # in the same order
    slices = [row["File_name"] for row in whole]
    many = [row for row in hidden if slices.count(row["File_name"]) > 1]
    kept = {row["File_name"] for row in left}
    # By lesion, not by key slice: some key slices lose some of theirs, some all and are none then.
    assert any(row["File_name"] in kept for row in many)
    assert any(row["File_name"] not in kept for row in hidden)
    lesions = read_dl_info(roots / name / "DL_info.csv")
    assert len(lesions) == len(left)


def test_the_truth_keeps_all_and_marks_what_is_hidden(roots):
    whole, half = (json.loads((roots / name / TRUTH).read_text()) for name in ("whole", "half"))
    table = [r["File_name"] for r in rows(roots / "half")]
    hidden = 0
    for key, entry in half.items():
        marks = [lesion.pop("labelled") for lesion in entry["lesions"]]
        assert sum(marks) == table.count(key.replace("/", "_"))
        hidden += len(marks) - sum(marks)
    assert half == whole
    assert hidden == len(rows(roots / "whole")) - len(table)
    # Which row is which: a marked lesion's box is that of a row, up to what a reader is off.
    half = json.loads((roots / "half" / TRUTH).read_text())
    for row in rows(roots / "half"):
        key = "/".join(row["File_name"].rsplit("_", 1))
        box = [float(value) - 1 for value in row["Bounding_boxes"].split(", ")]
        near = [
            lesion["labelled"]
            for lesion in half[key]["lesions"]
            if max(abs(a - b) for a, b in zip(lesion["bbox"], box)) < 1.5
        ]
        assert row["Possibly_noisy"] == "1" or near == [True]


def test_the_draw_is_a_function_of_the_seed():
    lesion = dict(bbox=[1, 2, 3, 4])
    record = dict(
        rows=[row_of(1)] * 40, truth={"a": dict(lesions=[dict(lesion) for _ in range(40)])}
    )
    left = [[each["labelled"] for each in truths_of(record, seed)] for seed in (0, 0, 1)]
    assert left[0] == left[1] != left[2]


def row_of(split, noisy=0):
    row = [0] * len(phantom.DL_INFO_COLUMNS)
    row[list(phantom.DL_INFO_COLUMNS).index("Train_Val_Test")] = split
    row[list(phantom.DL_INFO_COLUMNS).index("Possibly_noisy")] = noisy
    return row


def truths_of(record, seed, share=0.5):
    record = copy.deepcopy(record)
    hide([record], share, seed)
    return record["truth"]["a"]["lesions"]


def test_noisy_rows_and_the_last_lesion_stay():
    record = dict(
        rows=[row_of(1, 1), row_of(1), row_of(1), row_of(2), row_of(3)],
        truth={"a": dict(lesions=[{} for _ in range(5)])},
    )
    for seed in range(20):
        marks = [lesion["labelled"] for lesion in truths_of(record, seed, 0.99)]
        assert marks[0] and marks[3:] == [True, True] and sum(marks[1:3]) == 1
    assert hide([], 0.5, 0) == []


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_shares_that_cannot_be(tmp_path, share):
    with pytest.raises(UserError, match=r"unlabelled is .*: give a share from 0 to less than 1"):
        make_phantom(tmp_path / "new", 3, 128, unlabelled=share)
    assert not (tmp_path / "new").exists()


def test_a_phantom_of_another_share_is_not_continued(roots, monkeypatch):
    quick(monkeypatch)
    with pytest.raises(FileExistsError, match=r"'unlabelled': 0.5}, not .*'unlabelled': 0.25}"):
        make_phantom(roots / "half", **OPTIONS, unlabelled=0.25)
    with pytest.raises(FileExistsError, match="holds a phantom made with"):
        make_phantom(roots / "half", **OPTIONS)


def test_the_command_takes_it_for_a_synthetic_deeplesion_alone(tmp_path, monkeypatch, capsys):
    from tools import make_phantom as tool

    for other in ("--scans", "--lits", "--lidc"):
        monkeypatch.setattr("sys.argv", ["make_phantom", other, str(tmp_path), "--unlabelled=0.5"])
        with pytest.raises(SystemExit, match="--unlabelled is of a synthetic DeepLesion: not with"):
            tool.main()
    quick(monkeypatch)
    new = str(tmp_path / "new")
    monkeypatch.setattr(
        "sys.argv", ["make_phantom", new, "--patients=3", "--size=128", "--unlabelled=0.5"]
    )
    tool.main()
    assert capsys.readouterr().out.endswith("DL_info.csv written\n")
    text = (tmp_path / "new" / "phantom_truth/arguments.json").read_text()
    assert json.load(io.StringIO(text))["unlabelled"] == 0.5


def test_masks_are_compared_with_those_of_their_own_lesions(phantom, tmp_path, monkeypatch):
    """A lesion without a label that comes first on each key slice changes nothing."""
    from benchmarks import mask_quality

    monkeypatch.setattr(mask_quality, "METHODS", {"ellipse": mask_quality.METHODS["ellipse"]})
    truth = json.loads((phantom / TRUTH).read_text())
    masks = Path("phantom_truth/masks")
    (tmp_path / masks).mkdir(parents=True)
    for key, entry in truth.items():
        hidden = dict(shape="round", diameters_mm=[5, 5], labelled=False)
        entry["lesions"] = [hidden, *(dict(each, labelled=True) for each in entry["lesions"])]
        name = masks / key.replace("/", "_")
        labels = cv2.imread(str(phantom / name), cv2.IMREAD_UNCHANGED)
        labels[(labels > 0) & (labels < 101)] += 1
        labels[:5, :5] = 1
        cv2.imwrite(str(tmp_path / name), labels)
    (tmp_path / TRUTH).write_text(json.dumps(truth))
    for name in ("Images_png", "DL_info.csv"):
        (tmp_path / name).symlink_to(phantom / name)
    whole, same = (mask_quality.ious_by_group(root) for root in (phantom, tmp_path))
    assert same == whole and min(whole["all"]) > [0.3]
