"""report.html at work in headless Chromium: keys, mouse, the picture, the list and the overview."""

import json
import re
import time

import numpy as np
import pytest

from ct_volumes import crops
from ct_volumes.page import write_page

from .page_samples import ALGORITHM, SPACING, crop_of, data_of, scan, some_lesions

UP, DOWN, LEFT, RIGHT = "\ue013", "\ue015", "\ue012", "\ue014"


@pytest.fixture(scope="module")
def volume():
    return scan()


@pytest.fixture(scope="module")
def lesions(volume):
    return some_lesions(volume)


class Opened:
    """A page in the browser, which is checked to have done nothing wrong when it is left."""

    def __init__(self, browser, path, fragment=""):
        self.browser = browser
        browser.resize(1400, 1000)
        browser.call("url", {"url": "about:blank"})  # a new fragment alone would not load the page
        browser.log("browser"), browser.log("performance")
        browser.call("url", {"url": path.as_uri() + fragment})

    def __getattr__(self, name):
        return getattr(self.browser, name)

    def state(self):
        """What the viewer says it shows, once the slices are there."""
        for _ in range(200):
            found = self.run("return {...document.getElementById('view').dataset}")
            if found.get("ready") == "true":
                return int(found["lesion"]), int(found["slice"]), found["window"]
            time.sleep(0.02)
        raise AssertionError(f"no picture: {found}, {self.text('#caution')}")

    def rows(self):
        rows = "document.querySelectorAll('#rows tr')"
        return self.run(f"return [...{rows}].map(row => +row.dataset.number)")

    def check(self):
        problems = [entry for entry in self.log("browser") if entry["level"] != "INFO"]
        assert not problems
        sent = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        asked = [
            message["params"]["request"]["url"] for message in sent
            if message["method"] == "Network.requestWillBeSent"
        ]  # fmt: skip
        assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked)


@pytest.fixture(scope="module")
def path(volume, lesions, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, lesions, volume, ALGORITHM)
    return path


@pytest.fixture
def opened(browser, path):
    opened = Opened(browser, path)
    yield opened
    opened.check()


def test_keys_go_through_lesions_slices_and_windows(opened, path):
    assert opened.rows() == [2, 1, 3]
    assert opened.state() == (2, 3, "lung")
    assert opened.text("#heading") == "3 lesions"
    assert "alignshift <b>" in opened.text("#summary")
    for key, state in [
        ("k", (2, 3, "lung")), ("j", (1, 12, "soft tissue")), (DOWN, (1, 13, "soft tissue")),
        (UP, (1, 12, "soft tissue")), (UP, (1, 11, "soft tissue")), ("3", (1, 11, "bone")),
        (RIGHT, (3, 14, "bone")), ("4", (3, 14, "liver")), ("j", (3, 14, "liver")),
        (LEFT, (1, 12, "liver")), ("1", (1, 12, "soft tissue")), ("2", (1, 12, "lung")),
        (DOWN, (1, 13, "lung")), ("b", (1, 12, "lung")),
    ]:  # fmt: skip
        opened.type(key)
        assert opened.state() == state, key
    current = "return document.querySelector('tr[aria-current]').dataset.number"
    assert opened.run(current) == "1"
    for _ in range(30):
        opened.type(UP)
    assert opened.state() == (1, data_of(path)["lesions"][0]["crop"]["slices"][0], "lung")


def test_masks_and_axes_go_and_come_back(opened):
    opened.state()
    opened.type("j")
    opened.state()
    kinds = "return [...document.querySelectorAll('#marks path')].map(p => p.className.baseVal)"
    assert opened.run(kinds) == ["outline other", "outline detected", "axis"]
    assert opened.run("return document.getElementById('lengths').innerText").split("\n") == [
        "8.0 mm", "4.0 mm",
    ]  # fmt: skip
    opened.type("m")
    assert opened.run(kinds) == ["axis"]
    opened.type("r")
    assert opened.run(kinds) == []
    opened.press("#mask"), opened.press("#recist")
    assert len(opened.run(kinds)) == 3
    opened.type(UP)
    assert opened.run(kinds) == ["outline interpolated"]
    assert "interpolated" in opened.text("#ne")


def test_the_picture_is_the_windowed_slice_and_marks_lie_on_it(opened, volume, lesions, path):
    opened.state()
    opened.type("j"), opened.type("1")
    assert opened.state() == (1, 12, "soft tissue")
    crop = data_of(path)["lesions"][0]["crop"]
    grey = opened.run(
        "const c = document.getElementById('picture');"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    grey = np.reshape(grey, (crop["height"], crop["width"], 4))
    hu = crop_of(volume, crop | dict(slices=[12]))[0]
    expected = np.floor(np.clip((hu + 160) * (255 / 400), 0, 255) + 0.5)
    assert (grey == np.dstack([expected] * 3 + [np.full_like(expected, 255)])).all()
    x, y, width, height, frame_width, frame_height = opened.run(
        "const frame = document.getElementById('view').getBoundingClientRect();"
        "const box = document.querySelector('.axis').getBoundingClientRect();"
        "return [box.x - frame.x, box.y - frame.y, box.width, box.height]"
        ".concat(frame.width, frame.height)"
    )
    assert frame_width / frame_height == pytest.approx(
        crop["width"] * SPACING[1] / (crop["height"] * SPACING[0]), rel=0.01
    )
    low, high = lesions[0].recist.min(0), lesions[0].recist.max(0)
    scale = np.array([frame_width / crop["width"], frame_height / crop["height"]])
    corner = (low - (crop["x"], crop["y"]) + 0.5) * scale
    assert (x, y) == pytest.approx(corner, abs=1.5)
    assert (width, height) == pytest.approx((high - low) * scale, abs=2.5)


def test_mouse(opened):
    opened.state()
    opened.type("j")
    assert opened.state() == (1, 12, "soft tissue")
    x, y = opened.run(
        "const box = document.getElementById('view').getBoundingClientRect();"
        "return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)]"
    )
    wheel = {"type": "scroll", "x": x, "y": y, "deltaX": 0, "deltaY": 120, "origin": "viewport"}
    opened.call("actions", {"actions": [{"type": "wheel", "id": "wheel", "actions": [wheel]}]})
    assert opened.state() == (1, 13, "soft tissue")
    moves = [
        {"type": "pointerMove", "x": x, "y": y}, {"type": "pointerDown", "button": 0},
        {"type": "pointerMove", "x": x + 60, "y": y + 40}, {"type": "pointerUp", "button": 0},
    ]  # fmt: skip
    pointer = {"type": "pointer", "id": "mouse", "actions": moves}
    opened.call("actions", {"actions": [pointer]})
    assert opened.state() == (1, 13, "")
    width, level = opened.run("return [now.high - now.low, (now.high + now.low) / 2]")
    assert width > 440 and level > 60
    assert re.search(r"-?\d+ HU at \d+, \d+", opened.text("#se"))
    opened.press("#rows tr[data-number='3']")
    assert opened.state()[:2] == (3, 14)
    for name, number in [("coronal", 2), ("sagittal", 1)]:
        opened.run(
            "document.querySelector(arguments[0]).dispatchEvent(new MouseEvent('click'))",
            f"#{name} .mark[data-number='{number}']",
        )
        assert opened.state()[0] == number


def test_filter_and_order(opened):
    move = (
        "const slider = document.getElementById('least'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input'))"
    )
    opened.run(move, 0.5)
    assert opened.rows() == [2, 1] and "2 of 3" in opened.text("#left")
    assert opened.count("#coronal .mark") == 2
    opened.run(move, 1)
    assert opened.rows() == [] and opened.run("return document.getElementById('viewer').hidden")
    assert "No lesion" in opened.text("#nothing")
    opened.type("j")
    opened.run(move, 0)
    assert opened.state()[0] == 2
    for column, rows in [(2, [2, 1, 3]), (2, [3, 1, 2]), (0, [1, 2, 3]), (4, [2, 1, 3])]:
        opened.press(f"#columns th:nth-child({column + 1}) button")
        assert opened.rows() == rows
    assert opened.run("return document.querySelector('th[aria-sort]').textContent") == "Slices"


@pytest.mark.parametrize("width", [1900, 1200, 480])
def test_nothing_sticks_out_of_a_wide_or_narrow_window(opened, width):
    opened.state()
    opened.resize(width, 900)
    page, window = opened.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert page <= window


def test_an_address_opens_a_lesion_at_a_slice_in_a_window(browser, path):
    opened = Opened(browser, path, "#lesion=3&slice=13&window=bone")
    assert opened.state() == (3, 13, "bone")
    opened.check()


def test_slices_and_pixels_left_out_are_told(browser, volume, lesions, tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "LESION_VOXELS", 3_000)
    path = tmp_path / "report.html"
    write_page(path, lesions, volume, ALGORITHM)
    opened = Opened(browser, path)
    opened.state()
    crop = data_of(path)["lesions"][1]["crop"]
    assert crop["stride"] > 1 and "pixel" in opened.text("#thinned")
    opened.check()


def test_a_browser_that_is_too_old_is_told(opened):
    opened.state()
    opened.run("delete window.DecompressionStream; unpacked.clear(); show(data.lesions[2])")
    for _ in range(100):
        if told := opened.text("#caution").count("too old"):
            break
        time.sleep(0.02)
    assert told and opened.run("return document.getElementById('view').dataset.ready") == "false"


def test_no_lesions(browser, volume, tmp_path):
    path = tmp_path / "report.html"
    write_page(path, [], volume, ALGORITHM)
    opened = Opened(browser, path)
    assert opened.text("#heading") == "No lesions found"
    assert "found no lesions" in opened.text("#nothing")
    assert opened.count("#figures img") == 2 and opened.count(".mark") == 0
    opened.type("j")
    opened.check()
