"""What an experiment states once reaches every part that reads it, and nothing contradicts it."""

import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope

from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.engine.run import load_config

ROOT = Path(__file__).resolve().parents[3]
A3D = str(ROOT / "configs/a3d_3slice.py")
DEFAULTS = dict(policy="keep_thick", target_mm=2.0, interpolation="exact")


@pytest.fixture(autouse=True)
def _scope():
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")


def datasets(config):
    return [config[f"{split}_dataloader"].dataset for split in ("train", "val", "test")]


def over(tmp_path, text, base=A3D):
    file = tmp_path / "mine.py"
    file.write_text(f"_base_ = '{base}'\n{text}\n")
    return str(file)


def check_five_slices(config):
    assert config.model.num_slices == 5
    for dataset in datasets(config):
        assert dataset.stack == {**DEFAULTS, "num_slices": 5, "policy": "normalize"}


def test_one_line_of_a_file_or_one_option_changes_the_slices_of_all_parts(tmp_path):
    check_five_slices(load_config(A3D, {"stack.num_slices": 5}))
    check_five_slices(load_config(over(tmp_path, "stack = dict(num_slices=5)")))
    check_five_slices(read_experiment(over(tmp_path, "stack = dict(num_slices=5)")))


def test_options_of_resizing_reach_training_and_testing():
    config = load_config(A3D, {"resize.size": 256, "resize.rotation": 30.0})
    for dataset in datasets(config):
        step = dataset.pipeline[-2]
        assert (step.type, step.size, step.rotation) == ("RandomAffineResize", 256, 30.0)
        assert step.get("augment", True) is not dataset.get("test_mode", False)


def test_a_config_that_a_run_has_dumped_is_changed_as_its_own_is(tmp_path):
    load_config(A3D).dump(tmp_path / "dumped.py")
    dumped = str(tmp_path / "dumped.py")
    assert load_config(dumped).model == load_config(A3D).model
    check_five_slices(load_config(dumped, {"stack.num_slices": 5}))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("model.num_slices", 5, "stack.num_slices is 3.*set stack.num_slices"),
        ("val_dataloader.dataset.stack.policy", "keep_thick", "stack.policy is 'normalize'"),
        ("val_dataloader.dataset.pipeline.1.size", 64, "resize.size is 512"),
        ("resize.rotaton", 1, "did you mean resize.rotation"),
        ("num_slices", 5, "did you mean stack.num_slices"),
    ],
)
def test_what_one_part_alone_would_see_is_refused(option, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(A3D, {option: value})


@pytest.mark.parametrize(
    "text, message",
    [
        ("model = dict(num_slices=5)", "model.num_slices is 5, but stack.num_slices is 3"),
        ("num_slices = 5", r"did you mean stack = dict\(num_slices=...\)"),
        ("stack = dict(polcy='normalize')", "did you mean stack.policy"),
        ("resize = dict(rotaton=5)", "did you mean resize.rotation"),
    ],
)
def test_files_that_say_it_wrongly_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(over(tmp_path, text))


def test_a_config_read_without_its_stack_is_refused_not_built_with_other_slices():
    config = Config.fromfile(ROOT / "configs/a3d_7slice.py")
    with pytest.raises(ValueError, match=r"needs num_slices.*read_experiment"):
        MODELS.build(config.model)
    with pytest.raises(ValueError, match=r"needs stack=dict.*read_experiment"):
        DATASETS.build(config.train_dataloader.dataset)


@pytest.mark.parametrize(
    "stack, message", [(dict(num_slices=4), "must be odd"), (dict(num_slices=3, polcy=1), "polcy")]
)
def test_a_bad_stack_is_refused_before_the_first_sample(stack, message):
    options = read_experiment(A3D).train_dataloader.dataset
    options.stack = stack
    with pytest.raises(ValueError, match=message):
        DATASETS.build(options)


def test_a_detector_that_does_not_ask_for_slices_is_left_alone(tmp_path):
    head = "bbox_head=dict(type='RetinaHead', num_classes=1, in_channels=256)"
    model = f"_delete_=True, type='RetinaNet', backbone=dict(type='ResNet', depth=50), {head}"
    config = load_config(over(tmp_path, f"model = dict({model})"))
    assert "num_slices" not in config.model and datasets(config)[0].stack.num_slices == 3


@pytest.mark.parametrize("name", ["a3d", "25d", "tsm"])
def test_a_volume_of_another_depth_is_refused_with_the_option_to_change(name):
    config = load_config(str(ROOT / f"configs/{name}_3slice.py"))
    config.model.backbone.init_cfg = None
    with torch.device("meta"):
        model = MODELS.build(config.model)
        with pytest.raises(ValueError, match=r"num_slices=3.*7 slices.*stack.num_slices to 7"):
            model.extract_feat((torch.empty(1, 1, 7, 64, 64), torch.ones(1)))


def test_the_page_shows_how_to_train_on_one_split_and_validate_on_the_other(tmp_path):
    page = (ROOT / "docs/configs.md").read_text()
    section = page.split("## Training on two splits")[1]
    (text,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.S)
    file = tmp_path / "mine.py"
    file.write_text(text.replace('"configs/', f'"{ROOT}/configs/'))
    config = load_config(str(file), {})
    files = [dataset.ann_file for dataset in datasets(config)]
    assert files == [f"annotations/{split}.json" for split in ("train", "val", "test")]
    assert config.val_dataloader.dataset.stack == config.test_dataloader.dataset.stack
    assert config.val_evaluator.type == "FROCMetric" and config.val_cfg.type == "ValLoop"
    assert config.default_hooks.checkpoint.rule == "greater"
