"""AUC by histograms against AUC by sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ext.evaluation.feature_auc import HALF, FeatureAUC, bins_of


def sorted_auc(values, foreground):
    """By the mean rank of the foreground (Mann and Whitney), equal values sharing their ranks."""
    values = np.asarray(values, np.float64)
    _, place, number = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(number)
    ranks = (last - (number - 1) / 2)[place]
    inside = np.asarray(foreground, bool)
    one, other = inside.sum(), (~inside).sum()
    return (ranks[inside].sum() - one * (one + 1) / 2) / (one * other)


def plain_auc(values, foreground):
    pairs = [(a, b) for a, f in zip(values, foreground) if f
             for b, g in zip(values, foreground) if not g]  # fmt: skip
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-4, 4).map(lambda n: n / 4), st.booleans()), min_size=2)
    .filter(lambda pairs: len({f for _, f in pairs}) == 2)
)  # fmt: skip
def test_few_values_are_counted_pair_by_pair(pairs):
    values, foreground = zip(*pairs)
    auc = FeatureAUC(1)
    auc.add(torch.tensor([values]), torch.tensor(foreground))
    expected = plain_auc(values, foreground)
    assert sorted_auc(values, foreground) == pytest.approx(expected)
    assert auc.values().tolist() == pytest.approx([expected])
    assert auc.mean() == pytest.approx(max(expected, 1 - expected))


def features_like_a_networks():
    """Three volumes of channels after BatchNorm, ReLU and interpolation, and others."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        inside = torch.rand(48, 48, 48, generator=generator) < 0.15
        normal = torch.randn(2, 48, 48, 48, generator=generator)
        moved = normal + torch.tensor([0.1, 1.5]).view(2, 1, 1, 1) * inside
        smooth = torch.nn.functional.avg_pool3d(moved.relu()[None], 3, 1, 1)[0]
        yield torch.cat([moved, moved.relu(), smooth, moved.exp() / 50]), inside


def test_many_values_are_as_by_sorting_to_a_millionth():
    volumes = list(features_like_a_networks())
    auc = FeatureAUC(8)
    for features, inside in volumes:
        auc.add(features, inside)
    together = torch.cat([features.flatten(1) for features, _ in volumes], 1).numpy()
    foreground = torch.cat([inside.flatten() for _, inside in volumes]).numpy()
    expected = np.array([sorted_auc(channel, foreground) for channel in together])
    assert np.ptp(expected) > 0.3
    assert np.abs(auc.values().numpy() - expected).max() < 1e-6
    assert auc.mean() == pytest.approx(np.maximum(expected, 1 - expected).mean(), abs=1e-6)
    assert 0 < auc.uncertainty() < 1e-3


def test_bins_keep_the_order_of_floats():
    steps = torch.logspace(-9, 3, 4001, dtype=torch.float64).float()
    values = torch.cat([-steps.flip(0), torch.tensor([-0.0, 0.0]), steps])
    places = bins_of(values)
    assert (places.diff() >= 0).all()
    assert places.min() == 0 and places.max() == 2 * HALF
    assert (places[values == 0] == HALF).all() and (places[values != 0] != HALF).all()
    # Within the range neighbours that differ by more than a part in 2^11 are told apart.
    assert (bins_of(torch.tensor([1.0, 1.0 + 2**-11, 3.0, 3.0 * (1 + 2**-11)])).diff() > 0).all()


def test_a_channel_of_one_value_says_nothing():
    auc = FeatureAUC(2)
    auc.add(torch.tensor([[0.0, 0, 0, 0], [0, 1, 2, 3]]), torch.tensor([True, False, False, False]))
    assert auc.values().tolist() == [0.5, 0.0]
    assert auc.mean() == 0.75
    assert auc.uncertainty() == 0


def test_what_cannot_be_scored_is_refused():
    auc = FeatureAUC(2)
    with pytest.raises(ValueError, match="expected"):
        auc.add(torch.zeros(3, 4), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        auc.add(torch.full((2, 4), torch.nan), torch.zeros(4, dtype=torch.bool))
    auc.add(torch.zeros(2, 4), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="foreground"):
        auc.values()
