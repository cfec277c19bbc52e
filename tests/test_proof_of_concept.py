"""tools/proof_of_concept.py with few small images: what it trains, scores and shows, what it goes
on with, and the mAUC against sorting."""

import json
import sys

import numpy as np
import pytest
import torch

from ct_volumes.shapes import ShapeSet
from mmdet_ext.convert import convert_to_3d
from mmdet_ext.models.shapes_unet import ShapesUNet
from tools import proof_of_concept as tool

from .mmdet_ext.evaluation.test_feature_auc import sorted_auc

TINY = tool.Preset(12, 16, 4, 2, 4, 3, 2, 1)
ROW = "2.5D r."


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command in this process; returns what it printed."""
    monkeypatch.setitem(tool.PRESETS, "small", TINY)
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["proof_of_concept.py", "--out", "out", *arguments])
        tool.main()
        return capsys.readouterr().out

    return command


def test_it_scores_shows_and_goes_on(run, monkeypatch, tmp_path):
    shown = run("--models", ROW)
    path = tmp_path / "out/results.json"
    rows = json.loads(path.read_text())["results"]["0"]
    assert rows.keys() == {ROW}  # nothing is pretrained for it
    scores = {"dice", "iou", "paper_dice", "paper_iou", "code_dice", "code_iou"}
    assert rows[ROW].keys() == {"mauc", *scores}
    assert 50 <= rows[ROW]["mauc"] <= 100
    assert all(0 <= rows[ROW][name] <= 100 for name in scores)
    assert f"{ROW:<8} {rows[ROW]['mauc']:.1f}" in shown
    # The best epoch's is no lower than any; the last epoch's is that of the log.
    (log,) = (tmp_path / "out/seed_0/2.5D_r").glob("*/vis_data/scalars.json")
    epochs = [json.loads(line) for line in log.read_text().splitlines() if "Shapes" in line]
    assert [epoch["step"] for epoch in epochs] == [1, 2]
    assert rows[ROW]["dice"] == epochs[-1]["Shapes/dice"]
    assert rows[ROW]["paper_dice"] == max(e["Shapes/paper_dice"] for e in epochs)

    monkeypatch.setattr(tool, "train", None)
    monkeypatch.setattr(tool, "feature_mauc", None)
    table = shown[shown.index("\n" + " " * 20) :]
    assert f"{ROW:<8}" in table
    assert run("--models", ROW).endswith(table)

    monkeypatch.setitem(tool.PRESETS, "small", tool.Preset(12, 16, 4, 2, 4, 3, 1, 1))
    with pytest.raises(SystemExit, match="results of other sizes"):
        run("--models", ROW)
    path.write_text('{"preset"')
    with pytest.raises(SystemExit, match=r"results\.json is not a result of"):
        run("--models", ROW)


def test_the_mauc_column_needs_no_training_on_volumes(run, tmp_path):
    run("--models", "ACS p.", "--only-mauc")
    out = tmp_path / "out/seed_0"
    assert [folder.name for folder in out.iterdir()] == ["2d"]
    content = json.loads((tmp_path / "out/results.json").read_text())
    (best,) = (out / "2d").glob("best_*.pth")
    network = ShapesUNet(6, "nearest")
    state = torch.load(best, weights_only=True)["state_dict"]
    state = {name.removeprefix("network."): w for name, w in state.items() if ".head." not in name}
    network.load_state_dict(state, strict=False)
    network = convert_to_3d(network, "ACSConv", depth="isotropic").eval()
    features, inside = [], []
    for image, labels in ShapeSet(3, TINY.test_volumes, "test", size=TINY.size):
        with torch.no_grad():
            maps = network(torch.from_numpy(image)[None, None], features=True)
        features.append(maps[0].flatten(1).numpy())
        inside.append(labels.ravel() < 5)
    features, inside = np.concatenate(features, 1), np.concatenate(inside)
    values = [sorted_auc(channel, inside) for channel in features]
    expected = 100 * np.mean([max(value, 1 - value) for value in values])
    # Of few voxels: see FeatureAUC.
    assert content["results"]["0"]["ACS p."]["mauc"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("arguments", [("--seeds", "0"), ("--models", "ACS")])
def test_what_is_out_of_range_is_refused(run, arguments):
    with pytest.raises(SystemExit):
        run(*arguments)
