"""Figures of one or several results, ready for a paper: FROC curves; sensitivity by slice thickness
and by lesion size."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deeplesion.evaluation.breakdowns import by_diameter, by_thickness
from deeplesion.evaluation.evaluate import band, table
from deeplesion.evaluation.froc import TABLE_FPS
from deeplesion.evaluation.results import Result
from deeplesion.files import write_whole

# After Okabe and Ito (2008): told apart by those who see red and green alike, and in print; line
# and marker differ too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RANGES = {"thin": "≤ 2 mm", "thick": "> 2 mm"}
CURVE_FPS = np.geomspace(0.25, 32, 141)
FIGURES = ("froc", "groups")
# What would make the same figure other bytes tomorrow, or with another matplotlib, is left out.
FORMATS = {
    "png": (FigureCanvasAgg, {"Software": None}),
    "svg": (FigureCanvasSVG, {"Date": None, "Creator": None}),
}
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
    "font.size": 9,
    "text.parse_math": False,  # a name may hold a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.framealpha": 0.9,
    "svg.fonttype": "path",
    "svg.hashsalt": "deeplesion",  # else the ids in an SVG differ from call to call
}


def write_figures(
    results: Sequence[Result], out_dir: Path, resamples: int = 1000, seed: int = 0
) -> list[Path]:
    """Write `froc` and `groups` as PNG (300 dpi) and SVG; the same results give the same bytes.

    Figures of these names that are there from earlier results are removed.

    `froc`: sensitivity against false positives per image with its 95 % band, the operating points
    of the tables marked, the average at 0.5, 1, 2 and 4 in the legend. `groups`: that average by
    slice thickness and by long diameter, with 95 % intervals and numbers of lesions.

    Args:
        results: one or several, each one colour.
        out_dir: made if it is not there.
        resamples, seed: of the bootstrap over patients.

    Returns:
        the paths: froc.png, froc.svg, groups.png, groups.svg.
    """
    paths = []
    for name, content in render_figures(results, ("png", "svg"), resamples, seed).items():
        paths.append(Path(out_dir) / name)
        write_whole(paths[-1], content)
    for name, kind in itertools.product(FIGURES, FORMATS):
        if (path := Path(out_dir, f"{name}.{kind}")) not in paths:
            path.unlink(missing_ok=True)
    return paths


def render_figures(
    results: Sequence[Result], kinds: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, bytes]:
    """The files of `write_figures` of these kinds, 'png' or 'svg': name -> content.

    Results without lesions have no curve; there are no figures if none has one.
    """
    results = [result for result in results if result.curve.num_lesions]
    if not results:
        return {}
    froc, groups = FIGURES
    return rendered(
        {
            froc: lambda: froc_figure(results, resamples, seed),
            groups: lambda: groups_figure(results, resamples, seed),
        },
        kinds,
    )


def rendered(figures: Mapping[str, Callable[[], Figure]], kinds: Sequence[str]) -> dict[str, bytes]:
    """Figures in the style of all of them, as files of these kinds: 'froc.png' -> content.

    Args:
        figures: name -> what draws it.
    """
    files = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            figure = draw()
            for kind in kinds:
                canvas, metadata = FORMATS[kind]
                content = io.BytesIO()
                canvas(figure).print_figure(
                    content, format=kind, dpi=300, metadata=metadata, bbox_inches="tight"
                )
                files[f"{name}.{kind}"] = content.getvalue()
    return files


def look(i: int) -> dict:
    """Colour, line and marker of the i-th curve."""
    return dict(
        color=COLOURS[i % len(COLOURS)], linestyle=LINES[i % len(LINES)],
        marker=MARKERS[i % len(MARKERS)], linewidth=1.4, markersize=4.5,
    )  # fmt: skip


def plot_froc(
    axes: Axes, i: int, band: np.ndarray, curve: np.ndarray, points: np.ndarray
) -> tuple[Line2D, float]:
    """Draws the i-th FROC curve, in %.

    Args:
        band: (2, n) ends of its band at CURVE_FPS.
        curve, points: sensitivity at CURVE_FPS and at TABLE_FPS.

    Returns its entry for a legend, and the lower end of its band at the first of TABLE_FPS.
    """
    style, (low, high) = look(i), band
    axes.fill_between(CURVE_FPS, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(CURVE_FPS, curve, **style | {"marker": "none"})
    axes.plot(TABLE_FPS, points, **style | {"linestyle": "none"})
    return axes.plot([], [], **style)[0], low[np.searchsorted(CURVE_FPS, TABLE_FPS[0])]


def label_froc(axes: Axes, lowest: float, entries: Mapping[str, Line2D], **legend) -> None:
    """Axes and legend of FROC curves; `lowest` is what must be seen."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(TABLE_FPS, [f"{fps:g}" for fps in TABLE_FPS])
    axes.minorticks_off()
    axes.set_xlim(0.4, 20)
    axes.set_ylim(max(10 * np.floor(lowest / 10 - 1), 0), 101)
    axes.set_xlabel("False positives per image")
    axes.set_ylabel("Sensitivity (%)")
    title = "Average at 0.5, 1, 2, 4 (%) [95 % interval]"
    axes.legend(entries.values(), entries.keys(), title=title, **{"loc": "best", **legend})


def froc_figure(results: Sequence[Result], resamples: int, seed: int) -> Figure:
    """The FROC curves of several results with their 95 % bands."""
    figure = Figure(figsize=(4.8, 3.6))
    axes = figure.add_subplot()
    lowest, entries = 100.0, {}
    for i, result in enumerate(results):
        bounds = 100 * band(result.curve, result.patients, CURVE_FPS, resamples, seed)
        (row,) = table(result, {"all": result.curve}, resamples, seed)
        curve, points = (100 * result.curve.sensitivity_at(fps) for fps in (CURVE_FPS, TABLE_FPS))
        entry, low = plot_froc(axes, i, bounds, curve, points)
        entries[f"{result.name}: {with_interval(row)}"] = entry
        lowest = min(lowest, np.nanmin([low, row["sensitivity"]["0.5"]]))
    label_froc(axes, lowest, entries)
    return figure


def groups_figure(results: Sequence[Result], resamples: int, seed: int) -> Figure:
    """Average sensitivity with its interval by slice thickness, left, and lesion size, right."""
    figure = Figure(figsize=(6.6, 3.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    entries = {}
    for axes, title, split in (
        (panels[0], "Slice thickness", by_thickness),
        (panels[1], "Long diameter", by_diameter),
    ):
        tables = [
            {r["group"]: r for r in table(result, split(result), resamples, seed)}
            for result in results
        ]
        groups = list(dict.fromkeys(group for rows in tables for group in rows))
        for i, (result, rows) in enumerate(zip(results, tables)):
            places = [
                groups.index(group) + 0.6 * ((i + 0.5) / len(results) - 0.5) for group in rows
            ]
            average = np.array([row["average"] for row in rows.values()])
            nothing = {"average": (np.nan, np.nan)}  # of one patient
            ends = [row.get("interval", nothing)["average"] for row in rows.values()]
            low, high = np.array(ends).T
            entries[result.name] = axes.errorbar(
                places,
                average,
                # The interval of a few lesions may lie beside their average.
                np.maximum([average - low, high - average], 0),
                fmt=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                markersize=4.5,
                capsize=2.5,
                linewidth=1.2,
            )
        labels = []
        for group in groups:
            numbers = dict.fromkeys(rows[group]["lesions"] for rows in tables if group in rows)
            labels.append(f"{RANGES.get(group, group)}\nn = {' / '.join(map(str, numbers))}")
        axes.set_xticks(range(len(groups)), labels)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.grid(visible=False, axis="x")
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("Average sensitivity (%)")
    if len(results) > 1:
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4)
    return figure


def with_interval(row: dict) -> str:
    """'84.5 [80.2, 88.1]', the average of a row of `evaluate.table` and its interval, if any."""
    if "interval" not in row:
        return f"{row['average']:.1f}"
    low, high = row["interval"]["average"]
    return f"{row['average']:.1f} [{low:.1f}, {high:.1f}]"
