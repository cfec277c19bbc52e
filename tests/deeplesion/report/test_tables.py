"""Tables as the terminal, Markdown, LaTeX and CSV show them."""

import csv
import io
import re

import pytest

from deeplesion.evaluation.evaluate import TAKEN, compare, evaluate, froc_table
from deeplesion.report.page import to_html
from deeplesion.report.study_tables import number_of
from deeplesion.report.tables import (
    Number,
    Row,
    Table,
    all_tables,
    format_table,
    published_tables,
    to_csv,
    to_latex,
    to_markdown,
    to_text,
    write_tables,
)


@pytest.fixture(scope="module")
def tables(results, evaluations):
    return all_tables(evaluations, [compare(*results, resamples=100)], published=True)


@pytest.mark.parametrize(
    "number, text, ends",
    [
        (Number(73.561, 64.25, 81.04), "73.56", ("64.2", "81.0")),
        (Number(None), "-", None),
        (Number(1.005, -0.04, 2.0, sign=True), "+1.00", ("0.0", "+2.0")),
        (Number(-0.001, -1.0, 0.0, sign=True), "0.00", ("-1.0", "0.0")),
        (Number(69.1, digits=1), "69.1", None),
    ],
)
def test_numbers_as_texts(number, text, ends):
    assert (number.text, number.ends) == (text, ends)


def test_plain_table_of_training_lines_up(results):
    lines = format_table(froc_table(results[0].records)).splitlines()
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in (lines[1], *lines[3:])]
    assert all(b == bars[0] and len(b) == 2 for b in bars)
    assert lines[1].split()[:3] == ["slices", "images", "lesions"]
    assert [line.split()[0] for line in lines[3:]] == ["all", "thin", "thick"]
    assert lines[3].endswith(" -") and re.search(r"[+-]\d+\.\d\d$", lines[4])
    assert "interval" not in lines[0]


def test_every_table_lines_up_in_the_terminal(tables):
    for table in tables:
        title, header, rule, *lines = to_text(table).splitlines()
        assert title == table.title and set(rule) == {"-"}
        lines = [line for line in lines if not line.startswith("-- ")]
        bars = [i for i, c in enumerate(header) if c == "|"]
        assert bars
        for line in lines:
            assert [i for i, c in enumerate(line) if c == "|" and i <= bars[-1]] == bars
            # Every figure ends where its column's title does.
        for name in table.measures:
            end = header.index(f" {name}", bars[0]) + 1 + len(name)
            values = [line for line in lines if len(line) >= end]
            assert all(line[end : end + 1] in ("", " ") for line in values)
            assert any(line[end - 1] != " " for line in values)


def test_intervals_and_p_values_stand_beneath_their_numbers(tables):
    by_name = {table.name: table for table in tables}
    (comparison,) = (t for name, t in by_name.items() if " minus " in name)
    lines = to_text(comparison).splitlines()[3:]
    assert len(lines) == 3 * len(comparison.rows)
    assert re.match(r"all +\| +[+-]?\d+\.\d\d ", lines[0])
    assert lines[1].count("..") == lines[2].count("p=") == 7


def test_published_rows_are_marked_and_apart_from_ones_own(tables):
    for table in published_tables():
        assert table.title.startswith("PUBLISHED") and table.name.startswith("published")
        assert all("Table" in row.section and "Trained on" in row.section for row in table.rows)
    for text in (to_text, to_markdown, to_latex):
        assert text(published_tables()[0]).count("AlignShift (Yang et al., MICCAI 2020)") >= 4
    names = [table.name for table in tables]
    assert [n.startswith("published") for n in names].count(True) == 2
    assert "69.1 " in to_text(published_tables()[0])  # one decimal, as it is printed


NASTY = r"A&B_100% \x{1} #~^ <b> [a](b) *c* `d` | e $f$"


def nasty_table():
    rows = [Row((NASTY, 3), (Number(1.5, 1.0, 2.0, 0.04, sign=True),), f"of {NASTY}", NASTY)]
    return Table("t", "title", ("model", "n_images"), ("S_1",), rows)


def test_latex_is_escaped_and_balanced():
    text = to_latex(nasty_table())
    escaped = (
        r"A\&B\_100\% \textbackslash{}x\{1\} \#\textasciitilde{}\textasciicircum{} $<$b$>$ "
        r"[a](b) *c* `d` | e \$f\$"
    )
    assert text.count(escaped) == 3
    row = text.splitlines()[-3]
    assert row.endswith(rf"& 3 & $+1.50$ {{\scriptsize $[+1.0, +2.0]$}}, $p=0.040$ & {escaped} \\")
    assert r"model & n\_images & S\_1 & note \\" in text
    assert rf"\multicolumn{{4}}{{l}}{{\emph{{of {escaped}}}}} \\" in text
    assert r"\begin{tabular}{lrrl}" in text


def test_a_p_that_is_too_small_to_print_is_called_smaller():
    numbers = [Number(1.5, 1.0, 2.0, p) for p in (0.0, 0.00099, 0.001, 1.0)]
    assert [n.p_text for n in numbers] == ["p<0.001", "p<0.001", "p=0.001", "p=1.000"]
    of_study = [number_of(dict(value=1.5, low=1, high=2, p_holm=p)).p_text for p in (0.009, 0.01)]
    assert of_study == ["p<0.01", "p=0.010"]
    table = Table("t", "title", ("model",), ("a",), [Row(("m",), (numbers[1],))])
    assert "p<0.001" in to_text(table) and "$p<0.001$" in to_latex(table)
    assert r", p\<0.001 |" in to_markdown(table)
    assert "<small>p&lt;0.001</small>" in to_html(table)
    assert to_csv([table]).splitlines()[1].split(",")[6] == "0.00099"


@pytest.mark.parametrize("name", ["[ours]", "*best*"])
def test_no_row_of_latex_begins_as_an_option_of_the_line_before(name):
    table = Table("t", "title", ("model",), ("a",), [Row((name,), (Number(1.5),))] * 2)
    lines = to_latex(table).splitlines()
    assert [x for x in lines if name in x] == [rf"{{}}{name} & $1.50$ \\"] * 2


def test_latex_rows_have_as_many_cells_as_the_tabular_has_columns(tables):
    for table in tables:
        lines = to_latex(table).splitlines()
        columns = re.search(r"\{tabular\}\{([lr]+)\}", lines[1])[1]
        rows = [x for x in lines if x.endswith(r"\\") and "multicolumn" not in x]
        assert len(rows) == len(table.rows) + 1
        assert all(len(re.split(r"(?<!\\)&", row)) == len(columns) for row in rows)


def test_markdown_is_escaped_and_has_its_columns(tables):
    text = to_markdown(nasty_table())
    assert r"A&B\_100% \\x{1} #~^ \<b\> \[a\](b) \*c\* \`d\` \| e $f$" in text
    for table in [*tables, nasty_table()]:
        _, _, *lines = to_markdown(table).splitlines()
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(counts) == 1, table.name


def test_csv_holds_every_number_unrounded(tables, evaluations):
    rows = list(csv.DictReader(io.StringIO(to_csv([*tables, nasty_table()]))))
    known = sum(n.value is not None for t in tables for row in t.rows for n in row.numbers)
    assert len(rows) == known + 1
    name = evaluations[1]["name"]
    (thin,) = (
        r
        for r in rows
        if (r["table"], r["model"], r["slices"], r["measure"]) == ("slices", name, "thin", "2")
    )
    expected = evaluations[1]["froc"][1]
    assert float(thin["value"]) == expected["sensitivity"]["2"]
    assert [float(thin["low"]), float(thin["high"])] == expected["interval"]["2"]
    assert rows[-1]["model"] == rows[-1]["note"] == NASTY and rows[-1]["p"] == "0.04"


def test_no_breakdown_may_be_called_as_a_column_or_table_of_the_rest(results):
    evaluations = [evaluate(results[0], resamples=100)]
    made = all_tables(evaluations, [compare(*results, resamples=100)], published=True)
    always = evaluations[0]["breakdowns"]
    header = next(csv.reader(io.StringIO(to_csv(made))))
    assert len(set(header)) == len(header)
    assert set(header) - set(always) <= TAKEN
    assert {"slices", "AP50", "diameters"} <= {table.name for table in made} & TAKEN


def test_files_are_written(tables, tmp_path):
    paths = write_tables(tables, tmp_path / "new")
    assert [p.name for p in paths] == ["evaluation.csv", "table.md", "table.tex"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in paths)
    assert paths[2].read_text().count(r"\begin{tabular}") == len(tables)
