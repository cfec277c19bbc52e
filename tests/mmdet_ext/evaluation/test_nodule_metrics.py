"""Dice of nodules against sets of voxels; AUC against SciPy's Mann-Whitney and a loop over
pairs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from mmdet_ext.evaluation.nodule_metrics import NoduleAUCMetric, NoduleDiceMetric, auc

# Few different scores, so that many are equal.
SCORED = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40)


@settings(max_examples=50, deadline=None)
@given(SCORED)
def test_auc_counts_pairs(scored):
    scores = np.array([s / 7 for s, _ in scored])
    positive = np.array([p for _, p in scored])
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in scores[positive]
        for b in scores[~positive]
    ]
    if not pairs:
        assert math.isnan(auc(scores, positive))
        return
    assert auc(scores, positive) == pytest.approx(np.mean(pairs))
    u = mannwhitneyu(scores[positive], scores[~positive], method="asymptotic").statistic
    assert auc(scores, positive) == pytest.approx(u / len(pairs))
    assert auc(-scores, positive) == pytest.approx(1 - np.mean(pairs))


def scored(metric, samples, **meta):
    metric.dataset_meta = dict(masks="reading", split_by="patient", **meta)
    half = len(samples) // 2
    for part in (samples[half:], samples[:half]):  # in any order
        metric.process({}, part)
    return metric.evaluate(len(samples))


def named(index, **fields):
    return dict(index=index, name=f"n{index}", patient=f"p{index // 2}", **fields)


def test_classification(tmp_path):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 30)
    malignant = np.clip(labels * 0.3 + rng.random(30) * 0.7, 0, 1).astype(np.float32)
    samples = [
        named(i, label=torch.tensor(int(y)), probabilities=torch.tensor([1 - p, p]))
        for i, (y, p) in enumerate(zip(labels, malignant))
    ]
    path = tmp_path / "nodules.json"
    found = scored(NoduleAUCMetric(result_file=str(path), epoch_chosen_on_test=True), samples)
    u = mannwhitneyu(malignant[labels == 1], malignant[labels == 0], method="asymptotic").statistic
    assert found["Nodules/auc"] == pytest.approx(100 * u / (sum(labels) * sum(1 - labels)))
    right = sum(int(p > 0.5) == y for p, y in zip(malignant, labels))
    assert found["Nodules/accuracy"] == pytest.approx(100 * right / 30)
    content = json.loads(path.read_text())
    assert content["epoch_chosen_on_test"] is True
    assert content["figures"]["auc"] == found["Nodules/auc"]
    assert [n["name"] for n in content["nodules"]] == [f"n{i}" for i in range(30)]
    assert content["nodules"][3]["probability"] == pytest.approx(float(malignant[3]))
    assert content["split_by"] == "patient"


def test_of_one_class_there_is_no_auc(tmp_path):
    samples = [
        named(i, label=torch.tensor(1), probabilities=torch.tensor([0.5, 0.5])) for i in range(2)
    ]
    path = tmp_path / "nodules.json"
    found = scored(NoduleAUCMetric(result_file=str(path)), samples)
    # A tie counts as benign.
    assert math.isnan(found["Nodules/auc"]) and found["Nodules/accuracy"] == 0
    assert json.loads(path.read_text())["figures"]["auc"] is None


def test_segmentation(tmp_path):
    rng = np.random.default_rng(2)
    samples = []
    for i in range(6):
        prediction, labels = rng.integers(0, 2, (2, 3, 4, 5))
        samples.append(named(i, prediction=torch.tensor(prediction), labels=torch.tensor(labels)))
    empty = torch.zeros(3, 4, 5, dtype=torch.uint8)
    samples[4] |= dict(prediction=empty)  # found nothing
    samples[5] |= dict(prediction=empty, labels=empty)  # the crop shows nothing
    path = tmp_path / "nodules.json"
    found = scored(NoduleDiceMetric(result_file=str(path)), samples)
    both = total = 0
    each = []
    for sample in samples:
        one, other = (
            {tuple(p) for p in torch.nonzero(sample[name]).tolist()}
            for name in ("prediction", "labels")
        )
        both, total = both + 2 * len(one & other), total + len(one) + len(other)
        if one or other:
            each.append(2 * len(one & other) / (len(one) + len(other)))
    assert len(each) == 5 and each[4] == 0
    assert found["Nodules/dice_global"] == pytest.approx(100 * both / total)
    assert found["Nodules/dice_per_nodule"] == pytest.approx(100 * np.mean(each))
    content = json.loads(path.read_text())
    assert content["epoch_chosen_on_test"] is False
    assert content["nodules"][0]["dice"] == pytest.approx(100 * each[0])
    assert content["nodules"][5]["dice"] is None
