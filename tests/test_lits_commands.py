"""LiTS by the commands, from a phantom to Dice per case: minutes, so only with make test-slow."""

import json
from functools import partial

import numpy as np
import pytest

from ct_volumes.lits import find_cases, read_case

from .run_command import command as any_command

pytestmark = pytest.mark.slow
QUICK = ["train_dataloader.num_workers=0", "test_dataloader.num_workers=0"]

command = partial(any_command, variable="LITS_ROOT", timeout=None)


def test_from_phantom_to_dice_per_case(repository, tmp_path):
    files, root = tmp_path / "files", tmp_path / "prepared"
    command(
        repository, "tools/make_phantom.py", "--lits", files, "--patients", 3, "--size", 128,
        root=root,
    )  # fmt: skip
    output = command(
        repository, "tools/prepare_data.py", files, "--lits", "--out", root, "--workers", 1,
        root=root,
    )  # fmt: skip
    assert "train: 2 cases" in output and "val: 1 cases" in output
    wrong = command(repository, "tools/prepare_data.py", files, "--lits", root=root, expect=2)
    assert "--lits needs --out DIR" in wrong

    # The target alone; attention starts from its backbone, FPN and RPN.
    train = "tools/train.py", "configs/demo/lits.py", "--work-dir", tmp_path / "plain"
    output = command(repository, *train, "--cfg-options", *QUICK, root=root)
    assert "images with" in output and "DeepLesion:" not in output
    pretrained = tmp_path / "plain/epoch_3.pth"
    output = command(
        repository, "tools/train.py", "configs/demo/lits_va.py", "--work-dir", tmp_path / "va",
        "--cfg-options", *QUICK, "train_cfg.max_epochs=1",
        f"model.pretrained.checkpoint={pretrained}", root=root,
    )  # fmt: skip
    assert f"pretrained  backbone, neck, rpn_head of {pretrained}" in output
    (log,) = (tmp_path / "va").glob("*/*.log")
    assert "left in the file" in log.read_text()

    output = command(
        repository, "tools/test.py", "configs/demo/lits.py", tmp_path / "plain", "--work-dir",
        tmp_path / "test", "--cfg-options", *QUICK,
        f"test_evaluator.segmentations={tmp_path / 'segmentations'}", root=root,
    )  # fmt: skip
    assert "score >=  per case" in output
    content = json.loads((tmp_path / "test/dice.json").read_text())
    figures = content["scores"][0]["figures"]
    # Two cases and three epochs are too few to learn from: that the files and the figures agree is
    # what is tested.
    import nibabel

    case = read_case(find_cases(files).cases[29])
    image = nibabel.load(tmp_path / "segmentations/prediction-29.nii")
    found, true = np.asarray(image.dataobj), case.volume.in_source(case.labels)
    dice = 2 * ((found > 0) & (true > 0)).sum() / ((found > 0).sum() + (true > 0).sum())
    assert 100 * dice == pytest.approx(figures["liver_dice_per_case"])
