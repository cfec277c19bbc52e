"""Segmentation and classification of nodules through the commands' own functions: training,
resuming bit for bit, testing, refusals."""

import itertools
import json

import pytest
import torch

from deeplesion.errors import UserError
from mmdet_ext.checkpoint import load_checkpoint_file
from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.run import NODULE_METRICS, RESULT_FILES, chosen_on_test, load_config, train
from mmdet_ext.engine.run import test as run_test

from ..datasets.test_lidc import make_lidc_samples
from ..models.test_classifiers import TinyClassifier

names = (f"test_lidc_{i}" for i in itertools.count())
NETWORKS = {
    "seg": dict(_delete_=True, type="ShapesUNet", num_classes=2),
    "cls": dict(_delete_=True, type=TinyClassifier.__name__),
}


@pytest.fixture
def monai():
    pytest.importorskip("monai", reason="needs the extra [volumes]")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("lidc")
    make_lidc_samples(root, [1, 4, 2, 5, 2, 4, 1, 5, 1])
    return root


def configuration(repository, name, data, work_dir, **options):
    overrides = {
        "train_dataloader.batch_size": 2,
        "auto_scale_lr.base_batch_size": 2,
        "train_dataloader.dataset.pipeline.0.size": 8,
        "train_dataloader.dataset.pipeline.0.shift": 2,
        "model.network": NETWORKS[name[5:8]],
        "default_hooks.logger.interval": 1,
        "default_hooks.checkpoint.max_keep_ckpts": -1,
        "visualizer.vis_backends": [dict(type="LocalVisBackend")],
        "train_cfg.max_epochs": 2,
        **options,
    }
    for split in ("train", "val", "test"):
        overrides[f"{split}_dataloader.num_workers"] = 0
        overrides[f"{split}_dataloader.dataset.data_root"] = str(data)
        if split != "train":
            overrides[f"{split}_dataloader.dataset.pipeline.0.size"] = 8
    config = load_config(str(repository / f"configs/acs_volumes/{name}.py"), overrides)
    config.work_dir, config.launcher = str(work_dir), "none"
    config.experiment_name = next(names)
    return config


@pytest.mark.parametrize(
    "name, figures",
    [
        ("lidc_seg_acs", ["dice_global", "dice_per_nodule"]),
        ("lidc_cls_i3d", ["auc", "accuracy"]),
    ],
)
def test_it_trains_resumes_and_tests(monai, repository, data, tmp_path, capsys, name, figures):
    every = {"default_hooks.checkpoint.by_epoch": False, "default_hooks.checkpoint.interval": 2}
    train(configuration(repository, name, data, tmp_path / "whole", **every))
    shown = capsys.readouterr().out
    assert f"6 samples, {data / 'nodules.json'}" in shown
    assert f"masks       {'reading' if 'seg' in name else 'none'}\n" in shown
    (log,) = (tmp_path / "whole").glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 6
    epochs = [line for line in lines if f"Nodules/{figures[0]}" in line]
    assert len(epochs) == 2 and all(0 <= e[f"Nodules/{f}"] <= 100 for e in epochs for f in figures)

    # From the middle of the second epoch.
    config = configuration(repository, name, data, tmp_path / "resumed", **every)
    train(config, resume=str(tmp_path / "whole/iter_4.pth"))
    whole = load_checkpoint_file(tmp_path / "whole/iter_6.pth")["state_dict"]
    resumed = load_checkpoint_file(tmp_path / "resumed/iter_6.pth")["state_dict"]
    first = load_checkpoint_file(tmp_path / "whole/iter_4.pth")["state_dict"]
    for key, weight in resumed.items():
        torch.testing.assert_close(weight, whole[key], rtol=0, atol=0)
    assert any(not torch.equal(first[key], whole[key]) for key in whole)

    config = configuration(repository, name, data, tmp_path / "tested")
    result = run_test(config, str(tmp_path / "whole/iter_6.pth"))
    assert result == str(tmp_path / "tested/nodules.json")
    content = json.loads((tmp_path / "tested/nodules.json").read_text())
    assert content["epoch_chosen_on_test"] is False and len(content["nodules"]) == 3
    last = epochs[-1]
    assert content["figures"] == {f: pytest.approx(last[f"Nodules/{f}"]) for f in figures}

    # The best epoch's were chosen on these nodules.
    (best,) = (tmp_path / "whole").glob("best_Nodules_*.pth")
    config = configuration(repository, name, data, tmp_path / "best")
    run_test(config, str(tmp_path / "whole"))
    assert f"checkpoint  {best}\n" in capsys.readouterr().out
    content = json.loads((tmp_path / "best/nodules.json").read_text())
    assert content["epoch_chosen_on_test"] is True
    top = max(epoch[f"Nodules/{figures[0]}"] for epoch in epochs)
    assert content["figures"][figures[0]] == pytest.approx(top)

    # Another window of HU is another network.
    other = {"test_dataloader.dataset.pipeline.1.high": 600}
    config = configuration(repository, name, data, tmp_path / "other", **other)
    with pytest.raises(UserError, match=r"pipeline\.WindowHU\.high: trained with 400"):
        run_test(config, str(tmp_path / "whole/iter_6.pth"))


def test_what_was_chosen_on_the_test_is_known(repository, data, tmp_path):
    config = configuration(repository, "lidc_seg_acs", data, tmp_path)
    assert chosen_on_test(config, "a/best_Nodules_dice_global_epoch_3.pth")
    assert not chosen_on_test(config, "a/epoch_3.pth")
    config.val_dataloader.dataset.split = "train"
    assert not chosen_on_test(config, "a/best_Nodules_dice_global_epoch_3.pth")
    assert set(NODULE_METRICS) <= RESULT_FILES.keys()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("train_dataloader.dataset.pipeline.0.shfit", 1, "shift"),
        ("train_dataloader.dataset.tsk", "segmentation", "task"),
        ("model.transfr", "encoder", "transfer"),
        ("test_evaluator.result_fil", "x.json", "result_file"),
    ],
)
def test_misspelt_options_are_refused(repository, data, tmp_path, option, value, message):
    with pytest.raises(ConfigError, match=message):
        configuration(repository, "lidc_seg_25d", data, tmp_path, **{option: value})


def test_without_monai_training_says_how_to_install_it(repository, data, tmp_path, monkeypatch):
    config = configuration(repository, "lidc_cls_25d", data, tmp_path)
    monkeypatch.setattr("ct_volumes.optional.find_spec", lambda name: None)
    with pytest.raises(UserError, match="need monai: pip install monai"):
        train(config)
