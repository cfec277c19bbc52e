"""report.html: exact HU, marks in their places, nothing that identifies, and the page at work in
headless Chromium."""

import base64
import json
import re
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.measure import points_in_poly

from ct_volumes import page
from ct_volumes.lesions import Algorithm, Lesion, LesionSlice, Patch
from ct_volumes.page import outline, pack, write_page
from ct_volumes.projections import LONGER_SIDE, project
from ct_volumes.volume import CTVolume, Instance, Source

ALGORITHM = Algorithm(
    "alignshift <b>", "1.2", "ab12" * 16, {"interval_mm": 2.0, "calibration": "/home/doe/fp.json"}
)
SPACING = (0.9, 0.6)
STEPS = [1.0] * 12 + [2.5] * 11
UP, DOWN, LEFT, RIGHT = "\ue013", "\ue015", "\ue012", "\ue014"


def scan(hu=None, tilt=0.1, steps=STEPS):
    """Oblong pixels, uneven spacing, and a tilted gantry."""
    if hu is None:
        hu = np.random.default_rng(0).normal(0, 60, (24, 120, 150)).astype(np.int16)
        hu[:, :, 75:] -= 800
    below = np.append(0, np.cumsum(steps))[: len(hu)]
    origins = np.stack([0 * below - 45, tilt * below - 54, 300 - below], axis=1)
    source = Source(
        Path("/data/DOE^JANE 4711"), "dicom", hu.shape,
        instances=(Instance(Path("/data/DOE^JANE 4711/1.dcm"), "1.2"),),
        series_uid="1.2.826.99", description="Chest of Jane", kernel="B30f",
        notes=("a gap </script> after /data/DOE^JANE 4711/1.dcm",),
    )  # fmt: skip
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), SPACING, source)


def lesion(volume, first, last, centre, radius, score=0.5, interpolated=()):
    """A disc of `radius` mm on each slice; the middle one is measured and has the best score."""
    y, x = np.indices(volume.hu.shape[1:])
    mask = np.hypot((x - centre[0]) * SPACING[1], (y - centre[1]) * SPACING[0]) <= radius
    patch, middle = Patch.of(mask), (first + last) // 2
    height, width = patch.mask.shape
    box = np.array([patch.x, patch.y, patch.x + width - 1, patch.y + height - 1], float)
    slices = tuple(
        LesionSlice(k, box, None if k in interpolated else score - abs(k - middle) / 50, patch)
        for k in range(first, last + 1)
    )
    dx, dy = radius / SPACING[1], 0.5 * radius / SPACING[0]
    recist = np.add([[-dx, 0], [dx, 0], [0, -dy], [0, dy]], centre)
    index = np.arange(first, last + 1)
    centroid = volume.to_world(*centre, index).mean(0)
    volume_mm3 = mask.sum() * np.prod(SPACING) * volume.extent_mm[index].sum()
    return Lesion(
        score, slices, volume_mm3, centroid, recist, middle, np.array([2.0, 1.0]) * radius
    )


@pytest.fixture(scope="module")
def volume():
    return scan()


@pytest.fixture(scope="module")
def lesions(volume):
    """Not in the order of their scores."""
    return [
        lesion(volume, 10, 14, (40, 50), 4, 0.6, interpolated=(11,)),
        lesion(volume, 2, 5, (120, 30), 7, 0.9),
        lesion(volume, 12, 16, (46, 58), 3, 0.3),
    ]


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def stack_of(path, name, shape):
    text = re.search(rf'id="{name}">(.*?)</script>', path.read_text())[1]
    return unpack(text, shape)


def unpack(text, shape):
    """Voxel by voxel."""
    planes = zlib.decompress(base64.b64decode(text))
    n, height, width = shape
    hu = np.zeros(shape, np.int64)
    for i, (k, y, x) in enumerate(np.ndindex(n, height, width)):
        a, b = hu[k, y, x - 1], hu[k, y - 1, x]
        if x and y:
            guess = sorted([a, b, a + b - hu[k, y - 1, x - 1]])[1]
        else:
            guess = a if x else b if y else 0
        folded = planes[i] + 256 * planes[n * height * width + i]
        rest = -(folded + 1) // 2 if folded % 2 else folded // 2
        hu[k, y, x] = (guess + rest + 32768) % 65536 - 32768
    return hu


def crop_of(volume, crop):
    columns = crop["x"] + crop["stride"] * np.arange(crop["w"])
    rows = crop["y"] + crop["stride"] * np.arange(crop["h"])
    return volume.hu[np.ix_(crop["slices"], rows, columns)]


@pytest.mark.parametrize("low, high", [(-32768, 32767), (-1024, 3071), (7, 7)])
def test_a_stack_comes_back_exactly(low, high):
    stack = np.random.default_rng(1).integers(low, high + 1, (3, 5, 7)).astype(np.int16)
    stack[0, 0, 0], stack[1, 1, 1] = low, high
    assert (unpack(pack(stack), stack.shape) == stack).all()


def test_a_page_holds_the_voxels_around_each_lesion_exactly(volume, lesions, tmp_path):
    write_page(tmp_path / "report.html", lesions[:1], volume, ALGORITHM)
    (shown,) = data_of(tmp_path / "report.html")["lesions"]
    crop = shown["crop"]
    found = stack_of(
        tmp_path / "report.html", "crop-0", (len(crop["slices"]), crop["h"], crop["w"])
    )
    assert (found == crop_of(volume, crop)).all()


def test_numbers_are_those_of_the_lesions(volume, lesions, tmp_path):
    write_page(tmp_path / "report.html", lesions, volume, ALGORITHM)
    data = data_of(tmp_path / "report.html")
    assert [shown["score"] for shown in data["lesions"]] == [0.6, 0.9, 0.3]
    for number, (shown, own) in enumerate(zip(data["lesions"], lesions, strict=True), 1):
        assert (shown["number"], shown["first"], shown["last"]) == (number, own.first, own.last)
        assert (shown["measured"], shown["best"]) == (own.recist_index, own.best.index)
        assert [shown["long"], shown["short"]] == pytest.approx(own.diameters_mm)
        assert shown["volume"] == pytest.approx(own.volume_mm3, abs=0.01)
        assert shown["position"] == pytest.approx(own.centroid_mm, abs=0.01)
        np.testing.assert_allclose(shown["recist"], own.recist, atol=0.01)
        scores = [score for score, _ in shown["slices"]]
        assert scores == pytest.approx([s.score for s in own.slices])
        assert shown["window"] == ("lung" if number == 2 else "soft tissue")


@pytest.mark.parametrize("budget", [400_000, 40_000, 8_000])
def test_crops_have_room_and_keep_to_their_share(volume, lesions, budget, monkeypatch):
    monkeypatch.setattr(page, "LESION_VOXELS", budget)
    for own in lesions:
        crop = page._crop(own, volume, 1)
        kept = crop["slices"]
        ends = {own.first, own.last, own.recist_index, own.best.index}
        assert ends <= set(kept) and kept == sorted(set(kept))
        assert len(kept) * crop["w"] * crop["h"] <= budget * (1 + 4 / len(kept))
        if budget == 400_000:
            assert (crop["stride"], crop["every"]) == (1, 1)
            near = np.abs(volume.positions_mm[:, None] - volume.positions_mm[[own.first, own.last]])
            assert set(np.flatnonzero(near.min(axis=1) <= 10)) <= set(kept)
        # Beside the lesion 20 mm at least, as far as the slice goes.
        for start, count, low, high, spacing, size in (
            (crop["x"], crop["w"], own.box[0], own.box[3], SPACING[1], volume.hu.shape[2]),
            (crop["y"], crop["h"], own.box[1], own.box[4], SPACING[0], volume.hu.shape[1]),
        ):
            end = start + (count - 1) * crop["stride"]
            assert start >= 0 and end < size
            assert start == 0 or (low - start) * spacing > 19
            assert size - 1 - end < crop["stride"] or (end - high) * spacing > 19 - crop["stride"]
    if budget == 8_000:
        assert crop["stride"] > 1


def test_crops_of_many_lesions_share_a_page(volume, lesions):
    for own in lesions:
        alone, among = page._crop(own, volume, 1), page._crop(own, volume, 400)
        assert alone["w"] * alone["h"] > among["w"] * among["h"]
        assert len(among["slices"]) * among["w"] * among["h"] < 1.5 * page.PAGE_VOXELS / 400


def test_outlines_enclose_the_pixels_of_the_mask():
    rng = np.random.default_rng(2)
    for _ in range(20):
        mask = cv2.blur(rng.random((14, 17)).astype(np.float32), (3, 3)) > 0.5
        patch = Patch(30, 20, mask)
        path = outline(LesionSlice(0, np.zeros(4), 0.5, patch))
        rows, columns = np.indices((18, 21))
        points = np.stack([columns + 28, rows + 18], axis=-1).reshape(-1, 2)
        inside = np.zeros(len(points), bool)
        for part in re.findall(r"M([^z]*)z", path):
            start, moves = (np.array(t.split(), int).reshape(-1, 2) for t in part.split("l"))
            corners = np.cumsum(np.concatenate([start, moves]), axis=0) / 2
            inside ^= points_in_poly(points, corners)
        assert (inside.reshape(18, 21) == np.pad(mask, 2)).all()


@pytest.mark.parametrize("place", [(1, 20, 30), (8, 100, 140), (16, 60, 11), (22, 5, 75)])
def test_markers_lie_on_what_is_bright_in_the_projections(place):
    """A bright block of one slice, 3 x 3 pixels, alone in the air."""
    hu = np.full((24, 120, 150), -1000, np.int16)
    k, y, x = place
    hu[k, y - 1 : y + 2, x - 1 : x + 2] = 3000
    volume = scan(hu, tilt=0.2)
    own = lesion(volume, k, k, (x, y), 0.95)
    for view in project(volume).values():
        assert max(view.grey.shape) in (LONGER_SIDE, LONGER_SIDE + 1)
        assert view.grey.shape[0] * view.pixel_mm == pytest.approx(
            volume.extent_mm.sum(), abs=view.pixel_mm
        )
        rows, columns = np.nonzero(view.grey > 128)
        left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        mark = page._mark(own, volume, view)
        x1, y1, x2, y2 = mark["box"]
        assert (top, bottom) == pytest.approx((y1, y2), abs=1.01)
        # The box ends at pixel centres; brightness spreads to half way to the next pixel and beyond.
        spread = max(SPACING) / view.pixel_mm + 1
        assert (left, right) == pytest.approx((x1, x2), abs=spread)
        assert mark["centre"] == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=1)
        assert page._picture(view, volume)["levels"][k] == pytest.approx(
            mark["centre"][1], abs=0.02
        )


def test_nothing_tells_whose_scan_it_is_unless_asked_for(volume, lesions, tmp_path):
    secret = ("DOE", "4711", "Jane", "1.2.826.99", "/home", "/data", "1.dcm")
    write_page(tmp_path / "a.html", lesions, volume, ALGORITHM)
    write_page(tmp_path / "b.html", lesions, volume, ALGORITHM, identify=True)
    hidden, told = ((tmp_path / name).read_text() for name in ("a.html", "b.html"))
    # Base64 may spell anything.
    embedded = r'id="(crop|whole)-.*?</script>|"png":".*?"'
    told, hidden = (re.sub(embedded, "", text) for text in (told, hidden))
    assert [word for word in secret if word in hidden] == []
    assert [word for word in secret if word not in told] == []
    assert "B30f" in hidden and "Research, not a medical device" in hidden


def test_the_page_asks_nothing_of_a_network_and_holds_no_foreign_markup(volume, lesions, tmp_path):
    write_page(tmp_path / "report.html", lesions, volume, ALGORITHM)
    text = (tmp_path / "report.html").read_text()
    assert set(re.findall(r"\b\w+://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r'\b(?:src|href)="([^"]*)"', text)) == {"data:,"}
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert "<b>" not in text.replace("\\u003cb>", "") and "alignshift &lt;b&gt;" in text
    assert "{{" not in text
    (note,) = [value for name, value in data_of(tmp_path / "report.html")["scan"] if name == "Note"]
    assert note == "a gap </script> after a file"


def test_a_scan_of_one_slice_and_a_lesion_that_fills_it(tmp_path):
    volume = scan(np.zeros((1, 120, 150), np.int16))
    write_page(tmp_path / "report.html", [lesion(volume, 0, 0, (75, 60), 80)], volume, ALGORITHM)
    (shown,) = data_of(tmp_path / "report.html")["lesions"]
    crop = shown["crop"]
    assert (crop["x"], crop["y"], crop["w"], crop["h"], crop["slices"]) == (0, 0, 150, 120, [0])


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
    grey = np.reshape(grey, (crop["h"], crop["w"], 4))
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
        crop["w"] * SPACING[1] / (crop["h"] * SPACING[0]), rel=0.01
    )
    low, high = lesions[0].recist.min(0), lesions[0].recist.max(0)
    scale = np.array([frame_width / crop["w"], frame_height / crop["h"]])
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
    monkeypatch.setattr(page, "LESION_VOXELS", 3_000)
    path = tmp_path / "report.html"
    write_page(path, lesions, volume, ALGORITHM)
    opened = Opened(browser, path)
    opened.state()
    crop = data_of(path)["lesions"][1]["crop"]
    assert crop["stride"] > 1 and "pixel" in opened.text("#thinned")
    opened.check()


def test_no_lesions(browser, volume, tmp_path):
    path = tmp_path / "report.html"
    write_page(path, [], volume, ALGORITHM)
    opened = Opened(browser, path)
    assert opened.text("#heading") == "No lesions found"
    assert "found no lesions" in opened.text("#nothing")
    assert opened.count("#figures img") == 2 and opened.count(".mark") == 0
    opened.type("j")
    opened.check()
