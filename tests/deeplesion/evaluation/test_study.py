"""Statistics of methods against simulated runs of known truth."""

import numpy as np
import pytest
from scipy import stats

from deeplesion.evaluation.results import Result
from deeplesion.evaluation.study import _contrasts, contrasts, estimate, holm, study
from deeplesion.report.tables import comparison_table


def simulated(rng, draws, patient, seeds, sd_seed, sd_both):
    """Values of one method of true mean 0, and in the resamples."""
    cells = (
        patient + rng.normal(0, sd_seed, (seeds, 1)) + rng.normal(0, sd_both, (seeds, patient.size))
    )
    return cells.mean(axis=1), cells @ draws.T / patient.size


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("sd_seed", [0.0, 0.1, 0.5])
def test_intervals_cover_and_false_positives_are_nominal(seeds, sd_seed):
    # Of 200 runs a share of 5 % is known to 1.5 % (standard deviation).
    rng, runs, n = np.random.default_rng(0), 200, 60
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


@pytest.mark.parametrize("seeds", [3, 5])
def test_seeds_alone_are_the_t_tests(seeds):
    """One method: Student's interval. Two: Welch's test, not Student's of equal variances."""
    rng = np.random.default_rng(seeds)
    a, b = rng.normal(1, 1, seeds), rng.normal(0, 3, 4)
    of_a, of_b = ((v, np.repeat(v[:, None], 50, axis=1)) for v in (a, b))
    one = stats.ttest_1samp(a, 0)
    row = estimate([(1, *of_a)], 40)
    assert row["p"] == pytest.approx(one.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(one.confidence_interval()))
    two = stats.ttest_ind(a, b, equal_var=False)
    row = estimate([(1, *of_a), (-1, *of_b)], 40)
    assert row["p"] == pytest.approx(two.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(two.confidence_interval()))


def test_patients_alone_are_the_bootstrap_with_one_degree_less_than_patients():
    drawn = np.random.default_rng(0).normal(2, 1, 500)
    row = estimate([(1, np.full(3, 2.0), np.tile(drawn, (3, 1)))], 12)
    half = stats.t(11).ppf(0.975) * drawn.std(ddof=1)
    assert (row["low"], row["high"]) == pytest.approx((2 - half, 2 + half))
    assert row["p"] == pytest.approx(2 * stats.t(11).sf(2 / drawn.std(ddof=1)))


def test_parts_of_patients_seeds_and_both_are_those_worked_out_by_hand():
    """Two seeds, two draws. Means over seeds 0 and 4: 8 of patients. Values 1 and 3: 2 / 2 of
    seeds. Draws less their mean over seeds -1, 2 and 1, -2: 4.5 and 4.5, over 2 x 1: 4.5 of
    both."""
    points, drawn = np.array([1.0, 3.0]), np.array([[-1.0, 6.0], [1.0, 2.0]])
    assert drawn.mean(axis=0).tolist() == [0, 4]
    freedom = max(8 + 1 - 4.5, 8) ** 2 / (8**2 / 9 + 1**2 / 1)
    half = stats.t(freedom).ppf(0.975) * np.sqrt(8)
    assert estimate([(1, points, drawn)], 10)["high"] == pytest.approx(2 + half)
    # Four times as much of the seeds: 8 + 16 - 4.5 is more than either.
    points = np.array([1.0, 9.0])
    freedom = (8 + 16 - 4.5) ** 2 / (8**2 / 9 + 16**2 / 1)
    half = stats.t(freedom).ppf(0.975) * np.sqrt(8 + 16 - 4.5)
    assert estimate([(1, points, drawn)], 10)["high"] == pytest.approx(5 + half)


@pytest.mark.parametrize("seeds", [3, 5])
def test_false_positives_are_neither_more_nor_much_fewer_than_five_in_a_hundred(seeds):
    """Where most of the spread is that of seeds, or of seeds and patients together."""
    rng, runs, n = np.random.default_rng(1), 600, 40
    draws = rng.multinomial(n, np.full(n, 1 / n), size=150)
    for sd_seed, sd_both in ((1.0, 0.5), (0.0, 3.0)):
        wrong = 0
        for _ in range(runs):
            patient = rng.normal(0, 1, n)
            a, b = (simulated(rng, draws, patient, seeds, sd_seed, sd_both) for _ in range(2))
            wrong += estimate([(1, *a), (-1, *b)], n)["p"] < 0.05
        assert 0.01 <= wrong / runs <= 0.075, (sd_seed, sd_both)


def plain_holm(p):
    """The least level at which each hypothesis falls, tried out: the smallest p-value is held
    against level / m, the next against level / (m - 1) and so on, until one does not fall."""
    order = sorted(range(len(p)), key=p.__getitem__)
    levels = np.linspace(0, 1, 1001)
    least = [1.0] * len(p)
    for level in levels[::-1]:
        for rank, i in enumerate(order):
            if p[i] > level / (len(p) - rank) + 1e-12:
                break
            least[i] = float(level)
    return least


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_plain_loop(seed):
    p = np.random.default_rng(seed).integers(0, 300, 6) / 1000
    assert holm(p.tolist()) == pytest.approx(plain_holm(p.tolist()), abs=1e-9)


def test_holm_leaves_out_what_has_no_p_value():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])


@pytest.mark.parametrize("p", [[0.02, 0.004], [0.02, None, 0.004]])
def test_holm_of_a_family_that_is_not_whole_counts_what_lacks(p):
    corrected = [c for c in holm(p, 5) if c is not None]
    assert corrected == pytest.approx(plain_holm([0.02, 0.004, 1, 1, 1])[:2], abs=1e-9)
    assert holm(p, 2) == holm(p)


def test_the_gap_has_as_many_patients_as_the_smaller_half():
    """With thick slices of one patient the gap has no interval, as they have none."""
    rng = np.random.default_rng(0)
    methods = {"a": [result(rng, 0.5) for _ in range(3)]}
    for number in (1, 2):
        for run in methods["a"]:
            for record in run.records:
                thick = record["patient"] in [str(n) for n in range(number)]
                record["thickness_mm"] = 5.0 if thick else 1.0
        changed = {"a": [Result("", run.records) for run in methods["a"]]}
        found = study(changed, "a", 100)["methods"]["a"]
        for group in ("thick", "thin - thick"):
            row = found[group]["average"]
            assert (row["low"] is None) == (number == 1), (number, group)


def test_nothing_that_varies_and_one_patient_have_no_interval():
    same = np.full(3, 50.0), np.full((3, 100), 50.0)
    row = estimate([(1, *same)], 10)
    assert (row["value"], row["low"], row["p"]) == (50.0, None, None)
    assert "nothing varies" in row["note"]
    assert "one patient" in estimate([(1, *same)], 1)["note"]


def test_one_seed_has_no_interval():
    row = estimate([(1, np.ones(1), np.ones((1, 100)))], 10)
    assert row["low"] is None and "one seed" in row["note"]


def test_resampling_patients_alone_would_find_too_much():
    rng, n, wrong = np.random.default_rng(0), 60, 0
    draws = rng.multinomial(n, np.full(n, 1 / n), size=200)
    for _ in range(100):
        (_, da), (_, db) = (simulated(rng, draws, np.zeros(n), 3, 0.5, 0.5) for _ in range(2))
        low, high = np.quantile(da.mean(axis=0) - db.mean(axis=0), (0.025, 0.975))
        wrong += not low <= 0 <= high
    assert wrong > 30


def result(rng, chance, lesions=1):
    records = []
    for i in range(40):
        box = [10, 10, 30, 30] if rng.random() < chance else [50, 50, 70, 70]
        records.append(
            dict(file_name=f"{i}", patient=str(i // 4), thickness_mm=1.0 if i % 2 else 5.0,
                 lesions=[dict(bbox=[10, 10, 30, 30])] * lesions, boxes=[box],
                 scores=[float(rng.random())])
        )  # fmt: skip
    return Result("", records)


def test_results_from_end_to_end():
    rng = np.random.default_rng(0)
    methods = {name: [result(rng, c) for _ in range(3)] for name, c in (("a", 0.4), ("b", 0.9))}
    found = study(methods, "a", resamples=100)
    row = found["differences"]["b"]["all"]["average"]
    plain = [np.mean([r.average for r in map(lambda x: x.curve, methods[m])]) for m in "ab"]
    assert row["value"] == pytest.approx(100 * (plain[1] - plain[0]))
    assert row["low"] > 0 and row["p_holm"] == row["p"] < 0.05
    assert set(found["methods"]["a"]) == {"all", "thin", "thick", "thin - thick"}
    with pytest.raises(ValueError, match="none of the methods"):
        study(methods, "c")


@pytest.fixture
def four_methods():
    rng = np.random.default_rng(0)
    chances = dict(a=0.4, b=0.9, c=0.5, d=0.7)
    return {name: [result(rng, c) for _ in range(3)] for name, c in chances.items()}


def test_a_family_of_differences_is_corrected_for_itself_alone(four_methods):
    common = study(four_methods, "a", 100)["differences"]
    assert contrasts(four_methods, {name: {name: 1, "a": -1} for name in "bcd"}, 100) == common
    family = {"b": {"b": 1, "a": -1}, "d": {"d": 1, "c": -1}}
    found = contrasts(four_methods, family, 100)
    rows = [found[name]["thick"]["average"] for name in "bd"]
    one, other = (study(four_methods, name, 100)["differences"] for name in "ac")
    assert rows[0]["p"] == one["b"]["thick"]["average"]["p"]
    assert rows[1]["low"] == other["d"]["thick"]["average"]["low"]
    assert [row["p_holm"] for row in rows] == holm([row["p"] for row in rows])


def test_the_average_of_two_differences_is_the_plain_one(four_methods):
    family = {"b, d": {"b": 0.5, "a": -0.5, "d": 0.5, "c": -0.5}}
    row = contrasts(four_methods, family, 100, planned=3)["b, d"]["all"]["average"]
    mean = {m: 100 * np.mean([r.curve.average for r in four_methods[m]]) for m in "abcd"}
    assert row["value"] == pytest.approx((mean["b"] + mean["d"] - mean["a"] - mean["c"]) / 2)
    assert row["p_holm"] == pytest.approx(3 * row["p"])


def test_contrasts_of_seeds_alone_are_the_t_test_of_an_analysis_of_variance():
    """Four cells of equal spread: that of the cells together has the degrees of freedom of all, and
    w^2 weighs each cell's part."""
    seeds = np.array([-1.0, 0.0, 1.0])
    cells = [seeds + shift for shift in (1.0, 2.0, 4.0, 8.0)]
    weights = (0.5, -0.5, 0.5, -0.5)
    terms = [(w, v, np.repeat(v[:, None], 50, axis=1)) for w, v in zip(weights, cells)]
    row = estimate(terms, 40)
    half = stats.t(8).ppf(0.975) * np.sqrt(4 * 0.25 * 1 / 3)
    assert row["value"] == pytest.approx(-2.5)
    assert (row["low"], row["high"]) == pytest.approx((-2.5 - half, -2.5 + half))


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_averages_taken_by_seed_have_nominal_false_positives(common):
    """Of two operators with two policies each. Runs of one operator and one seed have this share of
    their variance in common, which counting all runs as independent leaves out."""
    # Of 300 runs a share of 5 % is known to 1.3 % (standard deviation), one of 10 % to 1.7 %.
    rng, runs, n = np.random.default_rng(2), 300, 40
    draws = rng.multinomial(n, np.full(n, 1 / n), size=150)
    weights, wrong = (0.5, 0.5, -0.5, -0.5), dict(by_seed=0, independent=0)
    for _ in range(runs):
        patient, cells = rng.normal(0, 1, n), []
        for sd in (1.0, 0.6):
            shared = np.sqrt(common) * rng.normal(0, sd, 3)
            for _ in range(2):
                points, drawn = simulated(rng, draws, patient, 3, sd * np.sqrt(1 - common), 0.5)
                cells.append((points + shared, drawn + shared[:, None]))
        terms = [(w, *cell) for w, cell in zip(weights, cells)]
        wrong["independent"] += estimate(terms, n)["p"] < 0.05
        names = [str(i) for i in range(4)]
        of = {("all", "average"): (n, dict(zip(names, cells)))}
        row = _contrasts(of, {"x": dict(zip(names, weights))}, by_seed=["x"])["x"]
        wrong["by_seed"] += row["all"]["average"]["p"] < 0.05
    assert 0.01 <= wrong["by_seed"] / runs <= 0.075
    assert (wrong["independent"] / runs > 0.1) == (common > 0)


def test_two_ways_to_test_the_same_trainings_are_taken_by_seed(four_methods):
    """Their difference varies as much as the differences of the runs do, here not at all."""
    same = {**four_methods, "again": four_methods["a"]}
    family = {"again": {"again": 1, "a": -1}, "b": {"b": 1, "a": -1}}
    found = contrasts(same, family, 100, by_seed=["again"])
    assert found["again"]["all"]["average"]["value"] == 0
    assert "nothing varies" in found["again"]["all"]["average"]["note"]
    assert found["b"] == contrasts(same, {"b": family["b"]}, 100)["b"]
    by_seed = contrasts(same, {"b": family["b"]}, 100, by_seed=["b"])["b"]["all"]["average"]
    differences = np.subtract(
        *([100 * np.float64(run.curve.average) for run in four_methods[m]] for m in "ba")
    )
    assert by_seed["value"] == pytest.approx(differences.mean())
    half = (by_seed["high"] - by_seed["low"]) / 2
    assert half >= stats.t(40).ppf(0.975) * differences.std(ddof=1) / np.sqrt(3)


@pytest.mark.parametrize(
    "family, message",
    [
        ({"x": {"b": 1, "e": -1}}, "'x': e is none of the methods a, b, c, d"),
        ({"b": {"b": 1, "a": -1}, "x": {}}, "'x': its methods need a finite weight"),
        ({"x": {"a": float("nan")}}, "'x': its methods need a finite weight"),
        ({}, "no contrast"),
        ({"x": {"b": 1, "short": -1}}, "'x': taken by seed, but runs differ: b 3, short 2"),
    ],
)
def test_contrasts_that_cannot_be_estimated(four_methods, family, message):
    methods = {**four_methods, "short": four_methods["a"][:2]}
    if "short" not in message:
        del methods["short"]
    with pytest.raises(ValueError, match=message):
        contrasts(methods, family, by_seed=["x"])


@pytest.mark.parametrize("key", ["thickness_mm", "patient"])
def test_what_an_image_is_is_said_by_the_first_run(key):
    rng = np.random.default_rng(0)
    methods = {name: [result(rng, c) for _ in range(2)] for name, c in (("a", 0.4), ("b", 0.9))}
    unknown = dict(thickness_mm=np.nan, patient=None)[key]
    changed = [Result("", [r | {key: unknown} for r in run.records]) for run in methods["b"]]
    assert study({**methods, "b": changed}, "a", 100) == study(methods, "a", 100)


def test_without_lesions_there_is_nothing_to_compare():
    healthy = [result(np.random.default_rng(seed), 0.5, lesions=0) for seed in range(2)]
    with pytest.raises(ValueError, match=r"a, b: .* no lesion"):
        study({"a": healthy, "b": healthy}, "a", 100)


def test_the_table_of_two_models_says_so():
    table = comparison_table(dict(first="a", second="b", rows=[], resampled="patients"))
    assert "not of methods" in table.title and "study" in table.title
