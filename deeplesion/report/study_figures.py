"""Figures of a study: FROC curves of methods with their spread over seeds, differences from the
reference as a forest plot, and thin slices against thick ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deeplesion.evaluation.froc import TABLE_FPS
from deeplesion.evaluation.results import Result
from deeplesion.report.figures import COLOURS, CURVE_FPS, label_froc, plot_froc, rendered

GROUPS = {"all": "All slices", "thin": "Thin (≤ 2 mm)", "thick": "Thick (> 2 mm)"}
BESIDE = 6  # more methods than these have their legend beside the curves
QUIET = "#6b747b"


def render_study(
    results: Mapping[str, Sequence[Result]], statistics: dict, kinds: Sequence[str]
) -> dict[str, bytes]:
    """The figures as files of these kinds, 'png' or 'svg': name -> content.

    Args:
        results: method -> one a seed.
        statistics: of them, by `deeplesion.evaluation.study.study`.
    """
    figures = {"froc": lambda: froc_figure(results, statistics)}
    if statistics["differences"]:
        figures["differences"] = lambda: differences_figure(statistics)
    if any({"thin", "thick"} <= set(groups) for groups in statistics["methods"].values()):
        figures["thickness"] = lambda: thickness_figure(statistics)
    return rendered(figures, kinds)


def froc_figure(results: Mapping[str, Sequence[Result]], statistics: dict) -> Figure:
    """Mean curve of each method over its seeds; the band is from the lowest seed to the highest."""
    figure = Figure(figsize=(4.8, 3.6))
    axes = figure.add_subplot()
    lowest, entries = 100.0, {}
    for i, (name, runs) in enumerate(results.items()):
        curves, points = (
            100 * np.array([run.curve.sensitivity_at(fps) for run in runs])
            for fps in (CURVE_FPS, TABLE_FPS)
        )
        band = np.stack([curves.min(axis=0), curves.max(axis=0)])
        entry, low = plot_froc(axes, i, band, curves.mean(axis=0), points.mean(axis=0))
        entries[f"{name}: {average_of(statistics, name)}"] = entry
        lowest = min(lowest, low)
    place = dict(loc="upper left", bbox_to_anchor=(1.01, 1.02)) if len(entries) > BESIDE else {}
    label_froc(axes, lowest, entries, **place)
    return figure


def average_of(statistics: dict, name: str) -> str:
    """'84.5 [80.2, 88.1]', or without an interval where there is none."""
    row = statistics["methods"][name]["all"]["average"]
    if row["low"] is None:
        return f"{row['value']:.1f}"
    return f"{row['value']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


def differences_figure(statistics: dict) -> Figure:
    """A row a method, the reference first: its mean difference with the 95 % interval, and every
    seed's difference from the reference's mean as a dot."""
    reference, methods = statistics["reference"], statistics["methods"]
    names = [reference, *statistics["differences"]]
    groups = [group for group in GROUPS if group in methods[reference]]
    figure = Figure(
        figsize=(2.6 * len(groups) + 1.2, 0.34 * len(names) + 1.1), layout="constrained"
    )
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups):
        zero = methods[reference][group]["average"]["value"]
        for y, name in enumerate(names):
            if group not in methods[name]:
                continue
            seeds = np.array(methods[name][group]["average"]["seeds"]) - zero
            axes.plot(seeds, np.full(len(seeds), y + 0.22), **dots(COLOURS[0]))
            if name != reference:
                interval(axes, statistics["differences"][name][group]["average"], y, COLOURS[0])
        axes.axvline(0, color="#22272b", linewidth=0.8, zorder=1)
        axes.set_title(GROUPS[group], fontsize=9)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.08)
    panels[0].set_yticks(range(len(names)), [f"{reference} (reference)", *names[1:]])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel(f"Difference from {reference}, average sensitivity (points of %)", fontsize=9)
    return _with_key(figure, [(mark(COLOURS[0]), "mean, 95 % interval of the method"),
                              (seed_mark(COLOURS[0]), "one seed")])  # fmt: skip


def thickness_figure(statistics: dict) -> Figure:
    """A row a method: thin and thick slices, means with intervals and every seed."""
    methods = {n: g for n, g in statistics["methods"].items() if {"thin", "thick"} <= set(g)}
    figure = Figure(figsize=(5.2, 0.42 * len(methods) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    for y, groups in enumerate(methods.values()):
        means = [groups[group]["average"]["value"] for group in ("thin", "thick")]
        axes.plot(means, [y - 0.13, y + 0.13], color="#c3c9cd", linewidth=1, zorder=1)
        for group, place, colour in (("thin", -0.13, COLOURS[0]), ("thick", 0.13, COLOURS[1])):
            row = groups[group]["average"]
            axes.plot(row["seeds"], np.full(len(row["seeds"]), y + 2.1 * place), **dots(colour))
            interval(axes, row, y + place, colour, "o" if group == "thin" else "s")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("Average sensitivity (%)")
    return _with_key(figure, [(mark(COLOURS[0]), GROUPS["thin"]),
                              (mark(COLOURS[1], "s"), GROUPS["thick"]),
                              (seed_mark(QUIET), "one seed")])  # fmt: skip


def dots(colour: str) -> dict:
    return dict(linestyle="none", marker="o", markersize=2.6, color=colour, alpha=0.55, zorder=2)


def interval(axes, row: dict, y: float, colour: str, marker: str = "o") -> None:
    """A mean and, where there is one, its interval."""
    if row["low"] is not None:
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.4, zorder=3)
    axes.plot([row["value"]], [y], marker=marker, markersize=4.8, color=colour, zorder=4)


def mark(colour: str, marker: str = "o") -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markersize=4.8, linewidth=1.4)


def seed_mark(colour: str) -> Line2D:
    return Line2D([], [], **dots(colour))


def _with_key(figure: Figure, entries: Sequence[tuple[Line2D, str]]) -> Figure:
    marks, names = zip(*entries)
    figure.legend(marks, names, loc="outside upper center", ncols=len(entries), frameon=False)
    return figure
