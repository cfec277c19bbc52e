"""report.html holds exact HU, outlines and lengths, and nothing that identifies."""

import base64
import re
import zlib

import cv2
import numpy as np
import pytest
from skimage.measure import points_in_poly

from ct_volumes import crops
from ct_volumes.lesions import LesionSlice, Patch
from ct_volumes.page import outline, pack, write_page

from .page_samples import ALGORITHM, crop_of, data_of, lesion, scan, some_lesions


@pytest.fixture(scope="module")
def volume():
    return scan()


@pytest.fixture(scope="module")
def lesions(volume):
    return some_lesions(volume)


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


@pytest.mark.parametrize("low, high", [(-32768, 32767), (-1024, 3071), (7, 7)])
def test_a_stack_comes_back_exactly(low, high):
    stack = np.random.default_rng(1).integers(low, high + 1, (3, 5, 7)).astype(np.int16)
    stack[0, 0, 0], stack[1, 1, 1] = low, high
    assert (unpack(pack(stack), stack.shape) == stack).all()


def test_a_page_holds_the_voxels_around_each_lesion_exactly(volume, lesions, tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "MARGINS_MM", ((9, 3),))  # fewer voxels to go through one by one
    write_page(tmp_path / "report.html", lesions[:1], volume, ALGORITHM)
    (shown,) = data_of(tmp_path / "report.html")["lesions"]
    crop = shown["crop"]
    found = stack_of(
        tmp_path / "report.html", "crop-0", (len(crop["slices"]), crop["height"], crop["width"])
    )
    assert (found == crop_of(volume, crop)).all()


def test_whole_slices_are_means_to_the_nearest_8_hu(lesions, tmp_path):
    rng = np.random.default_rng(3)
    volume = scan(rng.integers(-1024, 3072, (24, 400, 512)).astype(np.int16))
    write_page(tmp_path / "report.html", lesions[:1], volume, ALGORITHM)
    height, width = data_of(tmp_path / "report.html")["whole"]
    assert (height, width) == (200, 256)
    index = lesions[0].best.index
    found = stack_of(tmp_path / "report.html", f"whole-{index}", (1, height, width))[0]
    means = volume.hu[index].reshape(200, 2, 256, 2).mean(axis=(1, 3))
    assert np.abs(found - means).max() <= 4


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
    assert (crop["x"], crop["y"], crop["width"], crop["height"], crop["slices"]) == (
        0,
        0,
        150,
        120,
        [0],
    )
