"""A loss that is not finite ends training with what a user needs to look for the cause."""

import math
from types import SimpleNamespace

import pytest
import torch

from mmdet_ext.engine.hooks import FiniteLossHook, LossError, RunCheckHook
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.run_check import Plan


def look(**losses):
    runner = SimpleNamespace(
        iter=41,
        epoch=2,
        optim_wrapper=SimpleNamespace(get_lr=lambda: {"lr": [0.02, 0.01], "base_lr": [0.02]}),
    )
    samples = [SimpleNamespace(img_path=path) for path in ("a/001.png", "b/002.png")]
    outputs = {name: torch.tensor(value, requires_grad=True) for name, value in losses.items()}
    FiniteLossHook().after_train_iter(runner, 9, {"data_samples": samples}, outputs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_training(value):
    with pytest.raises(LossError) as stopped:
        look(loss=value, loss_cls=value, loss_mask=1.0, acc=math.nan)
    message = str(stopped.value)
    for part in (
        f"loss = {value}, loss_cls = {value}\n", "iteration 42 (epoch 3, batch 10), process 0",
        "learning rate 0.01, 0.02", "images a/001.png, b/002.png",
    ):  # fmt: skip
        assert part in message
    assert "loss_mask" not in message


def test_a_finite_loss_passes():
    look(loss=1e30, loss_cls=1.0, acc=math.nan)


def test_every_experiment_has_it_before_checkpoints(repository, monkeypatch):
    monkeypatch.chdir(repository)
    hooks = load_config("configs/alignshift_7slice.py").default_hooks
    assert hooks.finite_loss.type == "FiniteLossHook"
    assert FiniteLossHook.priority == "ABOVE_NORMAL"


def test_losses_out_of_range_are_warned_of_and_causes_told_once():
    hook, said = RunCheckHook("demo"), []
    hook._plan, hook._told = Plan(4, 90, 10), set()
    runner = SimpleNamespace(logger=SimpleNamespace(warning=said.append))
    low, high = hook.reference.range_at(hook._plan, "loss_rpn_cls", 100)
    hook._check(runner, 100, {"loss_rpn_cls": (low * high) ** 0.5})
    assert said == []
    hook._check(runner, 100, {"loss_rpn_cls": 0.693})
    hook._check(runner, 500, {"loss_rpn_cls": 0.693})
    assert len(said) == 2
    assert "not as sound runs of 'demo' were:\n  update 100: loss_rpn_cls 0.693 is above" in said[0]
    assert ["the RPN does not learn" in text for text in said] == [True, False]
