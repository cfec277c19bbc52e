"""LiTS as whole volumes through the commands' own functions: training on crops, resuming bit for
bit, testing by sliding windows."""

import itertools
import json

import pytest
import torch

pytest.importorskip("monai", reason="needs monai, the extra [volumes]")
from deeplesion.errors import UserError
from mmdet_ext.checkpoint import load_checkpoint_file
from mmdet_ext.engine.run import load_config, train
from mmdet_ext.engine.run import test as run_test

names = (f"test_lits_volumes_{i}" for i in itertools.count())


def configuration(repository, phantom_lits, work_dir, name="demo/lits_volumes", **options):
    overrides = {
        "model.network": dict(
            type="DeepLabV3", num_classes=3, depth=18, base_channels=4, channels=4, rates=[1, 2]
        ),
        "model.network._delete_": True,
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "train_dataloader.dataset.pipeline.0.size": [16, 32, 32],
        "test_dataloader.num_workers": 0,
        "train_cfg.max_epochs": 2,
        "default_hooks.checkpoint.interval": 1,
        "default_hooks.logger.interval": 1,
        "visualizer.vis_backends": [dict(type="LocalVisBackend")],
        **options,
    }
    for split in ("train", "test"):
        overrides[f"{split}_dataloader.dataset.data_root"] = str(phantom_lits / "files")
        overrides[f"{split}_dataloader.dataset.cache"] = None
    config = load_config(str(repository / f"configs/{name}.py"), overrides)
    config.work_dir, config.launcher = str(work_dir), "none"
    config.experiment_name = next(names)
    return config


def test_crops_are_learnt_from_resumed_and_volumes_tested(
    repository, phantom_lits, tmp_path, capsys
):
    train(configuration(repository, phantom_lits, tmp_path / "whole"))
    assert "2 samples, LiTSVolumes" in capsys.readouterr().out
    config = configuration(repository, phantom_lits, tmp_path / "resumed")
    train(config, resume=str(tmp_path / "whole/epoch_1.pth"))
    states = [
        load_checkpoint_file(tmp_path / f"{run}/epoch_2.pth")["state_dict"]
        for run in ("whole", "resumed")
    ]
    first = load_checkpoint_file(tmp_path / "whole/epoch_1.pth")["state_dict"]
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], rtol=0, atol=0)
    assert any(not torch.equal(weight, first[name]) for name, weight in states[0].items())

    config = configuration(repository, phantom_lits, tmp_path / "tested")
    path = run_test(config, str(tmp_path / "whole"))
    assert path == str(tmp_path / "tested/dice.json")
    content = json.loads((tmp_path / "tested/dice.json").read_text())
    assert content["scores"][0]["cases"].keys() == {"29"}
    assert 0 <= content["scores"][0]["figures"]["liver_dice_global"] <= 100
    assert "1 samples" in capsys.readouterr().out

    # 2.5D has weights of the same names and shapes.
    other = configuration(
        repository, phantom_lits, tmp_path / "other", **{"model.fusion.type": "SliceConv"}
    )
    with pytest.raises(UserError, match="trained as another network"):
        run_test(other, str(tmp_path / "whole"))
    # Windows may be chosen anew in testing.
    options = {"model.test_cfg.step": [32, 128, 128], "model.transfer": "encoder"}
    windows = configuration(repository, phantom_lits, tmp_path / "windows", **options)
    assert run_test(windows, str(tmp_path / "whole")) is not None


def test_a_batch_of_one_is_the_users_to_mend(repository, phantom_lits, tmp_path):
    config = configuration(
        repository, phantom_lits, tmp_path,
        **{"train_dataloader.batch_size": 1, "auto_scale_lr.base_batch_size": 1},
    )  # fmt: skip
    with pytest.raises(UserError, match="two images at least"):
        train(config)


def test_fewer_cases_than_a_batch_are_the_users_to_mend(repository, phantom_lits, tmp_path):
    config = configuration(
        repository, phantom_lits, tmp_path,
        **{"train_dataloader.batch_size": 4, "auto_scale_lr.base_batch_size": 4},
    )  # fmt: skip
    with pytest.raises(UserError, match="2 samples make no batch of 4"):
        train(config)


@pytest.mark.parametrize("name", ["acs", "25d", "i3d"])
def test_configs_are_the_papers(repository, phantom_lits, tmp_path, name):
    config = load_config(str(repository / f"configs/acs_volumes/lits_{name}.py"))
    operator = dict(acs="ACSConv", i3d="I3DConv")
    assert config.model.fusion.type == operator.get(name, "SliceConv")
    assert config.model.network.depth == 101
    assert (config.model.test_cfg.window[0], config.model.test_cfg.step[0]) == (64, 24)
    crop = config.train_dataloader.dataset.pipeline[0]
    assert crop.size == [64, 224, 224]
    assert config.train_cfg.max_epochs == 6000
    assert config.param_scheduler[0].milestones == [3000, 4500]
