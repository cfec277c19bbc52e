"""The report in headless Chromium: it renders, filters work, nothing goes wrong unseen.

The browser is that of tests/conftest.py.
"""

import json
import re
import time

import pytest

from deeplesion.data.slices import SliceFolder
from deeplesion.report.page import write_report


@pytest.fixture(scope="module")
def page(results, evaluations, phantom, tmp_path_factory):
    """The report, with pictures, and the findings that are in it."""
    out = tmp_path_factory.mktemp("report")
    path = write_report(
        results, evaluations, out, SliceFolder(phantom / "Images_png"), published=True
    )
    data = re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1]
    gallery = json.loads(data)["gallery"]
    findings = [
        finding | dict(model=result.name) for result, part in zip(results, gallery, strict=True)
        for finding in part["findings"]
    ]  # fmt: skip
    return path, findings


@pytest.fixture
def opened(browser, page):
    browser.resize(1400, 1000)
    browser.log("browser"), browser.log("performance")
    browser.open(page[0])
    yield browser
    problems = [entry for entry in browser.log("browser") if entry["level"] != "INFO"]
    assert not problems
    sent = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in sent
        if message["method"] == "Network.requestWillBeSent"
    ]  # fmt: skip
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)


def cards(browser):
    return browser.run("return [...document.querySelectorAll('.card')].map(c => c.innerText)")


def expected(findings, kind, **wanted):
    """The findings a filter leaves, in their order; types are several."""
    chosen = [
        f for f in findings
        if f["kind"] == kind
        and all(value in f[key] if key == "types" else f[key] == value
                for key, value in wanted.items())
    ]  # fmt: skip
    rank = (lambda f: -f["annotated"][0]) if kind == "missed" else (lambda f: -f["score"])
    return sorted(chosen, key=rank)


def total(browser):
    status = browser.text("#status")
    return int(re.search(r"of (\d+),", status)[1]) if "of" in status else 0


def test_page_renders(opened, page, results):
    assert opened.call("title") == f"Evaluation: {' · '.join(result.name for result in results)}"
    assert opened.text("h1") == " · ".join(result.name for result in results)
    sizes = opened.run(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(sizes) == 2 and all(done and own > 100 and shown > 100 for done, own, shown in sizes)
    shown = expected(page[1], "false positive")[:24]
    texts = cards(opened)
    assert len(texts) == len(shown)
    for text, finding in zip(texts, shown, strict=True):
        assert finding["name"] in text and f"{finding['score']:.3f}" in text
        assert finding["model"] in text
    pictures = opened.run(
        "return Promise.all([...document.querySelectorAll('.card image')].map(image => {"
        "  const copy = new Image(); copy.src = image.getAttribute('href');"
        "  return copy.decode().then(() => copy.naturalWidth);}))"
    )
    assert len(pictures) == len(shown) and min(pictures) >= 64


def test_every_filter_leaves_what_it_says(opened, page):
    _, findings = page
    for kind in ("false positive", "missed", "hit"):
        opened.choose("kind", kind)
        assert total(opened) == len(expected(findings, kind))
        for key in ("model", "thickness", "types", "size"):
            options = opened.run(
                "return [...document.getElementById('filters').elements[arguments[0]].options]"
                ".map(o => o.value)",
                key,
            )
            assert options[0] == "" and len(options) == len(set(options)) > 1
            for value in options[1:]:
                opened.choose(key, value)
                chosen = expected(findings, kind, **{key: value})
                assert total(opened) == len(chosen)
                names = [finding["name"] for finding in chosen[:24]]
                assert [n in text for n, text in zip(names, cards(opened), strict=True)] == [
                    True
                ] * len(names)
            opened.choose(key, "")


def test_filters_together_nothing_left_and_reset(opened, page):
    _, findings = page
    opened.choose("kind", "missed")
    wanted = dict(model=findings[0]["model"], thickness="thick", size="< 10 mm", types="lung")
    for key, value in wanted.items():
        opened.choose(key, value)
    assert total(opened) == len(expected(findings, "missed", **wanted))
    opened.choose("types", "no such type")
    assert total(opened) == 0 and "Nothing matches" in opened.text("#status")
    opened.press("#filters button[type=reset]")
    for _ in range(50):
        time.sleep(0.02)
        if total(opened) == len(expected(findings, "false positive")):
            break
    assert total(opened) == len(expected(findings, "false positive"))


def test_pages_turn(opened, page):
    shown = expected(page[1], "false positive")
    assert len(shown) > 24
    assert opened.run("return document.getElementById('previous').ariaDisabled === 'true'")
    opened.press("#next")
    assert len(cards(opened)) == min(len(shown) - 24, 24)
    assert shown[24]["name"] in cards(opened)[0]
    for _ in range((len(shown) - 1) // 24 - 1):
        assert not opened.run("return document.getElementById('next').ariaDisabled === 'true'")
        opened.press("#next")
    assert opened.run("return document.getElementById('next').ariaDisabled === 'true'")
    assert shown[-1]["name"] in cards(opened)[-1]
    opened.run("document.getElementById('next').focus()")
    opened.press("#next")  # does nothing, and the keyboard stays where it was
    assert shown[-1]["name"] in cards(opened)[-1]
    assert opened.run("return document.activeElement.id") == "next"
    opened.press("#previous")
    assert opened.count(".card") == 24


@pytest.mark.parametrize("spacing, bars", [("null", 0), ("0.5", 1)])
def test_the_bar_of_10_mm_is_drawn_where_the_spacing_is_known(opened, spacing, bars):
    finding = f"{{view: [0, 0, 96], spacing_mm: {spacing}, others: [], truth: []}}"
    drawn = opened.run(f"return view({finding}, 0, '').querySelectorAll('.scale').length")
    assert drawn == bars


def test_a_finding_opens_with_its_neighbours_and_keys_lead_on(opened, page):
    shown = expected(page[1], "false positive")
    opened.press("#cards li:nth-child(1) .card")
    assert opened.run("return document.getElementById('finding').open")
    assert opened.count("#slices svg") == len(shown[0]["distances"])
    assert shown[0]["name"] in opened.text("#finding-title")
    opened.type("\ue014")  # right
    assert shown[1]["name"] in opened.text("#finding-title")
    assert f"{shown[1]['predicted'][0]:.1f}" in opened.text("#details")
    opened.type("\ue012")  # left
    assert shown[0]["name"] in opened.text("#finding-title")
    opened.type("\ue00c")  # escape
    assert not opened.run("return document.getElementById('finding').open")


def test_outlines_lie_where_the_finding_is_and_can_be_hidden(opened, page):
    shown = expected(page[1], "hit")[0]
    opened.choose("kind", "hit")
    svg = "document.querySelector('#cards li .card svg')"
    x, y, side = shown["view"]
    left, top, width, height = opened.run(
        f"const frame = {svg}.getBoundingClientRect();"
        f"const box = {svg}.querySelector('.box.truth').getBoundingClientRect();"
        "return [box.x - frame.x, box.y - frame.y, box.width, box.height]"
        ".map(v => v / frame.width)"
    )
    # Of several lesions the first is asked for.
    x1, y1, x2, y2 = shown["truth"][0]["box"]
    assert (left, top) == pytest.approx(((x1 - x) / side, (y1 - y) / side), abs=0.02)
    assert (width, height) == pytest.approx(((x2 - x1) / side, (y2 - y1) / side), abs=0.02)
    seen = f"return getComputedStyle({svg}.querySelector('.box.truth')).display"
    assert opened.run(seen) != "none"
    opened.press("#filters input[name=marks]")
    assert opened.run(seen) == "none"


@pytest.mark.parametrize("width", [1400, 500])
def test_nothing_sticks_out_of_a_wide_or_narrow_window(opened, width):
    opened.resize(width, 900)
    page, window = opened.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert page <= window
