"""A study's tables, figures and page: every number is that of the statistics, every link leads to a
file, and what is left out is said."""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from deeplesion.errors import MissingDataError
from deeplesion.evaluation.results import Result, write_results
from deeplesion.evaluation.study import study
from deeplesion.report.study_figures import (
    differences_figure,
    froc_figure,
    render_study,
    thickness_figure,
)
from deeplesion.report.study_page import write_study
from deeplesion.report.study_tables import differences_table, main_table, study_tables
from deeplesion.report.tables import to_text

FIGURES = ("froc", "differences", "thickness")


def records(rng, chance, number=24, thick=True, first=0):
    found = []
    for i in range(number):
        boxes = [[10, 10, 30, 30] if rng.random() < chance else [50, 50, 70, 70], [0, 0, 5, 5]]
        found.append(
            dict(
                file_name=f"{first + i}", patient=str(i // 3), height=96, width=96, spacing_mm=0.8,
                thickness_mm=5.0 if thick and i % 2 else 1.0, boxes=boxes,
                lesions=[dict(bbox=[10, 10, 30, 30], recist=None, mask=None, diameters_mm=[9, 8],
                              lesion_type=1, lesion_idx=i)],
                scores=[0.9 - 0.5 * rng.random(), 0.3],
            )
        )  # fmt: skip
    return found


def written(out, name, chance, seeds, data="one", table_key_slices=None, **options):
    """A method with results in `out`, as `write_study` takes it."""
    runs = []
    for seed in seeds:
        rng = np.random.default_rng([seed, round(100 * chance)])
        folder = f"runs/{re.sub('[^A-Za-z0-9]', '', name)}-seed{seed}/test"
        path = out / folder / "results.json.gz"
        write_results(path, records(rng, chance, **options), table_key_slices)
        (out / folder / "evaluation").mkdir()
        for file in ("test/evaluation/report.html", "train.txt", "test.txt", "run.json"):
            (out / folder).parent.joinpath(file).touch()
        training = dict(seconds=60.0 * (seed + 1), memory_mb=512 * (seed + 1), device="CPU")
        runs.append(dict(seed=seed, folder=folder, training=training, test=dict(seconds=5.0)))
    cost = dict(parameters=1_250_000, paper_flops=7_000_000_000, multiply_adds=0)
    return dict(config="x.py", options=["a=<b>"], cost=cost, test=dict(data=data), runs=runs)


def results_of(out, methods):
    from deeplesion.evaluation.results import read_results

    return {
        name: [read_results(out / r["folder"] / "results.json.gz", name) for r in method["runs"]]
        for name, method in methods.items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    methods = {
        "none": written(out, "none", 0.4, (0, 1, 2)),
        "A3D <b> & $x$": written(out, "A3D", 0.8, (0, 1, 4)),
        "one seed": written(out, "one seed", 0.6, (0,)),
        "nothing yet": dict(config="y.py", options=[], cost={}, test=dict(data="one"), runs=[]),
    }
    printed = write_study(out, methods, "none", 100)
    present = {name: method for name, method in methods.items() if method["runs"]}
    results = results_of(out, present)
    return out, present, results, study(results, "none", 100), printed


def test_all_files_are_there_and_what_is_left_out_is_said(made):
    out, _, _, statistics, printed = made
    names = {f"study.{kind}" for kind in ("json", "txt", "csv", "md", "tex", "html")}
    names |= {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert {file.name for file in out.iterdir() if file.is_file()} == names
    assert "Without a finished run, hence left out: nothing yet." in printed
    content = json.loads((out / "study.json").read_text())
    assert content["test_sets"][0]["differences"] == statistics["differences"]
    assert content["without_runs"] == ["nothing yet"]
    assert "nothing yet" in (out / "study.html").read_text()


def test_the_main_table_holds_statistics_and_costs(made):
    _, methods, _, statistics, printed = made
    table = main_table(statistics, methods, "patients")
    assert to_text(table) in printed
    # Of a method of one seed there is no p, hence nothing to correct for.
    assert table.title.endswith("; difference from none, p corrected for 1 comparison (Holm)")
    with_p = methods_with_p(statistics)
    assert with_p == ["A3D <b> & $x$"]
    row = statistics["differences"][with_p[0]]["all"]["average"]
    assert row["p_holm"] == row["p"]
    rows = {row.labels[0]: row for row in table.rows}
    name = "A3D <b> & $x$"
    numbers = dict(zip(table.measures, rows[name].numbers))
    mean = statistics["methods"][name]["all"]["average"]
    assert rows[name].labels == (name, 3)
    assert numbers["Avg.[0.5,1,2,4]"][:3] == (mean["value"], mean["low"], mean["high"])
    assert numbers["sd"].value == pytest.approx(np.std(mean["seeds"], ddof=1))
    difference = statistics["differences"][name]["all"]["average"]
    assert numbers["difference"][:4] == tuple(
        difference[key] for key in ("value", "low", "high", "p_holm")
    )
    for group in ("thin", "thick", "thin - thick"):
        assert numbers[group].value == statistics["methods"][name][group]["average"]["value"]
    costs = [numbers[key].value for key in ("GFLOPs", "M params", "GB", "train min", "test s")]
    assert costs == pytest.approx([7.0, 1.25, 2.5, (1 + 2 + 5) / 3, 5.0])
    assert rows["none"].note == "the reference"
    assert rows["none"].numbers[table.measures.index("difference")].text == "-"
    assert "one seed" in rows["one seed"].note


def methods_with_p(statistics):
    rows = {n: g["all"]["average"] for n, g in statistics["differences"].items()}
    return [name for name, row in rows.items() if row["p"] is not None]


def test_without_a_p_no_correction_is_claimed(made):
    _, methods, results, _, _ = made
    alone = {name: each[:1] for name, each in results.items()}
    one_each = {name: {**methods[name], "runs": methods[name]["runs"][:1]} for name in results}
    statistics = study(alone, "none", 100)
    title = main_table(statistics, one_each, "patients").title
    assert title.endswith("; difference from none") and "interval" not in title


def test_the_table_of_differences_says_what_is_corrected_for_together(made):
    _, _, _, statistics, _ = made
    title = differences_table(statistics, "patients").title
    assert title.endswith(
        "p, corrected for the number of methods that have one, each column and kind of slices"
        " by itself (Holm)"
    )


def test_every_number_is_in_the_csv(made):
    out, methods, _, statistics, _ = made
    lines = list(csv.DictReader((out / "study.csv").open()))
    for table in study_tables(statistics, methods, "patients"):
        mine = [float(line["value"]) for line in lines if line["table"] == table.name]
        expected = [n.value for row in table.rows for n in row.numbers if n.value is not None]
        assert mine == expected
    seeds = [line for line in lines if line["table"] == "seeds" and line["measure"] == "all"]
    assert [(line["method"], line["seed"]) for line in seeds[3:6]] == [
        ("A3D <b> & $x$", seed) for seed in "014"
    ]


def test_curves_are_means_with_the_range_of_the_seeds(made):
    _, _, results, statistics, _ = made
    (axes,) = froc_figure(results, statistics).axes
    lines = [line for line in axes.lines if len(line.get_xdata())]
    for i, runs in enumerate(results.values()):
        fps = lines[2 * i].get_xdata()
        curves = 100 * np.array([run.curve.sensitivity_at(fps) for run in runs])
        np.testing.assert_allclose(lines[2 * i].get_ydata(), curves.mean(axis=0))
        ((outline,),) = (c.get_paths() for c in axes.collections[i : i + 1])
        assert outline.vertices[:, 1].min() == pytest.approx(curves.min())
        assert outline.vertices[:, 1].max() == pytest.approx(curves.max())
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [text.rpartition(":")[0] for text in texts] == list(results)
    assert texts[2].endswith(f"{statistics['methods']['one seed']['all']['average']['value']:.1f}")


def test_the_forest_plot_has_every_seed_and_interval(made):
    _, _, _, statistics, _ = made
    figure = differences_figure(statistics)
    for axes, group in zip(figure.axes, ("all", "thin", "thick"), strict=True):
        zero = statistics["methods"]["none"][group]["average"]["value"]
        dots = [line for line in axes.lines if line.get_markersize() == 2.6]
        names = ["none", *statistics["differences"]]
        for line, name in zip(dots, names, strict=True):
            seeds = statistics["methods"][name][group]["average"]["seeds"]
            np.testing.assert_allclose(line.get_xdata(), np.array(seeds) - zero)
        row = statistics["differences"]["A3D <b> & $x$"][group]["average"]
        spans = [line.get_xdata() for line in axes.lines if line.get_linewidth() == 1.4]
        assert [row["low"], row["high"]] in [list(span) for span in spans]
        means = [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 4.8]
        assert row["value"] in means and len(means) == 2  # the reference has none
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["none (reference)", "A3D <b> & $x$", "one seed"]


def test_thin_and_thick_means_stand_beside_each_other(made):
    _, _, _, statistics, _ = made
    (axes,) = thickness_figure(statistics).axes
    means = [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 4.8]
    expected = [
        groups[group]["average"]["value"]
        for groups in statistics["methods"].values()
        for group in ("thin", "thick")
    ]
    assert means == expected


def test_figures_are_the_same_again_and_without_thick_slices_there_is_one_less(made):
    out, _, results, statistics, _ = made
    again = render_study(results, statistics, ("svg",))
    assert set(again) == {f"{name}.svg" for name in FIGURES}
    for name, content in again.items():
        assert (out / name).read_bytes() == content
        assert ElementTree.fromstring(content).tag.endswith("svg")
    rng = np.random.default_rng(0)
    thin = {"a": [Result("a", records(rng, 0.5, thick=False)) for _ in range(2)]}
    assert set(render_study(thin, study(thin, "a", 100), ("svg",))) == {"froc.svg"}


def test_the_page_links_what_is_there_and_names_become_no_markup(made):
    out, methods, _, _, _ = made
    page = (out / "study.html").read_text()
    links = re.findall(r'href="([^"#]+)"', page)
    links.remove("data:,")
    assert len(links) == 4 * sum(len(method["runs"]) for method in methods.values())
    assert all((out / link).is_file() for link in links)
    assert sum(link.endswith("evaluation/report.html") for link in links) == 7
    assert "<b>" not in page and "&lt;b&gt; &amp; $x$" in page and "{{" not in page
    assert all(src.startswith("data:") for src in re.findall(r'src="([^"]+)"', page))


def test_of_one_annotation_file_too_other_images_have_tables_of_their_own(tmp_path, monkeypatch):
    """As with test_dataloader.dataset.indices; and equal images of two files are compared."""
    monkeypatch.setattr("deeplesion.report.study_page.render_study", lambda *_: {"froc.svg": b""})
    methods = {
        "a": written(tmp_path, "a", 0.4, (0, 1)),
        "b": written(tmp_path, "b", 0.8, (0, 1), number=12),
        "c": written(tmp_path, "c", 0.6, (0, 1), data="two"),
    }
    write_study(tmp_path, methods, "a", 100)
    first, second = json.loads((tmp_path / "study.json").read_text())["test_sets"]
    assert list(first["methods"]) == ["a", "c"] and list(second["methods"]) == ["b"]


def test_a_result_that_cannot_be_read_is_named_and_the_others_count(tmp_path, monkeypatch):
    monkeypatch.setattr("deeplesion.report.study_page.render_study", lambda *_: {"froc.svg": b""})
    methods = {name: written(tmp_path, name, 0.5, (0, 1, 2)) for name in "ab"}
    damaged = tmp_path / methods["b"]["runs"][1]["folder"] / "results.json.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    printed = write_study(tmp_path, methods, "a", 100, ["A note."])
    content = json.loads((tmp_path / "study.json").read_text())
    assert [run["seed"] for run in content["methods"]["b"]["runs"]] == [0, 2]
    assert len(content["test_sets"][0]["methods"]["b"]["all"]["average"]["seeds"]) == 2
    for text in (printed, (tmp_path / "study.txt").read_text()):
        assert "A note." in text and f"Left out: b, seed 1: {damaged}" in text
        assert f"Remove {damaged.parent}: the study then tests this run again" in text
    assert "A note." in (tmp_path / "study.html").read_text()
    damaged.unlink()
    assert "Left out: b, seed 1: " in write_study(tmp_path, methods, "a", 100)


def test_a_part_of_the_key_slices_is_said_to_be_one_wherever_there_are_tables(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("deeplesion.report.study_page.render_study", lambda *_: {"froc.svg": b""})
    methods = {name: written(tmp_path, name, 0.5, (0, 1), table_key_slices=4817) for name in "ab"}
    printed = write_study(tmp_path, methods, "a", 100)
    texts = [(tmp_path / f"study.{kind}").read_text() for kind in ("txt", "md", "tex", "html")]
    assert all("PARTIAL DATA: 24 of 4,817 key slices" in text for text in [printed, *texts])


def test_methods_of_other_images_have_tables_of_their_own(tmp_path, monkeypatch):
    drawn = {f"froc.{kind}": b"<svg/>" for kind in ("svg", "png")}
    monkeypatch.setattr("deeplesion.report.study_page.render_study", lambda *_: drawn)
    methods = {
        "a": written(tmp_path, "a", 0.4, (0, 1)),
        "b": written(tmp_path, "b", 0.8, (0, 1), data="two", first=100, number=30),
        "c": written(tmp_path, "c", 0.6, (0, 1), data="two", first=100, number=30),
    }
    printed = write_study(tmp_path, methods, "a", 100)
    assert "24 key slices, 24 lesions, 8 patients: Average" in printed
    assert "30 key slices, 30 lesions, 10 patients: Average" in printed
    first, second = json.loads((tmp_path / "study.json").read_text())["test_sets"]
    assert (first["reference"], list(first["methods"])) == ("a", ["a"])
    assert (second["reference"], list(second["differences"])) == ("b", ["c"])
    assert {file.name for file in tmp_path.glob("*.png")} == {"froc.png", "froc-2.png"}
    for name in ("thickness.png", "my-froc.png"):
        (tmp_path / name).touch()
    write_study(tmp_path, {"a": methods["a"]}, "a", 100)
    assert {file.name for file in tmp_path.glob("*.png")} == {"froc.png", "my-froc.png"}


def test_a_reference_of_another_name_is_refused(made, tmp_path):
    _, methods, _, _, _ = made
    nothing = dict(config="y.py", options=[], cost={}, test=dict(data="one"), runs=[])
    with pytest.raises(ValueError, match=r"reference nnoe .* none, A3D <b> & \$x\$, one seed"):
        write_study(tmp_path, {**methods, "nothing yet": nothing}, "nnoe", 100)
    assert not list(tmp_path.iterdir())


def test_without_any_run_there_is_nothing_to_report(tmp_path):
    nothing = dict(config="y.py", options=[], cost={}, test=dict(data="one"), runs=[])
    with pytest.raises(MissingDataError, match="no run is finished yet"):
        write_study(tmp_path, {"a": nothing}, "a", 100)
