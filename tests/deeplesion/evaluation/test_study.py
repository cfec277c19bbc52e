"""Statistics of methods against simulated runs of known truth."""

import numpy as np
import pytest

from deeplesion.evaluation.study import estimate, holm


def simulated(rng, draws, patient, seeds, sd_seed, sd_both):
    """Values of one method of true mean 0, and in the resamples."""
    cells = patient + rng.normal(0, sd_seed, (seeds, 1)) + rng.normal(0, sd_both, (seeds, patient.size))
    return cells.mean(axis=1), cells @ draws.T / patient.size


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("sd_seed", [0.0, 0.1, 0.5])
def test_intervals_cover_and_false_positives_are_nominal(seeds, sd_seed):
    rng, runs, n = np.random.default_rng(0), 400, 60
    covered = wrong = 0
    for _ in range(runs):
        draws = rng.multinomial(n, np.full(n, 1 / n), size=200)
        patient = rng.normal(0, 1, n)
        a, b = (simulated(rng, draws, patient, seeds, sd_seed, 0.5) for _ in range(2))
        mean = estimate([(1, *a)], n)
        covered += mean["low"] <= 0 <= mean["high"]
        wrong += estimate([(1, *a), (-1, *b)], n)["p"] < 0.05
    assert 0.91 <= covered / runs <= 0.99
    assert wrong / runs <= 0.08


def test_holm_is_the_plain_loop():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])


def test_one_seed_has_no_interval():
    row = estimate([(1, np.ones(1), np.ones((1, 100)))], 10)
    assert row["low"] is None and "one seed" in row["note"]
