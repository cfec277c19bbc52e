"""Averaged weights against plain loops: the moving average in training, the mean of checkpoints."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from mmdet_ext.checkpoint import (
    CheckpointError,
    how_averaged,
    load_checkpoint_file,
    save_checkpoint_file,
)
from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.network import TRAINED_AS
from mmdet_ext.engine.averaging import AveragedWeightsHook, average_checkpoints
from mmdet_ext.engine.console import ConsoleHook
from mmdet_ext.engine.runner import ResumableRunner
from tools import average_checkpoints as command


class Loop(BaseLoop):
    def __init__(self):
        pass

    def run(self):
        pass


class FakeRunner(SimpleNamespace):
    """As much of a runner as the hook looks at: four batches an epoch, an update after each
    `accumulated`."""

    def __init__(self, accumulated=1):
        torch.manual_seed(0)
        super().__init__(
            model=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
            cfg=Config(dict(optim_wrapper=dict(accumulative_counts=accumulated))),
            train_dataloader=range(4),
            _train_loop=Loop(),
            distributed=False,
            iter=0,
            hooks=[],
            _resume=False,
        )
        self.optim_wrapper = SimpleNamespace(should_update=lambda: self.iter % accumulated == 0)

    def train(self, hook, iterations):
        """Random steps; returns the weights and statistics after each update."""
        seen = []
        for _ in range(iterations):
            self.iter += 1
            self.model(torch.randn(8, 3))
            if self.optim_wrapper.should_update():
                with torch.no_grad():
                    for weight in self.model.parameters():
                        weight += torch.randn_like(weight)
                seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
            hook.after_train_iter(self, 0)
        return seen


def average_of(seen, memory):
    """The plain loop: the mean of the first `memory` updates, then 1 / memory towards each."""
    average = {k: v.double() for k, v in seen[0].items() if v.is_floating_point()}
    for n, weights in enumerate(seen[1:], 2):
        for name in average:
            average[name] += (weights[name].double() - average[name]) / min(n, memory)
    return average


@pytest.mark.parametrize(
    "epochs, accumulated, memory", [(1, 1, 4), (2, 1, 8), (2, 2, 4), (9, 1, 36)]
)
def test_the_average_of_weights_and_statistics_is_that_of_a_plain_loop(epochs, accumulated, memory):
    runner, hook = FakeRunner(accumulated), AveragedWeightsHook(epochs)
    hook.before_run(runner)
    seen = runner.train(hook, 20)
    assert len(seen) == 20 // accumulated
    found = hook.ema_model.module.state_dict()
    expected = average_of(seen, memory)
    assert {"0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"} <= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-5, rtol=1e-5)
    # Training itself goes on from its own weights.
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, seen[-1][name])


class Tied(nn.Module):
    """One weight that three names share, as heads of a DETR share theirs, and one of its own."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.two = self.three = self.one
        self.own = nn.Linear(3, 4)

    def forward(self, x):
        return self.own(x) + self.one(x)


def test_weights_with_several_names_are_averaged_once():
    runner, hook = FakeRunner(), AveragedWeightsHook()
    runner.model = Tied()
    hook.before_run(runner)
    expected = average_of(runner.train(hook, 10), 4)
    found = hook.ema_model.module.state_dict()
    assert {"one.weight", "three.weight", "own.weight"} <= found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-5)


def test_a_second_average_is_refused():
    runner, hook = FakeRunner(), AveragedWeightsHook()
    runner.hooks = [hook, EMAHook()]
    with pytest.raises(ConfigError, match="two hooks of this config average the weights"):
        hook.before_run(runner)


def test_validation_and_checkpoints_are_the_averages_and_resuming_takes_up_both():
    runner, hook = FakeRunner(), AveragedWeightsHook()
    hook.before_run(runner)
    seen = runner.train(hook, 6)
    average = {k: v.clone() for k, v in hook.ema_model.module.state_dict().items()}
    hook.before_val_epoch(runner)
    for name, value in runner.model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, average[name]) and not torch.equal(value, seen[-1][name])
    hook.after_val_epoch(runner)
    checkpoint = dict(meta={}, state_dict=runner.model.state_dict())
    hook.before_save_checkpoint(runner, checkpoint)
    for name, value in seen[-1].items():
        if value.is_floating_point():
            assert torch.equal(checkpoint["state_dict"][name], average[name])
            assert torch.equal(checkpoint["ema_state_dict"][f"module.{name}"], value)
    said = how_averaged(checkpoint)
    assert said == "moving average over 1 epochs (4 updates), of 6 updates so far"

    again, other = FakeRunner(), AveragedWeightsHook()
    again._resume = True
    other.before_run(again)
    other.after_load_checkpoint(again, checkpoint)
    again.model.load_state_dict(checkpoint["state_dict"])
    random = torch.get_rng_state()
    runner.train(hook, 3)
    torch.set_rng_state(random)
    again.train(other, 3)
    for one, two in ((runner.model, again.model), (hook.ema_model, other.ema_model)):
        for name, value in one.state_dict().items():
            # A whole number is never averaged, and nothing reads BatchNorm's counter.
            if "num_batches_tracked" not in name:
                assert torch.equal(value, two.state_dict()[name]), name


def test_a_training_starts_from_weights_of_a_part_of_the_network():
    """`load_from` of another head, or of a backbone alone."""
    runner, hook = FakeRunner(), AveragedWeightsHook()
    hook.before_run(runner)
    part = {k: v + 1 for k, v in runner.model.state_dict().items() if k.startswith("0.")}
    for weights in (part, {**part, "1.weight": torch.zeros(7)}):
        hook.after_load_checkpoint(runner, dict(state_dict=weights))
    runner.model.load_state_dict(part, strict=False)
    (seen,) = runner.train(hook, 1)
    for name, value in hook.ema_model.module.state_dict().items():
        assert torch.equal(value, seen[name])


def test_a_checkpoint_says_how_many_updates_the_average_is_over():
    for number in (2, 49, 98, 103):  # 1 / (1 / 49) is a little more than 49
        runner, hook = FakeRunner(), AveragedWeightsHook(number)
        runner.train_dataloader = [0]
        hook.before_run(runner)
        checkpoint = dict(meta={}, state_dict=runner.model.state_dict())
        hook.before_save_checkpoint(runner, checkpoint)
        assert f"({number} updates)" in how_averaged(checkpoint)


def test_a_test_needs_nothing_of_the_hook():
    runner, hook = FakeRunner(), AveragedWeightsHook()
    runner._train_loop = dict(type="ResumableTrainLoop")
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    hook.before_run(runner)
    hook.after_load_checkpoint(runner, dict(state_dict=before))
    hook.before_test_epoch(runner)
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, before[name])
    hook.after_test_epoch(runner)


@pytest.mark.parametrize("epochs", [0, -1, float("nan")])
def test_a_memory_must_be_positive(epochs):
    with pytest.raises(ValueError, match="epochs must be > 0"):
        AveragedWeightsHook(epochs)


def test_a_test_says_what_the_weights_are_the_average_of(capsys):
    runner = SimpleNamespace(
        cfg=SimpleNamespace(filename="a.py"), _load_from="a.pth", work_dir="w",
        logger=SimpleNamespace(log_file="l"),
        test_dataloader=SimpleNamespace(dataset=SimpleNamespace()),
    )  # fmt: skip
    for checkpoint, said in (
        ({"meta": {"averaged": "mean of 2 checkpoints"}}, "mean of 2 checkpoints"),
        ({"ema_state_dict": {}}, "moving average"),
        ({"meta": None}, None),
    ):
        hook = ConsoleHook()
        hook.after_load_checkpoint(runner, checkpoint)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mmdet_ext.engine.console.counts", lambda _: {})
            patch.setattr("mmdet_ext.engine.console.describe", lambda _: "")
            hook.before_test(runner)
        shown = re.search(r"^weights +(.*)$", capsys.readouterr().out, re.M)
        assert (shown and shown[1]) == said


def test_resuming_without_the_hook_is_refused():
    parts = ("training", "message_hub", "optimizer", "param_schedulers", "gradients")
    checkpoint = {**{key: {} for key in parts}, "ema_state_dict": {}}
    runner = SimpleNamespace(load_checkpoint=lambda *_, **__: checkpoint, hooks=[ConsoleHook()])
    option = r"default_hooks\.averaged_weights\.type=AveragedWeightsHook, or its custom_hooks"
    with pytest.raises(CheckpointError, match=rf"a\.pth holds an average of weights.*{option}"):
        ResumableRunner.resume(runner, "a.pth")


def checkpoints(folder, count=3, name="epoch_{}.pth", numbers=None):
    """Files of a linear layer with BatchNorm, and their weights."""
    paths, states = [], []
    for number in numbers or range(1, count + 1):
        torch.manual_seed(number)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        model(torch.randn(4, 2))
        states.append({**model.state_dict(), "1.num_batches_tracked": torch.tensor(number)})
        paths.append(folder / name.format(number))
        meta = {TRAINED_AS: [{"model": {"depth": 3}}], "epoch": number}
        save_checkpoint_file(dict(meta=meta, state_dict=states[-1], optimizer={}), paths[-1])
    return paths, states


def test_the_mean_of_checkpoints(tmp_path):
    paths, states = checkpoints(tmp_path)
    found = average_checkpoints(paths)
    assert found.keys() == {"meta", "state_dict"} and found["meta"]["epoch"] == 3
    assert how_averaged(found) == "mean of 3 checkpoints: epoch_1.pth, epoch_2.pth, epoch_3.pth"
    for name, value in found["state_dict"].items():
        stacked = torch.stack([state[name].double() for state in states])
        expected = stacked.mean(0) if value.is_floating_point() else stacked[-1]
        assert value.dtype == states[0][name].dtype
        torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=1e-6)


def test_checkpoints_without_a_common_mean_are_refused(tmp_path):
    paths, states = checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no mean of 1 checkpoint"):
        average_checkpoints(paths[:1])
    meta = {TRAINED_AS: [{"model": {"depth": 5}}]}
    save_checkpoint_file(dict(meta=meta, state_dict=states[0]), tmp_path / "deep.pth")
    with pytest.raises(CheckpointError, match=r"model\.depth: trained with 3"):
        average_checkpoints([paths[0], tmp_path / "deep.pth"])
    for seed in (0, 1):
        save_checkpoint_file(
            dict(meta=dict(seed=seed), state_dict=states[0]), tmp_path / f"seed_{seed}.pth"
        )
    with pytest.raises(CheckpointError, match="of trainings with seeds 0 and 1"):
        average_checkpoints([tmp_path / "seed_0.pth", tmp_path / "seed_1.pth"])
    average_checkpoints([paths[0], tmp_path / "seed_1.pth"])  # one does not say its seed
    less = {name: value for name, value in states[0].items() if name != "0.bias"}
    save_checkpoint_file(dict(state_dict=less), tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"shapes of 1 weights, the first 0\.bias"):
        average_checkpoints([paths[0], tmp_path / "less.pth"])
    with pytest.raises(CheckpointError, match=r"given twice: .*epoch_1\.pth"):
        average_checkpoints([paths[0], paths[1], tmp_path / "." / "epoch_1.pth"])
    for name in ("best", "other"):
        meta = dict(iter=300)
        save_checkpoint_file(dict(meta=meta, state_dict=states[0]), tmp_path / f"{name}.pth")
    with pytest.raises(
        CheckpointError, match=r"best\.pth and .*other\.pth are both of iteration 300"
    ):
        average_checkpoints([tmp_path / "best.pth", tmp_path / "other.pth"])
    for content in (dict(epoch=3), dict(state_dict={})):
        save_checkpoint_file(content, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=r"other\.pth holds no weights"):
            average_checkpoints([paths[0], tmp_path / "other.pth"])


def test_the_mean_of_moving_averages_says_so(tmp_path):
    paths, _ = checkpoints(tmp_path, 2)
    content = load_checkpoint_file(paths[1])
    content["meta"]["averaged"] = "moving average over 1 epochs"
    save_checkpoint_file(content, paths[1])
    said = how_averaged(average_checkpoints(paths))
    assert said.endswith("epoch_2.pth (the last one: moving average over 1 epochs)")


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["average_checkpoints.py", *map(str, arguments)])
    return command.main()


def test_the_command_takes_the_last_of_a_folder(tmp_path, monkeypatch, capsys):
    checkpoints(tmp_path, numbers=(9, 10, 11))
    (tmp_path / "best_FROC_average_epoch_9.pth").write_bytes(b"")
    call(monkeypatch, tmp_path, "--last", 2, "--out", tmp_path / "mean.pth")
    assert "mean of 2 checkpoints: epoch_10.pth, epoch_11.pth" in capsys.readouterr().out
    mean = load_checkpoint_file(tmp_path / "mean.pth")
    assert mean["meta"]["epoch"] == 11 and "optimizer" not in mean
    call(monkeypatch, tmp_path, "--out", tmp_path / "all.pth")
    assert "mean of 3 checkpoints" in capsys.readouterr().out


def test_what_an_earlier_run_left_in_the_folder_is_not_taken(tmp_path, monkeypatch, capsys):
    checkpoints(tmp_path, numbers=(1, 2, 19, 20))  # of the run before
    own, _ = checkpoints(tmp_path, numbers=(9, 10))
    for path, names in zip(own, (["epoch_9.pth"], ["epoch_9.pth", "epoch_10.pth"])):
        content = load_checkpoint_file(path)
        content["message_hub"] = dict(runtime_info=dict(checkpoints=names))
        save_checkpoint_file(content, path)
    (tmp_path / "last_checkpoint").write_text(str(own[-1]))
    call(monkeypatch, tmp_path, "--out", tmp_path / "mean.pth")
    assert "mean of 2 checkpoints: epoch_9.pth, epoch_10.pth\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds 2 checkpoints"):
        call(monkeypatch, tmp_path, "--last", 3, "--out", tmp_path / "mean.pth")
    own[-1].write_bytes(own[-1].read_bytes()[:-100])  # not a mean of older ones then
    with pytest.raises(SystemExit, match=r"epoch_10\.pth is damaged"):
        call(monkeypatch, tmp_path, "--out", tmp_path / "mean.pth")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}", "--last", "4"], "holds 3 checkpoints"),
        (["{}", "--last", "1"], "at least two"),
        (["{}/epoch_1.pth", "{}/epoch_2.pth", "--last", "2"], "--last is for a work directory"),
        (["{}/epoch_1.pth", "{}/mean.pth"], "one of the checkpoints"),
        (["{}/epoch_1.pth", "{}/epoch_7.pth"], "no checkpoint file"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    checkpoints(tmp_path)
    arguments = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, *arguments, "--out", tmp_path / "mean.pth")
    assert not (tmp_path / "mean.pth").exists()
