"""Statistics of methods: several training seeds each, all tested on the same images.

Patients and seeds are two crossed random factors; an interval over patients alone is of one model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.special import stdtr, stdtrit

from deeplesion.errors import UserError
from deeplesion.evaluation.breakdowns import by_thickness
from deeplesion.evaluation.evaluate import AVERAGED, POINTS, in_order_of
from deeplesion.evaluation.froc import TABLE_FPS
from deeplesion.evaluation.intervals import MIN_PATIENTS, check_resamples
from deeplesion.evaluation.results import Result

MEASURES = (*POINTS, "average")
GAP = "thin - thick"


def study(
    methods: Mapping[str, Sequence[Result]], reference: str, resamples: int = 1000, seed: int = 0
) -> dict:
    """Means of methods and their paired differences from a reference, with 95 % intervals.

    Args:
        methods: name -> results, one a training seed, all of the same images.
        reference: the method that the others are compared with.
        resamples, seed: of the bootstrap over patients.

    Returns:
        `methods`: name -> group -> measure -> `estimate`, `seeds` (each value), `sd`; `differences`
        likewise, with `p` and `p_holm`, of the methods but the reference. Groups are all, thin,
        thick and their gap; measures the operating points and 'average', in %. See `estimate`.
        Holm's correction is over the methods, for each group and measure by itself.

    Raises:
        ValueError: unknown reference, a method without results, too few resamples, results that
            are not of the same images with the same lesions, or images without any lesion.
    """
    check_reference(reference, methods)
    cells = _cells(methods, reference, resamples, seed)
    means: dict = {name: {} for name in methods}
    for (group, measure), (patients, of) in cells.items():
        for name, (points, drawn) in of.items():
            row = estimate([(1, points, drawn)], patients)
            row.update(seeds=points.tolist())
            row.update(sd=float(points.std(ddof=1)) if len(points) > 1 else None)
            means[name].setdefault(group, {})[measure] = row
    family = {name: {name: 1, reference: -1} for name in methods if name != reference}
    return dict(reference=reference, methods=means, differences=_contrasts(cells, family))


def check_reference(reference: str, methods: Mapping) -> None:
    """Raises UserError if the reference is none of the methods."""
    if reference not in methods:
        raise UserError(f"the reference {reference} is none of the methods {', '.join(methods)}")


def contrasts(
    methods: Mapping[str, Sequence[Result]],
    family: Mapping[str, Mapping[str, float]],
    resamples: int = 1000,
    seed: int = 0,
    planned: int = 0,
    by_seed: Collection[str] = (),
) -> dict:
    """Weighted sums of methods' means: a difference of two ({one: 1, other: -1}), or of averages
    over an operator's policies ({a: 0.5, b: 0.5, c: -0.5, d: -0.5}). See `study`.

    Runs of different methods count as independent, but for the contrasts in `by_seed`. Of these the
    weighted sum is taken seed by seed, and what varies is this sum. With n seeds it has n - 1
    degrees of freedom, whatever runs of one seed have in common: initial weights and the order of
    the data, which spread into averages over methods, or all, if two methods are two ways to test
    the same trainings.

    Args:
        methods: name -> results, one a training seed, all of the same images.
        family: contrast -> method -> its weight.
        planned: how many contrasts the family is to have, if more than there are yet (`holm`).
        by_seed: contrasts whose methods have the same seeds in the same order.

    Returns:
        Contrast -> group -> measure -> the row of `estimate` with `p_holm`. Holm's correction is
        over the family.

    Raises:
        ValueError: as `study`, no contrast, a contrast without methods, of an unknown method or
            with a weight that is no number, or, in `by_seed`, of different numbers of runs.
    """
    if not family:
        raise UserError("there is no contrast to estimate; name at least one, with its methods")
    for contrast, weights in family.items():
        if unknown := [name for name in weights if name not in methods]:
            raise UserError(
                f"contrast {contrast!r}: {', '.join(unknown)} is none of the methods"
                f" {', '.join(methods)}"
            )
        if not weights or not np.isfinite([*weights.values()]).all():
            raise UserError(
                f"contrast {contrast!r}: its methods need a finite weight each, got {weights}"
            )
        if contrast in by_seed and len({len(methods[name]) for name in weights}) > 1:
            runs = ", ".join(f"{name} {len(methods[name])}" for name in weights)
            raise UserError(f"contrast {contrast!r}: taken by seed, but runs differ: {runs}")
    named = {name for weights in family.values() for name in weights}
    used = {name: results for name, results in methods.items() if name in named}
    return _contrasts(_cells(used, next(iter(used)), resamples, seed), family, planned, by_seed)


def estimate(terms: Sequence[tuple[float, np.ndarray, np.ndarray]], patients: int) -> dict:
    """A weighted sum of means over seeds, with a 95 % interval over patients and seeds.

    The variance of the estimate is v = v_patients + v_seeds - v_both: the bootstrap variance of the
    sum of means, w^2 s^2 / n of each method's seeds, and their interaction, which both hold (Owen,
    The pigeonhole bootstrap, Annals of Applied Statistics 2007), never less than either. Degrees of
    freedom are Satterthwaite's (Biometrics Bulletin 1946). The interval is t-like, because a
    bootstrap over 3 to 5 seeds is too narrow.

    Args:
        terms: of each method its weight w (1 and -1 in a difference), (seeds,) values and
            (seeds, draws) values in the same resamples of patients for all; NaN where a resample
            holds no lesion.
        patients: how many.

    Returns:
        `value`, `low`, `high` and `p` (two-sided, of no difference from 0); the last three are None
        and `note` says why where a method has one seed, there is one patient, or nothing varies.
    """
    value = float(sum(w * points.mean() for w, points, _ in terms))
    row = dict(value=value, low=None, high=None, p=None, note="")
    if any(len(points) < 2 for _, points, _ in terms):
        return {**row, "note": "one seed: no interval for the method"}
    if patients < MIN_PATIENTS:
        return {**row, "note": "lesions of one patient: no interval"}
    of_patients = np.nanvar(sum(w * drawn.mean(axis=0) for w, _, drawn in terms), ddof=1)
    of_seeds = [w**2 * points.var(ddof=1) / len(points) for w, points, _ in terms]
    both = sum(w**2 * _interaction(drawn) for w, _, drawn in terms)
    variance = max(of_patients + sum(of_seeds) - both, of_patients, sum(of_seeds))
    if variance < 1e-18:
        return {**row, "note": "nothing varies: no interval"}
    parts = [(of_patients, patients - 1)]
    parts += [(v, len(points) - 1) for v, (_, points, _) in zip(of_seeds, terms)]
    freedom = variance**2 / sum(v**2 / n for v, n in parts)
    half = stdtrit(freedom, 0.975) * np.sqrt(variance)
    p = 2 * stdtr(freedom, -abs(value) / np.sqrt(variance))
    return {**row, "low": value - float(half), "high": value + float(half), "p": float(p)}


def holm(p: Sequence[float | None], planned: int = 0) -> list[float | None]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 1979).

    Args:
        p: None where there is none; it does not count.
        planned: of a family of which not all are known yet, how many there will be. Those that lack
            count as larger than all that are known, so a corrected p can only fall with them.
    """
    known = sorted((x, i) for i, x in enumerate(p) if x is not None)
    number, corrected, last = max(len(known), planned), list(p), 0.0
    for rank, (x, i) in enumerate(known):
        corrected[i] = last = max(last, min(1.0, (number - rank) * x))
    return corrected


def _contrasts(
    cells: Mapping, family: Mapping, planned: int = 0, by_seed: Collection[str] = ()
) -> dict:
    found: dict = {name: {} for name in family}
    for (group, measure), (patients, of) in cells.items():
        rows = []
        for name, weights in family.items():
            terms = [(w, *of[method]) for method, w in weights.items()]
            if name in by_seed:
                points, drawn = (sum(term[0] * term[i] for term in terms) for i in (1, 2))
                terms = [(1, points, drawn)]
            rows.append(estimate(terms, patients))
        for name, row, p in zip(family, rows, holm([row["p"] for row in rows], planned)):
            found[name].setdefault(group, {})[measure] = {**row, "p_holm": p}
    return found


def _cells(methods: Mapping, first: str, resamples: int, seed: int) -> dict:
    """(group, measure) -> its number of patients, and of each method the (seeds,) values and the
    (seeds, draws) values. What an image is is said by the first run of `first`."""
    check_resamples(resamples)
    if empty := [name for name, results in methods.items() if not results]:
        raise UserError(f"{', '.join(empty)}: no results; give at least one a method")
    run = methods[first][0]
    if not run.curve.num_lesions:
        raise UserError(
            f"{', '.join(methods)}: the images of their test hold no lesion, so there is no"
            " sensitivity to compare. Leave these methods out, or test them on other images"
        )
    values = {
        name: [_values(replace(r, records=in_order_of(run, r)), resamples, seed) for r in results]
        for name, results in methods.items()
    }
    patients = {
        group: len(np.unique(run.patients[c.lesion_images[c.counted[c.lesion_images]]]))
        for group, c in by_thickness(run).items()
        if c.num_lesions
    }
    if {"thin", "thick"} <= set(patients):
        patients[GAP] = min(patients["thin"], patients["thick"])
    return {
        (group, measure): (
            number,
            {
                name: (
                    np.array([v[group][0][k] for v in seeds]),
                    np.array([v[group][1][:, k] for v in seeds]),
                )
                for name, seeds in values.items()
            },
        )
        for group, number in patients.items()
        for k, measure in enumerate(MEASURES)
    }


def _interaction(drawn: np.ndarray) -> float:
    """What the variance of a mean over seeds holds of seeds and patients together, of (seeds,
    draws) values."""
    own = np.nanvar(drawn - drawn.mean(axis=0), axis=1, ddof=1)
    return own.sum() / (len(drawn) - 1) / len(drawn)


def _values(result: Result, resamples: int, seed: int) -> dict:
    """Of each group the (measures,) values and (draws, measures) in resamples, in %."""

    def measures(s: np.ndarray) -> np.ndarray:
        return 100 * np.concatenate([s, s[..., AVERAGED].mean(axis=-1, keepdims=True)], axis=-1)

    found = {
        group: (
            measures(c.sensitivity_at(TABLE_FPS)),
            measures(c.bootstrap(result.patients, TABLE_FPS, resamples, seed)),
        )
        for group, c in by_thickness(result).items()
        if c.num_lesions
    }
    if {"thin", "thick"} <= set(found):
        found[GAP] = tuple(a - b for a, b in zip(found["thin"], found["thick"]))
    return found
