"""A loss that is not finite ends training with what a user needs to look for the cause."""

import math
from types import SimpleNamespace

import pytest
import torch

from mmdet_ext.engine.hooks import FiniteLossHook, LossError
from mmdet_ext.engine.run import load_config


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
