"""The report's page without a browser: whole, escaped, and nothing in it from outside."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from deeplesion.data.slices import SliceFolder
from deeplesion.evaluation.evaluate import compare
from deeplesion.report.gallery import collect
from deeplesion.report.page import to_html, write_report
from deeplesion.report.tables import Number, Row, Table, all_tables, published_tables
from deeplesion.report.template import fill

VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """Tables as lists of rows of texts, every attribute, and whether the tags fit together."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.attributes, self.open, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "small":
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture(scope="module")
def written(results, evaluations, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new"
    comparisons = [compare(*results, resamples=100)]
    path = write_report(
        results, evaluations, out, published=True, comparisons=comparisons, examples=3
    )
    assert [p.name for p in out.iterdir()] == [path.name] == ["report.html"]
    return path.read_text(encoding="utf-8"), comparisons


def test_page_is_whole_and_asks_for_nothing_from_outside(written):
    page = Page(written[0])
    assert "{{" not in re.sub(r"<script>.*?</script>", "", written[0], flags=re.DOTALL)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "data", "srcset", "poster"):
            assert value.startswith(("data:", "#")), (tag, name, value)
    styles = "".join(page.texts["style"])
    assert "url(" not in styles and "@import" not in styles
    script = page.texts["script"][-1]
    for word in ("fetch(", "XMLHttpRequest", "import(", "innerHTML", "document.write", "eval("):
        assert word not in script


def test_every_table_with_every_number(written, evaluations):
    text, comparisons = written
    tables = all_tables(evaluations, comparisons, published=False)
    tables[1:1] = published_tables()
    found = Page(text).tables
    assert len(found) == len(tables)
    for rows, table in zip(found, tables, strict=True):
        header, *body = [row for row in rows if len(row) > 1]
        assert header[: len(table.labels)] == list(table.labels)
        for cells, row in zip(body, table.rows, strict=True):
            assert cells[0] == str(row.labels[0])
            numbers = cells[len(row.labels) : len(row.labels) + len(row.numbers)]
            for cell, number in zip(numbers, row.numbers, strict=True):
                parts = [number.text]
                parts += [f"[{number.ends[0]}, {number.ends[1]}]"] if number.ends else []
                parts += [number.p_text] if number.p_text else []
                assert cell == " ".join(parts)
    assert text.index("not measured here") < text.index("PUBLISHED")
    assert text.index("<details>") < text.index("PUBLISHED") < text.index("</details>")


def test_published_tables_only_on_request(results, evaluations, tmp_path):
    path = write_report(results, evaluations, tmp_path)
    assert "PUBLISHED" not in path.read_text()


def test_what_was_tested_is_told(written, results, evaluations, tmp_path):
    assert "SHA-256" not in written[0]
    model = dict(config="demo/a3d", checkpoint="<b>8.pth", checkpoint_sha256="0123456789abcdef" * 4)
    told = [replace(results[0], model=model), *results[1:]]
    text = write_report(told, evaluations, tmp_path).read_text()
    assert "weights &lt;b&gt;8.pth (SHA-256 0123456789ab), config demo/a3d.</p>" in text
    assert text.count("SHA-256") == 1


def test_no_button_is_disabled_since_it_would_lose_the_focus(written):
    assert not re.search(r"\bdisabled\b", written[0].replace("aria-disabled", ""))


def test_names_cannot_become_markup(written, results):
    text, _ = written
    page = Page(text)
    assert page.texts["h1"] == [" · ".join(result.name for result in results)]
    assert "<b>7" not in text and text.count("</script>") == 2
    assert results[1].name in {row[0] for row in page.tables[0]}


def test_gallery_holds_so_many_examples_and_says_so(written, results):
    text, _ = written
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["models"] == [result.name for result in results]
    assert data["gallery"] == json.loads(json.dumps([collect(result, 3) for result in results]))
    assert all(len(part["findings"]) <= 9 for part in data["gallery"])
    assert max(max(part["counts"].values()) for part in data["gallery"]) > 3
    assert "at most 3 findings" in text and "outlines only" in text
    for part in data["gallery"]:
        assert f"{part['threshold']:.3f} and above" in text


def test_nothing_is_said_of_what_is_not_left_out(results, evaluations, phantom, tmp_path):
    folder = SliceFolder(phantom / "Images_png")
    text = write_report(results[:1], evaluations[:1], tmp_path, folder, examples=999).read_text()
    assert "at most" not in text and "outlines only" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert all(finding["pictures"] for finding in data["gallery"][0]["findings"])


def test_the_same_again_byte_for_byte(written, results, evaluations, tmp_path):
    path = write_report(
        results, evaluations, tmp_path, published=True, comparisons=written[1], examples=3
    )
    assert path.read_text() == written[0]


def test_settings_and_numbers_are_told(written, results):
    text = " ".join(Page(written[0]).texts["p"])
    assert f"{len(results[0].records)} key slices" in text
    assert "100 resamples, seed 0" in text and "x2 - x1 + 1" in text


def test_evaluations_must_be_of_the_runs(results, evaluations, tmp_path):
    with pytest.raises(ValueError, match="in their order"):
        write_report(results, evaluations[::-1], tmp_path)
    with pytest.raises(ValueError, match="in their order"):
        write_report([], [], tmp_path)
    with pytest.raises(ValueError, match="examples"):
        write_report(results, evaluations, tmp_path, examples=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_table_as_html():
    rows = [
        Row(("a & b", 1200), (Number(1.5, 1.0, 2.0, 0.03), Number(None)), "one", "x < y"),
        Row(("a & b", 7), (Number(-2.0, sign=True), Number(0.0)), "one"),
        Row(("c", 8), (Number(3.0, sign=True), Number(0.0)), "two"),
    ]
    html = to_html(Table("t", "T < 2", ("name", "n"), ("m", "k"), rows=rows), "published")
    assert Page(html).tables == [
        [
            ["name", "n", "m", "k", "note"],
            ["one"],
            ["a & b", "1,200", "1.50 [1.0, 2.0] p=0.030", "-", "x < y"],
            ["a & b", "7", "-2.00", "0.00", ""],
            ["two"],
            ["c", "8", "+3.00", "0.00", ""],
        ]
    ]
    assert "<caption><span>T &lt; 2</span></caption>" in html and 'class="published"' in html
    assert html.count("again") == 1


def test_what_is_filled_in_is_not_looked_at_again():
    assert fill("<{{a}}|{{b}}>", a="{{b}}", b="\\1") == "<{{b}}|\\1>"
    with pytest.raises(KeyError):
        fill("{{c}}", a="")
