"""tools/observe_phantom.py: what it makes of the observers' scores, and the command."""

import json
import sys

import numpy as np
import pytest

from deeplesion.phantom.observers import READINGS, Observed
from tools.observe_phantom import main, measures, stack


def key_slices(scores_of, images=40, seed=0):
    """Key slices with one lesion and one distractor each, scored by (rng, is lesion)."""
    rng = np.random.default_rng(seed)
    is_lesion = np.array([True, False])
    return [
        Observed(
            f"{k:06d}_01_01/001.png",
            k,
            3,
            1.0 if k % 2 else 5.0,
            np.array([[10, 10, 30, 30], [60, 60, 80, 80]]),
            is_lesion,
            np.array(["oblique", "straight" if k % 4 else "oblique"]),
            np.array([[[scores_of(rng, lesion)] * READINGS] for lesion in is_lesion]),
        )
        for k in range(images)
    ]


def test_who_knows_all_hits_all():
    found = measures(key_slices(lambda rng, lesion: 5.0 if lesion else -5.0), 0)
    for group in ("all", "thin", "thick"):
        assert found[group] == [100, 100, 100]
    assert found["auc_by_course"] == {"oblique": 100, "straight": 100}


def test_who_knows_nothing_hits_as_many_as_a_random_order():
    """Of n lesions among n distractors (k + 1) n / (n + 1) come before distractor k + 1."""
    found = measures(key_slices(lambda rng, lesion: 0.0, images=400), 0)
    average, at_half, auc = found["all"]
    assert at_half == pytest.approx(100 * 201 / 401, abs=3)
    assert average == pytest.approx(100 * (201 / 401 + 3) / 4, abs=0.8)
    assert auc == pytest.approx(50, abs=3)


def test_auc_against_counting_pairs():
    read = key_slices(lambda rng, lesion: rng.normal(lesion), seed=1)
    scores = np.stack([r.scores[:, 0, 0] for r in read])
    pairs = scores[:, :1] > scores[:, 1]
    assert measures(read, 0)["all"][2] == pytest.approx(100 * pairs.mean())


def test_stacks_are_written_as_options():
    assert stack("7,keep_thick,2.5")[:3] == (7, "keep_thick", 2.5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--stacks", "3"], "'3': give D,POLICY,MM, as in 3,normalize,2"),
        (["--stacks", "3,often,2"], "'3,often,2': "),
        (["--stacks", "x,normalize,2"], "policies are "),
        (["--stacks", "2,normalize,2"], "'2,normalize,2': "),
        (["--stacks", "3,normalize,nan"], "'3,normalize,nan': target_mm"),
        (["--noise", "0", "nan"], "--noise nan"),
        (["--noise", "-2"], "--noise -2.0: give a number from 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_named(options, message, phantom, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["observe_phantom.py", str(phantom), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert message in f"{ended.value.code}{capsys.readouterr().err}"


def test_the_command_prints_and_writes_its_table(phantom, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    options = ["--limit", "1", "--stacks", "1,normalize,2", "3,normalize,2", "--out", out]
    monkeypatch.setattr(sys, "argv", ["observe_phantom.py", *map(str, [phantom, *options])])
    main()
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert [row["num_slices"] for row in figures["rows"]] == [1, 3]
    assert figures["rows"][1]["all"] == [100, 100, 100]
    assert figures["lesions"] == figures["distractors"] > 0
    assert f"{figures['key_slices']} key slices, {figures['lesions']} lesions" in printed
    assert printed.count("| normalize  |") == 2
