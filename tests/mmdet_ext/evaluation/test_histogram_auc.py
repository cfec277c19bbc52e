"""AUC from histograms against sorting, and against its definition by pairs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from ct_volumes.shapes import shapes
from mmdet_ext.convert import convert_to_3d
from mmdet_ext.evaluation.histogram_auc import HistogramAUC
from mmdet_ext.models.unet import ShapesUNet


def sorted_auc(values, foreground):
    """By ranks, equal values sharing theirs (Mann and Whitney)."""
    ranks = rankdata(values)
    n = int(foreground.sum())
    return (ranks[foreground].sum() - n * (n + 1) / 2) / (n * (len(values) - n))


def histogram(values, foreground, **options):
    auc = HistogramAUC(values.shape[1], **options)
    auc.update(values, foreground)
    return auc


numbers = st.floats(-(2.0**60), 2.0**60, width=32)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(numbers, st.booleans()), min_size=2, max_size=30))
def test_any_numbers_within_the_bound(pairs):
    values = np.array([value for value, _ in pairs], np.float32)
    foreground = np.array([flag for _, flag in pairs])
    if foreground.all() or not foreground.any():
        return
    by_pairs = np.mean(
        [(f > b) + (f == b) / 2 for f in values[foreground] for b in values[~foreground]]
    )
    assert sorted_auc(values, foreground) == pytest.approx(by_pairs, abs=1e-12)
    auc = histogram(
        torch.from_numpy(values)[None, None], torch.from_numpy(foreground)[None], bins=64
    )
    assert abs(auc.auc().item() - by_pairs) <= auc.error_bound().item() + 1e-12


def test_what_lies_beyond_the_first_batch_counts_in_the_outermost_bins():
    auc = HistogramAUC(1, bins=8)
    first, later = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[-5.0, 7.0, 0.5, 1e-9]]])
    auc.update(first, torch.tensor([[False, True]]))
    auc.update(later, torch.tensor([[False, True, True, True]]))
    background, foreground = auc.counts[:, 0].tolist()
    assert background == [2, 0, 0, 0, 0, 0, 0, 0] and foreground == [1, 0, 0, 0, 0, 1, 0, 2]
    assert auc.auc().item() == pytest.approx((3 + 1 / 2) / 4)
    assert auc.error_bound().item() == pytest.approx(1 / 8)


@torch.no_grad()
def test_features_of_an_untrained_network_to_a_millionth():
    """As the proof of concept measures them, on three volumes, in two batches."""
    torch.manual_seed(0)
    network = convert_to_3d(ShapesUNet(6), "ACSConv", depth="isotropic").eval()
    network.model.head, network.model.inner_mode = torch.nn.Identity(), "nearest"
    images, labels = shapes(3, 3, "test")
    images = torch.from_numpy(images)[:, None, ::2, ::2, ::2]  # an eighth of the voxels
    foreground = torch.from_numpy(labels)[:, ::2, ::2, ::2] != 5
    features = network(images)
    assert features.shape == (3, 32, 24, 24, 24)
    auc = HistogramAUC(32)
    auc.update(features[:2], foreground[:2])
    auc.update(features[2:], foreground[2:])
    flat = features.movedim(1, 0).flatten(1).numpy()
    expected = np.array(
        [sorted_auc(of_channel, foreground.flatten().numpy()) for of_channel in flat]
    )
    assert np.abs(auc.auc().numpy() - expected).max() < 1e-6
    assert auc.mean() == pytest.approx(np.maximum(expected, 1 - expected).mean(), abs=1e-6)
    assert 0.5 < auc.mean() < 1


def test_batches_and_precisions():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 2, 5, 6, 7, generator=generator)
    foreground = torch.rand(4, 5, 6, 7, generator=generator) < 0.3
    values[0].clamp_(-2, 2), values[0, :, 0, 0, :2].copy_(torch.tensor([-5.0, 5.0]))
    whole, parts = histogram(values, foreground), HistogramAUC(2)
    for i in range(4):
        parts.update(values[i : i + 1], foreground[i : i + 1])
    assert torch.equal(whole.auc(), parts.auc())
    assert torch.equal(histogram(values.double(), foreground).auc(), whole.auc())
    low = values.bfloat16()
    assert torch.equal(histogram(low, foreground).auc(), histogram(low.float(), foreground).auc())
    assert histogram(values, foreground & False).auc().isnan().all()
    turned = histogram(-values, foreground)
    torch.testing.assert_close(turned.auc(), 1 - whole.auc(), rtol=0, atol=1e-6)
    assert turned.mean() == pytest.approx(whole.mean(), abs=1e-6)


def test_what_is_refused():
    values, foreground = torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="2 bins at least"):
        HistogramAUC(2, bins=1)
    with pytest.raises(ValueError, match="expected 3 channels, got 2"):
        HistogramAUC(3).update(values, foreground)
    with pytest.raises(ValueError, match="differ in more than the channels"):
        HistogramAUC(2).update(values, foreground[:, :2])
    with pytest.raises(ValueError, match="not a finite number"):
        HistogramAUC(2).update(values + torch.nan, foreground)
