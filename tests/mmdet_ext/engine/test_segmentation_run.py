"""Segmentation of images and volumes through the commands' own functions: training, resuming bit
for bit, testing, transfer, refusals."""

import itertools
import json

import pytest
import torch

from deeplesion.errors import UserError
from mmdet_ext.checkpoint import load_checkpoint_file
from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.run import load_config, train
from mmdet_ext.engine.run import test as run_test

names = (f"test_segmentation_{i}" for i in itertools.count())


def configuration(repository, name, work_dir, **options):
    overrides = {
        "train_dataloader.batch_size": 2,
        "auto_scale_lr.base_batch_size": 2,
        "train_dataloader.dataset.count": 4,
        "default_hooks.logger.interval": 1,
        "visualizer.vis_backends": [dict(type="LocalVisBackend")],
        "train_cfg.max_epochs": 2,
        **options,
    }
    for split in ("train", "val", "test"):
        overrides[f"{split}_dataloader.num_workers"] = 0
        overrides[f"{split}_dataloader.dataset.size"] = 12
        if split != "train":
            overrides[f"{split}_dataloader.dataset.count"] = 3
    config = load_config(str(repository / f"configs/acs_volumes/{name}.py"), overrides)
    config.work_dir, config.launcher = str(work_dir), "none"
    config.experiment_name = next(names)
    return config


def weights(folder, name):
    return load_checkpoint_file(folder / name)["state_dict"]


@pytest.fixture(scope="module")
def pretrained(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes_2d")
    train(configuration(repository, "shapes_2d", folder))
    return folder


def test_images_are_learnt_from_and_validated(pretrained):
    (log,) = pretrained.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and all(0 < loss < 1 for loss in losses)
    scores = [line for line in lines if "Shapes/dice" in line]
    assert len(scores) == 2 and all(0 <= s["Shapes/paper_iou"] <= 100 for s in scores)
    (record,) = pretrained.glob("run_*.json")
    training = json.loads(record.read_text())["training"]
    assert training["data"]["train"] == dict(images=4, lesions=None, source="ShapesDataset")
    assert len(list(pretrained.glob("best_Shapes_paper_dice_epoch_*.pth"))) == 1


def test_volumes_resume_bit_for_bit(repository, pretrained, tmp_path, capsys):
    (best,) = pretrained.glob("best_*.pth")
    options = {"model.pretrained": str(best), "default_hooks.checkpoint.max_keep_ckpts": -1}
    train(configuration(repository, "shapes_acs", tmp_path / "whole", **options))
    shown = capsys.readouterr().out
    assert "4 samples, ShapesDataset" in shown and best.name in shown

    first = weights(tmp_path / "whole", "epoch_1.pth")
    source = weights(pretrained, best.name)
    assert first["network.model.head.weight"].shape[0] == 6
    name = "encoder1.0.weight"
    assert 0 < (first[f"network.model.{name}"] - source[f"network.{name}"]).abs().max() < 0.02

    config = configuration(repository, "shapes_acs", tmp_path / "resumed", **options)
    train(config, resume=str(tmp_path / "whole/epoch_1.pth"))
    whole = weights(tmp_path / "whole", "epoch_2.pth")
    for name, weight in weights(tmp_path / "resumed", "epoch_2.pth").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=0)

    capsys.readouterr()
    config = configuration(repository, "shapes_acs", tmp_path / "tested")
    assert run_test(config, str(tmp_path / "whole/epoch_2.pth")) is None
    shown = capsys.readouterr().out
    assert "Shapes/dice" in shown and "3 samples" in shown

    # ACS' weights fit 2.5D by name and shape, which is another network.
    other = configuration(repository, "shapes_25d", tmp_path / "other")
    with pytest.raises(UserError, match="trained as another network"):
        run_test(other, str(tmp_path / "whole/epoch_2.pth"))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("model.pretraind", "x.pth", "pretrained"),
        ("model.loss.smoth", 1.0, "smooth"),
        ("train_dataloader.dataset.cont", 3, "count"),
        ("test_evaluator.bach", 3, "batch"),
    ],
)
def test_misspelt_options_are_refused(repository, tmp_path, option, value, message):
    with pytest.raises(ConfigError, match=message):
        configuration(repository, "shapes_acs", tmp_path, **{option: value})


def test_what_a_part_refuses_is_the_configs_fault(repository, tmp_path):
    config = configuration(
        repository, "shapes_i3d", tmp_path, **{"train_dataloader.dataset.axes": 4}
    )
    with pytest.raises(ConfigError, match="axes must be 2 or 3"):
        train(config)
