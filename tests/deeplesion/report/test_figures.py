"""Figures: the same bytes again, and the numbers that are in them."""

import xml.etree.ElementTree as ElementTree

import cv2
import matplotlib
import numpy as np
import pytest

from deeplesion.evaluation.breakdowns import by_diameter, by_thickness
from deeplesion.evaluation.evaluate import band, table
from deeplesion.evaluation.froc import TABLE_FPS
from deeplesion.evaluation.results import Result
from deeplesion.report.figures import (
    CURVE_FPS,
    froc_figure,
    groups_figure,
    render_figures,
    with_interval,
    write_figures,
)


def test_written_as_png_and_svg_and_the_same_again(results, tmp_path):
    before = dict(matplotlib.rcParams)
    paths = write_figures(results, tmp_path / "new", resamples=100)
    assert [p.name for p in paths] == ["froc.png", "froc.svg", "groups.png", "groups.svg"]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)
    again = render_figures(results, ("png", "svg"), resamples=100)
    for path in paths:
        assert path.read_bytes() == again[path.name]
        if path.suffix == ".png":
            assert min(cv2.imread(str(path)).shape[:2]) > 700
        else:
            assert ElementTree.fromstring(path.read_bytes()).tag.endswith("svg")
            assert b"<dc:date>" not in path.read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_curves_bands_and_marked_points_are_those_of_the_runs(results):
    (axes,) = froc_figure(results, 100, 3).axes
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(axes.get_xticks(), TABLE_FPS)
    lines = [line for line in axes.lines if len(line.get_xdata())]
    for i, result in enumerate(results):
        curve, points = lines[2 * i : 2 * i + 2]
        np.testing.assert_allclose(curve.get_ydata(), 100 * result.curve.sensitivity_at(CURVE_FPS))
        np.testing.assert_allclose(points.get_xdata(), TABLE_FPS)
        np.testing.assert_allclose(points.get_ydata(), 100 * result.curve.sensitivity_at(TABLE_FPS))
        assert points.get_linestyle() == "None" and curve.get_marker() == "none"
        low, high = 100 * band(result.curve, result.patients, CURVE_FPS, 100, 3)
        ((outline,),) = (c.get_paths() for c in axes.collections[i : i + 1])
        assert outline.vertices[:, 1].min() == pytest.approx(low.min())
        assert outline.vertices[:, 1].max() == pytest.approx(high.max())
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    rows = [table(result, {"all": result.curve}, 100, 3)[0] for result in results]
    assert texts == [f"{result.name}: {with_interval(row)}" for result, row in zip(results, rows)]
    colours = {line.get_color() for line in lines}
    assert len(colours) == 2


def test_legend_shows_the_average_and_its_interval():
    row = dict(average=84.48, interval=dict(average=[80.04, 88.06]))
    assert with_interval(row) == "84.5 [80.0, 88.1]"


def test_groups_show_averages_intervals_and_numbers(results):
    left, right = groups_figure(results, 100, 0).axes
    for axes, split in ((left, by_thickness), (right, by_diameter)):
        for container, result in zip(axes.containers, results, strict=True):
            rows = table(result, split(result), 100, 0)
            points, _, (bars,) = container.lines
            np.testing.assert_allclose(points.get_ydata(), [row["average"] for row in rows])
            for row, bar in zip(rows, bars.get_segments(), strict=True):
                low, high = row["interval"]["average"]
                ends = [min(low, row["average"]), max(high, row["average"])]
                np.testing.assert_allclose(bar[:, 1], ends)
        labels = [text.get_text() for text in axes.get_xticklabels()]
        assert labels[0].split("\n")[1] == f"n = {rows[0]['lesions']}"
    assert left.get_xticklabels()[0].get_text().startswith("all")


def test_one_run_no_detections_and_any_name(results):
    nothing = [r | dict(boxes=[], scores=[], masks=[]) for r in results[0].records]
    for names in (["_hidden"], ["$\\frac{$", "_b"]):
        few = [Result(name, nothing) for name in names]
        assert set(render_figures(few, ("svg",), 100)) == {"froc.svg", "groups.svg"}
        legend = froc_figure(few, 100, 0).axes[0].get_legend()
        assert [t.get_text().split(":")[0] for t in legend.get_texts()] == names


def test_more_runs_than_colours_can_still_be_told_apart(results):
    many = [Result(f"result {i}", results[0].records) for i in range(9)]
    lines = froc_figure(many, 100, 0).axes[0].lines[2::3]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == 9


def test_groups_of_one_run_only_leave_a_gap(results):
    thin = Result("thin", [r | dict(thickness_mm=1.0) for r in results[0].records])
    axes = groups_figure([thin, results[1]], 100, 0).axes[0]
    assert [t.get_text().split("\n")[0] for t in axes.get_xticklabels()] == [
        "all", "≤ 2 mm", "> 2 mm",
    ]  # fmt: skip
    assert [len(c.lines[0].get_xdata()) for c in axes.containers] == [2, 3]
