"""Interruption and resume: bit for bit, from anywhere, with whatever training keeps a state of."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import CosineAnnealingLR, MultiStepLR
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from deeplesion.errors import UserError
from deeplesion.evaluation.results import read_results
from mmdet_ext.checkpoint import CheckpointError, load_checkpoint_file, save_checkpoint_file
from mmdet_ext.engine.averaging import average_checkpoints
from mmdet_ext.engine.run import load_config, train
from mmdet_ext.engine.run import test as run_test
from mmdet_ext.engine.runner import (
    ResumableRunner,
    other_groups,
    other_precision,
    other_schedules,
)

from ..small_training import BY_ITERATION, ITERATIONS, configuration, log, names, run


@pytest.fixture(scope="module")
def straight(repository, phantom, tmp_path_factory):
    """Never interrupted; a checkpoint at every epoch's end."""
    options = {"train_dataloader.num_workers": 2}
    return run(repository, phantom, tmp_path_factory.mktemp("straight"), **options)


@pytest.fixture(scope="module")
def straight_by_iteration(repository, phantom, tmp_path_factory):
    """The same without workers, and with a checkpoint at every second iteration."""
    return run(repository, phantom, tmp_path_factory.mktemp("iterations"), **BY_ITERATION)


def assert_same(one, two, where="checkpoint"):
    """Bit for bit, to the last leaf."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_same(one[key], two[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    else:
        assert one == two or (one != one and two != two), where


def trained(path):
    """What a checkpoint holds, but for what tells the time or names the run."""
    checkpoint = load_checkpoint_file(path)
    hub = checkpoint["message_hub"]
    scalars = hub["log_scalars"]
    hub["log_scalars"] = {key: scalars[key] for key in sorted(scalars) if "time" not in key}
    for key in ("cfg", "experiment_name", "mmengine_version", "eta", "checkpoints", "best"):
        hub["runtime_info"].pop(key, None)
    del checkpoint["meta"], hub["resumed_keys"]
    for key in ("train/loss", "train/lr"):
        assert len(hub["log_scalars"][key]["values"]) == ITERATIONS
    return checkpoint


def assert_same_training(one, two):
    assert_same(trained(one), trained(two))


def test_equal_seeds_give_equal_runs_whatever_workers_and_checkpoints(
    straight, straight_by_iteration
):
    one = trained(straight / "epoch_3.pth")
    two = trained(straight_by_iteration / "iter_9.pth")
    for part in ("state_dict", "ema_state_dict", "optimizer"):
        assert_same(one[part], two[part], part)
    assert_same(one["message_hub"]["log_scalars"], two["message_hub"]["log_scalars"])
    assert_same(one["training"]["random_states"], two["training"]["random_states"])


@pytest.mark.parametrize("there", [False, True])
def test_what_is_resumed_begins_with_the_weights_of_the_config(there, tmp_path, monkeypatch):
    """They count until there is a checkpoint to go on from."""
    runner = object.__new__(ResumableRunner)
    runner._resume, runner._load_from, runner._has_loaded = "auto", "weights.pth", False
    runner._work_dir, runner.logger = str(tmp_path), logging.getLogger()
    if there:
        save_checkpoint_file({}, tmp_path / "epoch_1.pth")
    loaded = []
    monkeypatch.setattr(
        Runner, "load_or_resume", lambda self: loaded.append((bool(self._resume), self._load_from))
    )
    runner.load_or_resume()
    assert loaded == [(True, str(tmp_path / "epoch_1.pth")) if there else (False, "weights.pth")]


def test_the_config_that_a_resumed_run_saves_is_the_experiments(
    straight, repository, phantom, tmp_path, capsys
):
    """Failed before: its tests took the last epoch, and a new training by it went on with the
    run."""
    work_dir = interrupted(straight, tmp_path / "run", "epoch_2.pth")
    run(repository, phantom, work_dir, str(work_dir / "epoch_2.pth"))
    saved = max(work_dir.glob("*/alignshift_3slice.py"), key=lambda f: f.stat().st_mtime_ns)
    config = load_config(str(saved))
    assert config.resume is False and config.load_from is None
    with pytest.raises(UserError, match="holds a training already"):
        train(config)
    # Whatever a config says: one of an earlier version, say, of a test with other views.
    config.update(resume="auto", experiment_name=next(names))
    config.test_evaluator.views = ["depth"]
    best = work_dir / "best_FROC_average_epoch_2.pth"
    capsys.readouterr()
    result = run_test(config, str(best))
    assert f"\ncheckpoint  {best}\n" in capsys.readouterr().out
    assert read_results(Path(result)).views == ()


SGD = {
    "optim_wrapper.optimizer._delete_": True,
    "optim_wrapper.optimizer.type": "SGD",
    "optim_wrapper.optimizer.lr": 0.01,
}
COSINE = dict(type="CosineAnnealingLR", by_epoch=True, T_max=3)
STEPS = dict(type="MultiStepLR", by_epoch=True, milestones=[2])


def test_another_optimizer_or_schedule_is_named(straight, repository, phantom, tmp_path):
    checkpoint = straight / "epoch_2.pth"
    said = "the optimizer had amsgrad, betas, .* and has dampening, .*momentum.* instead; "
    said += r"param_scheduler\.0 had .* and has .*milestones"
    with pytest.raises(CheckpointError, match=said) as refused:
        options = {**SGD, "param_scheduler": [STEPS, COSINE]}
        run(repository, phantom, tmp_path, str(checkpoint), **options)
    assert f"--cfg-options load_from={checkpoint}" in str(refused.value)
    assert not list(tmp_path.glob("*.pth"))


def test_in_what_optimizers_and_schedules_are_others():
    def groups(*params, **options):
        return dict(param_groups=[dict(params=each, lr=0.1, **options) for each in params])

    two, one = groups([0, 1], [2]), groups([0, 1, 2])
    assert other_groups(two, two) == []
    assert other_groups(two, one) == [
        "it has 2 parameter group(s) of 3 in all, "
        "the config's optimizer 1 parameter group(s) of 3 in all"
    ]
    assert other_groups(groups([0], betas=(0.9, 0.99)), groups([0], momentum=0.9)) == [
        "the optimizer had betas, and has momentum instead"
    ]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    cosine, steps = CosineAnnealingLR(optimizer, T_max=3), MultiStepLR(optimizer, milestones=[2])
    saved = [cosine.state_dict(), cosine.state_dict()]
    assert other_schedules(saved, [cosine, cosine]) == []
    assert other_schedules(saved, [cosine]) == [
        "it has 2 schedules (param_scheduler), the config 1"
    ]
    assert other_schedules(saved, [cosine, steps]) == [
        "param_scheduler.1 had T_max, eta_min, eta_min_ratio, and has gamma, milestones instead"
    ]


def test_another_precision_is_named(straight, repository, phantom, tmp_path):
    """Gradients that wait in a checkpoint of --amp are thousands of times too large without it."""
    checkpoint = load_checkpoint_file(straight / "epoch_2.pth")
    assert other_precision(checkpoint["optimizer"], checkpoint["optimizer"]) == []
    mixed = {**checkpoint["optimizer"], "loss_scaler": dict(scale=65536.0)}
    (said,) = other_precision(checkpoint["optimizer"], mixed)
    assert said == "it was trained without --amp, and is resumed with it"
    save_checkpoint_file({**checkpoint, "optimizer": mixed}, tmp_path / "epoch_2.pth")
    with pytest.raises(CheckpointError, match="trained with --amp, and is resumed without it"):
        run(repository, phantom, tmp_path, str(tmp_path / "epoch_2.pth"))


def test_more_or_fewer_options_may_be_of_another_version_of_torch():
    group = dict(params=[0, 1], lr=0.1, betas=(0.9, 0.99))
    newer = dict(param_groups=[{**group, "decoupled_weight_decay": True}])
    older = dict(param_groups=[group])
    assert other_groups(newer, older) == other_groups(older, newer) == []


@pytest.mark.parametrize("given", [lambda s: s, lambda s: [s], lambda s: (s,)])
def test_a_schedule_counts_updates_alone_and_in_a_list(given, monkeypatch):
    """Ten iterations an epoch, of which four make an update. Failed before for one alone."""
    runner = object.__new__(ResumableRunner)
    runner.cfg = Config(dict(optim_wrapper=dict(accumulative_counts=4)))
    monkeypatch.setattr(ResumableRunner, "max_iters", 30)
    monkeypatch.setattr(ResumableRunner, "train_dataloader", range(10))
    monkeypatch.setattr(Runner, "build_param_scheduler", lambda self, schedules: schedules)
    linear = dict(type="LinearLR", by_epoch=False)
    assert runner.build_param_scheduler(given(linear)) == [{**linear, "end": 8}]
    cosine = dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True)
    assert runner.build_param_scheduler(given(cosine)) == [{**cosine, "epoch_length": 2}]


def test_another_seed_gives_another_run(straight, repository, phantom, tmp_path):
    options = {"randomness.seed": 1, "train_cfg.max_epochs": 1}
    other = run(repository, phantom, tmp_path, **options)
    one = load_checkpoint_file(straight / "epoch_1.pth")["message_hub"]["log_scalars"]
    two = load_checkpoint_file(other / "epoch_1.pth")["message_hub"]["log_scalars"]
    assert (one["train/loss"]["values"] != two["train/loss"]["values"]).all()


def interrupted(folder, work_dir, last):
    """A run of which everything after the checkpoint `last` never happened."""
    shutil.copytree(folder, work_dir)
    (work_dir / "last_checkpoint").write_text(str(folder / last))
    stem, number = last.removesuffix(".pth").split("_")
    for file in work_dir.glob(f"{stem}_*.pth"):
        if int(file.stem.split("_")[1]) > int(number):
            file.unlink()
    return work_dir


def test_resumed_at_the_end_of_an_epoch(straight, repository, phantom, tmp_path):
    work_dir = interrupted(straight, tmp_path / "run", "epoch_2.pth")
    # The checkpoint's seed counts.
    options = {"train_dataloader.num_workers": 2, "randomness.seed": 7}
    run(repository, phantom, work_dir, "auto", **options)
    assert_same_training(straight / "epoch_3.pth", work_dir / "epoch_3.pth")
    # The record says the seed that is used, so one run's checkpoints have a mean.
    assert "randomness.seed is 7, and training goes on with 0" in log(work_dir)
    record = max(work_dir.glob("run_*.json"), key=lambda f: f.stat().st_mtime_ns)
    record = json.loads(record.read_text())
    assert record["seed"] == record["training"]["seed"] == 0
    average_checkpoints([work_dir / "epoch_2.pth", work_dir / "epoch_3.pth"])


def test_resumed_in_the_middle(straight_by_iteration, repository, phantom, tmp_path):
    """After the first of three batches, which workers had read beyond."""
    work_dir = interrupted(straight_by_iteration, tmp_path / "run", "iter_4.pth")
    options = {**BY_ITERATION, "train_dataloader.num_workers": 2}
    run(repository, phantom, work_dir, "auto", **options)
    assert_same_training(straight_by_iteration / "iter_9.pth", work_dir / "iter_9.pth")


@HOOKS.register_module()
class Interrupt(Hook):
    def before_val_epoch(self, runner):
        raise KeyboardInterrupt


def test_interrupted_validation_is_done_after_resuming(straight, repository, phantom, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        hooks = [dict(type="AveragedWeightsHook", epochs=2), dict(type="Interrupt")]
        run(repository, phantom, tmp_path, custom_hooks=hooks)
    assert not list(tmp_path.glob("best*.pth"))
    run(repository, phantom, tmp_path, "auto")
    assert_same_training(straight / "epoch_3.pth", tmp_path / "epoch_3.pth")
    best = [load_checkpoint_file(d / "best_FROC_average_epoch_2.pth") for d in (straight, tmp_path)]
    assert_same(best[0]["state_dict"], best[1]["state_dict"])


def test_killed_at_any_moment(straight_by_iteration, repository, phantom, tmp_path):
    work_dir = tmp_path / "run"
    config = configuration(repository, phantom, work_dir, **BY_ITERATION)
    config.dump(tmp_path / "config.py")
    command = [sys.executable, "tools/train.py", str(tmp_path / "config.py")]
    with subprocess.Popen(
        command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not (work_dir / "iter_2.pth").exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    run(repository, phantom, work_dir, "auto", **BY_ITERATION)
    assert_same_training(straight_by_iteration / "iter_9.pth", work_dir / "iter_9.pth")


def test_damaged_checkpoint_is_named_and_the_one_before_used(
    straight, repository, phantom, tmp_path
):
    """Its gradients wait for the next batch, too: two are accumulated, and an epoch has three."""
    work_dir = interrupted(straight, tmp_path / "run", "epoch_2.pth")
    content = bytearray((work_dir / "epoch_2.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (work_dir / "epoch_2.pth").write_bytes(content)
    run(repository, phantom, work_dir, "auto")
    assert re.search(r"WARNING - .*epoch_2.pth is damaged", log(work_dir))
    assert f"resumed {work_dir}/epoch_1.pth" in log(work_dir)
    assert_same_training(straight / "epoch_3.pth", work_dir / "epoch_3.pth")


def test_another_batch_size_goes_on_at_the_same_sample_and_says_so(
    straight_by_iteration, repository, phantom, tmp_path
):
    work_dir = interrupted(straight_by_iteration, tmp_path / "run", "iter_4.pth")
    options = {
        "train_dataloader.batch_size": 2,
        "auto_scale_lr.base_batch_size": 2,
        "train_cfg.max_epochs": 2,
    }
    run(repository, phantom, work_dir, "auto", **options)
    assert "total_batch was 6, is 2: training goes on, but not bit for bit" in log(work_dir)
    # One epoch of eight samples, three of the next, then its other five, one at a time.
    checkpoint = load_checkpoint_file(work_dir / "epoch_2.pth")
    assert checkpoint["meta"]["iter"] == 8 + 8
    assert len(checkpoint["message_hub"]["log_scalars"]["train/loss"]["values"]) == 4 + 5


def test_the_same_batch_in_other_parts_goes_on_at_the_same_update(
    straight_by_iteration, repository, phantom, tmp_path
):
    """After four iterations of three images, two updates; then the six at once."""
    work_dir = interrupted(straight_by_iteration, tmp_path / "run", "iter_4.pth")
    run(repository, phantom, work_dir, "auto", **{"optim_wrapper.accumulative_counts": 1})
    assert "total_batch was" not in log(work_dir)
    assert "iteration_images was 3, is 6: training goes on" in log(work_dir)
    # Two updates were done; the epoch that had begun starts again, since the three images that it
    # had seen are no whole batch of six. An epoch of eight has two.
    before = load_checkpoint_file(straight_by_iteration / "iter_4.pth")["param_schedulers"][0]
    after = load_checkpoint_file(work_dir / "epoch_3.pth")["param_schedulers"][0]
    assert before["last_step"] == 2
    assert after["last_step"] == 2 + 2 + 2
