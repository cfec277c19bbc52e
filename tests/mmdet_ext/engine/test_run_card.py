"""The run card: the learning rates that it announces are those that training has."""

import math

import pytest
from mmengine.config import Config

from mmdet_ext.engine.run_card import card, learning_rates
from mmdet_ext.engine.run_check import Plan


def schedule(*parts, lr=0.02):
    return Config(dict(optim_wrapper=dict(optimizer=dict(lr=lr)), param_scheduler=list(parts)))


WARM_UP = dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50)


@pytest.mark.filterwarnings("error")  # what is gone through beforehand warns of nothing
def test_rates_of_epochs_follow_warm_up_and_drops():
    drops = dict(type="MultiStepLR", by_epoch=True, milestones=[3, 5], gamma=0.1, end=6)
    rates, warm_up = learning_rates(schedule(WARM_UP, drops), Plan(8, 20, 6))
    assert warm_up == 50
    # mmengine reaches the full rate with the 50th update, so that 49 steps lead there.
    warm = [0.02 * (0.01 + 0.99 * (20 * epoch - 1) / 49) for epoch in (1, 2)]
    assert rates == pytest.approx([*warm, 0.02, 0.002, 0.002, 0.0002])


def test_a_cosine_by_epoch_is_gone_through_in_updates():
    cosine = dict(type="CosineAnnealingLR", by_epoch=True, T_max=4, end=4,
                  convert_to_iter_based=True)  # fmt: skip
    rates, warm_up = learning_rates(schedule(cosine), Plan(4, 10, 4))
    expected = [0.01 * (1 + math.cos(math.pi * (10 * e - 1) / 40)) for e in (1, 2, 3, 4)]
    assert warm_up == 0 and rates == pytest.approx(expected)


def test_the_card_groups_epochs_of_one_rate():
    facts = dict(
        data={}, published_key_slices={}, total_batch=8, processes=4, accumulative_counts=1,
        updates=60, max_epochs=6, updates_per_epoch=10, learning_rates=[0.1, 0.1, 0.1, 0.01, 1e-3],
        warm_up_updates=5, batch_norm="plain", stack=dict(num_slices=3), masks="GrabCut",
        pretrained="a/b.pth", weights=None, seed=0, versions=dict(torch="2"),
    )  # fmt: skip
    lines = dict(card(facts))
    assert lines["rate"] == (
        "0.1 (epoch 1-3), 0.01 (epoch 4), 0.001 (epoch 5); warm-up 5 updates = 0.50 epochs"
    )
    assert lines["batch"] == "8 images an update = 4 process(es) x 2"
    assert lines["pretrained"] == "b.pth"
    facts["learning_rates"] = []
    assert dict(card(facts))["rate"] == "not known beforehand"
