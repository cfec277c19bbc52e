"""What a user gets wrong before and while something runs is said in a sentence."""

import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config

from deeplesion.errors import UserError
from deeplesion.evaluation.results import read_results
from mmdet_ext.checkpoint import LAST_CHECKPOINT, CheckpointError
from mmdet_ext.config.check import ConfigError, refused_by_parts
from mmdet_ext.engine.run import load_config, name_of_views, told_to_resume, train
from mmdet_ext.engine.run import test as run_test
from mmdet_ext.models.tta import VIEWS

from ..small_training import configuration, run

DEMO = "configs/demo/alignshift_3slice.py"


def test_no_workers_need_no_other_option(repository, phantom, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    loaders = [f"{split}_dataloader" for split in ("train", "val", "test")]
    config = load_config(DEMO, {f"{loader}.num_workers": 0 for loader in loaders})
    for loader in loaders:
        options = config[loader]
        options.pop("dataset"), options.pop("sampler")
        torch.utils.data.DataLoader([1, 2], **options)  # it refused persistent_workers
    assert load_config(DEMO).train_dataloader.persistent_workers


def test_metrics_of_a_test_may_be_a_list(repository, phantom, tmp_path, capsys):
    """FROCMetric writes the results wherever it stands; mmdet's CocoMetric runs beside it."""
    work = run(repository, phantom, tmp_path / "work", **{"train_cfg.max_epochs": 1})
    coco = dict(
        type="CocoMetric", ann_file=str(phantom / "annotations/test.json"), metric=["bbox", "segm"]
    )
    config = configuration(repository, phantom, tmp_path / "test", custom_hooks=[])
    config.test_evaluator = [coco, dict(type="FROCMetric")]
    result_file = run_test(config, str(work))
    assert read_results(tmp_path / "test/results.json.gz").records
    assert result_file == str(tmp_path / "test/results.json.gz")
    before = Path(result_file).read_bytes()
    with_views(config, work, tmp_path / "tta", capsys)
    assert Path(result_file).read_bytes() == before

    config = configuration(repository, phantom, tmp_path / "coco", custom_hooks=[])
    config.test_evaluator = [coco]
    assert run_test(config, str(work)) is None
    assert not list((tmp_path / "coco").glob("results*"))
    with pytest.raises(ConfigError, match="--tta marks its result in the file of a FROCMetric"):
        run_test(config, str(work), views=["depth"])


def test_a_new_training_does_not_replace_one_that_is_there(repository, phantom, tmp_path):
    """Failed before: best_*.pth and epoch_*.pth were replaced, beside results of the old ones."""
    folder, one = tmp_path / "work", {"train_cfg.max_epochs": 1}
    run(repository, phantom, folder, **one)
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    with pytest.raises(UserError, match=r"work holds a training already \(epoch_1\.pth\)") as error:
        run(repository, phantom, folder, **one)
    assert "--resume" in str(error.value) and "--work-dir" in str(error.value)
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
    # Going on from one of its checkpoints, or from weights into a folder of its own, is meant.
    run(repository, phantom, folder, str(folder / "epoch_1.pth"), **{"train_cfg.max_epochs": 2})
    assert (folder / "epoch_2.pth").is_file()


def with_views(config, checkpoint, work_dir, capsys):
    """A test with test-time augmentation, of weights that are an average, says so."""
    config = copy.deepcopy(config)
    config.work_dir, config.experiment_name = str(work_dir), "views"
    config.test_evaluator = [dict(type="FROCMetric")]
    capsys.readouterr()
    result_file = run_test(config, str(checkpoint), views=["vertical", "depth"])
    # Not that of another set of views, nor of all of them.
    assert result_file == str(work_dir / "results_tta_vertical_depth.json.gz")
    result = read_results(Path(result_file), "mine")
    assert result.name == "mine (TTA: vertical, depth)" and result.views == ("vertical", "depth")
    assert any(record["boxes"] for record in result.records)
    table = json.loads((work_dir / "results_tta_vertical_depth.froc.json").read_text())
    assert table["views"] == ["vertical", "depth"]
    assert re.search(r"^weights +moving average over 2 epochs", capsys.readouterr().out, re.M)


def test_each_set_of_views_has_a_result_of_its_own():
    def name(*views):
        return name_of_views("results.json.gz", views)

    assert name(*VIEWS) == "results_tta.json.gz"
    assert name("horizontal", "both") == "results_tta_horizontal_both.json.gz"
    sets = [c for n in range(1, len(VIEWS) + 1) for c in itertools.combinations(VIEWS, n)]
    assert len({name(*views) for views in sets}) == len(sets) == 15


@pytest.mark.parametrize(
    "override, message",
    [
        ({"model.neck.num_slices": 7}, "^KeySliceMaskRCNN: neck.num_slices=7, but .* needs 3"),
        ({"train_dataloader.num_workers": -1}, "num_workers option should be non-negative"),
        ({"model.backbone.stem": "first"}, "^TruncatedDenseNet3D: stem must be one of"),
        ({"optim_wrapper.optimizer.lr": -1.0}, "^AdamW: Invalid learning rate: -1.0"),
        ({"model.backbone.init_cfg.type": "Kaiming"}, "^TruncatedDenseNet3D: .* takes init_cfg="),
        ({"model.backbone.init_cfg.type": "Pretrained"}, "^TruncatedDenseNet3D: .* takes init_cfg"),
    ],
)
def test_what_a_part_refuses_is_the_configs_fault(override, message, repository, phantom, tmp_path):
    config = configuration(repository, phantom, tmp_path, custom_hooks=[], **override)
    with pytest.raises(ConfigError, match=message):
        train(config)


def test_weights_of_another_network_are_no_error_of_the_program(repository, phantom, tmp_path):
    torch.save({"features.conv0.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    init = "model.backbone.init_cfg"
    given = {f"{init}.type": "Pretrained", f"{init}.checkpoint": str(tmp_path / "other.pth")}
    config = configuration(repository, phantom, tmp_path / "work", **given)
    with pytest.raises(CheckpointError, match="these are not DenseNet-121 weights"):
        train(config)


def test_only_refusals_of_constructors_are():
    with pytest.raises(ConfigError, match=r"^RandomAffineResize: box_from must be"), \
            refused_by_parts():  # fmt: skip
        TRANSFORMS.build(dict(type="RandomAffineResize", size=64, box_from="middle"))
    with pytest.raises(ValueError, match=r"^a bug$") as error, refused_by_parts():
        raise ValueError("a bug")
    assert not isinstance(error.value, ConfigError)
    with pytest.raises(AttributeError), refused_by_parts():
        MODELS.build(dict(type=lambda: None.shape))


def test_amp_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--amp is for a GPU"):
        train(Config(), amp=True)


def test_interrupted_training_says_how_to_go_on(tmp_path):
    config = Config(dict(work_dir=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt, match="no checkpoint was saved"), told_to_resume(config):
        raise KeyboardInterrupt
    (tmp_path / LAST_CHECKPOINT).write_text(f"{tmp_path}/epoch_3.pth")
    goes_on = r"--resume goes on from .*/epoch_3\.pth"
    with pytest.raises(KeyboardInterrupt, match=goes_on), told_to_resume(config):
        raise KeyboardInterrupt


def test_ctrl_c_ends_training_and_its_workers(repository, phantom, tmp_path):
    command = [
        sys.executable, "tools/train.py", DEMO, "--work-dir", tmp_path, "--cfg-options",
        "train_cfg.max_epochs=500", "model.backbone.block_config=(1,1,1)",
        "model.neck.in_channels=(36,30,27)", "resize.size=96", "train_dataloader.batch_size=4",
        "train_dataloader.num_workers=2", "val_dataloader.num_workers=1",
    ]  # fmt: skip
    # A session of its own: as in a terminal, Ctrl-C reaches the workers as well.
    process = subprocess.Popen(
        list(map(str, command)), cwd=repository, start_new_session=True, text=True,
        env=os.environ | {"DEEPLESION_ROOT": str(phantom)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # What a shell starts in the background ignores SIGINT, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch "):
            break
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.startswith("train: interrupted; the same command with --resume goes on from")
    assert errors.count("\n") == 1, errors
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)  # is any process of the session left?
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers live on")
