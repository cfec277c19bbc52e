"""tools/show_attention.py, from a checkpoint to pictures."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from deeplesion.report.attention import BAR, ROW, SIDE
from mmdet_ext.checkpoint import save_checkpoint_file
from mmdet_ext.config.network import TRAINED_AS, network_of
from mmdet_ext.engine.run import load_config
from tools.show_attention import distances_mm, main

CONFIG = "configs/demo/volumetric_attention.py"


@pytest.fixture
def run(repository, phantom, tmp_path, monkeypatch):
    """Runs the command on a detector of random weights; -> the folder of the pictures."""
    monkeypatch.setenv("DEEPLESION_ROOT", str(phantom))
    monkeypatch.chdir(repository)

    def go(*arguments, **options):
        config = load_config(CONFIG, options)
        init_default_scope("mmdet")
        torch.manual_seed(0)
        weights = MODELS.build(config.model).state_dict()
        checkpoint, out = tmp_path / "epoch_1.pth", tmp_path / "out"
        meta = {TRAINED_AS: [network_of(config)]}
        save_checkpoint_file(dict(meta=meta, state_dict=weights), checkpoint)
        given = [f"{k}={v}" for k, v in options.items()]
        given = ["--cfg-options", *given] if given else []
        argv = ["show_attention.py", CONFIG, checkpoint, "--out", out, *arguments, *given]
        monkeypatch.setattr("sys.argv", [str(a) for a in argv])
        main()
        return out

    return go


def test_every_lesion_gets_a_picture_with_a_row_a_level(run, phantom):
    content = json.loads((phantom / "annotations/test.json").read_text())
    pictures = sorted(run().iterdir())
    assert len(pictures) == min(20, len(content["annotations"])) > 3
    assert {len(cv2.imread(str(p))) for p in pictures} == {2 * BAR + SIDE + 5 * ROW}
    assert all(cv2.imread(str(p)).std() > 20 for p in pictures)


def test_of_attention_on_rois_there_is_one_row(run):
    (picture,) = run("--lesions", "1", **{"model.attention_location": "rcnn"}).iterdir()
    assert len(cv2.imread(str(picture))) == 2 * BAR + SIDE + ROW


def test_a_detector_without_attention_is_refused(run, capsys):
    with pytest.raises(SystemExit) as error:
        run(**{"model.attention": None, "stack.num_slices": 3})
    assert "no volumetric attention to show" in str(error.value)


def test_no_lesions_is_refused(run):
    with pytest.raises(SystemExit, match="give at least 1"):
        run("--lesions", "0")


def test_distances_are_those_of_the_slices():
    meta = dict(file_name="a/010.png", file_thickness_mm=5.0, slice_range=(8, 20))
    stack = dict(num_slices=9, policy="normalize", target_mm=2.0)
    found = distances_mm(meta, stack)
    assert found == pytest.approx(2.0 * np.arange(-4, 5))
    near_the_end = distances_mm(dict(meta, slice_range=(9, 20)), stack)
    assert near_the_end[:2] == [-5.0, -5.0] and near_the_end[4:] == found[4:]
    assert np.isnan(distances_mm(dict(meta, slice_range=None), stack)).all()
