"""RoIAlign by matrix products against mmcv's and against a loop from its definition."""

import math

import numpy as np
import pytest
import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

from mmdet_ext.models import roi_align as module
from mmdet_ext.models.roi_align import MatrixRoIAlign, roi_align, use_matrix_roi_align

SIZE = 48  # of the maps' image; at a scale of 1/4 the maps are 12 pixels wide


def regions(count=40, images=2, seed=0):
    """Of all sizes and places, some of them outside of the image."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.normal(2.5, 1, (count, 2)))
    middle = rng.uniform(-0.2 * SIZE, 1.2 * SIZE, (count, 2))
    image = rng.integers(0, images, (count, 1))
    return torch.tensor(np.hstack([image, middle - sides / 2, middle + sides / 2])).float()


def maps(images=2, channels=5, rows=12, columns=14, seed=0):
    return torch.randn((images, channels, rows, columns), generator=torch.manual_seed(seed))


def bilinear(plane, y, x):
    rows, columns = plane.shape
    if not (-1 <= y <= rows and -1 <= x <= columns):
        return 0.0
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
    top, left = min(int(y), max(rows - 2, 0)), min(int(x), max(columns - 2, 0))
    value = 0.0
    for row in {top, min(top + 1, rows - 1)}:
        for column in {left, min(left + 1, columns - 1)}:
            value += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * plane[row, column]
    return value


def plain(x, rois, output_size, scale, ratio, aligned):
    """Each bin the mean over a grid of samples, as the paper defines it."""
    height, width = output_size
    out = np.zeros((len(rois), x.shape[1], height, width))
    for r, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in corners)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1), max(h, 1)
        ny, nx = ratio or math.ceil(h / height), ratio or math.ceil(w / width)
        for c in range(x.shape[1]):
            for i in range(height):
                for j in range(width):
                    samples = [
                        bilinear(
                            x[int(image), c],
                            y1 + h / height * (i + (a + 0.5) / ny),
                            x1 + w / width * (j + (b + 0.5) / nx),
                        )
                        for a in range(ny)
                        for b in range(nx)
                    ]
                    out[r, c, i, j] = sum(samples) / max(len(samples), 1)
    return out


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_it_is_the_mean_of_bilinear_samples(ratio, aligned):
    x, rois = maps(channels=2).double(), regions(12).double()
    found = roi_align(x, rois, (3, 2), 0.25, ratio, aligned)
    expected = plain(x.numpy(), rois, (3, 2), 0.25, ratio, aligned)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("size", [7, 14, (3, 5)])
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_it_equals_mmcv(size, ratio, aligned, scale):
    x, rois = maps(), regions(60)
    options = (size, scale, ratio, "avg", aligned)
    with torch.no_grad():
        expected = RoIAlign(*options)(x, rois)
        found = MatrixRoIAlign(*options)(x, rois)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rois",
    [
        torch.zeros(0, 5),
        torch.tensor([[0.0, 5, 5, 5, 5]]),  # no area
        torch.tensor([[1.0, 5, 5, 30, 5]]),
        torch.tensor([[0.0, 100, 100, 130, 130]]),  # wholly outside
        torch.tensor([[0.0, -500, -500, 500, 500]]),  # far larger than the image
        torch.tensor([[1.0, 3.1, 3.1, 3.2, 3.3]]),  # far smaller than a pixel of the map
        torch.tensor([[0.0, 0, 0, SIZE, SIZE], [1.0, 47, 47, 48, 48], [0.0, -4, 2, -3, 9]]),
    ],
    ids=["none", "point", "line", "outside", "huge", "tiny", "corners"],
)
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_odd_regions_equal_mmcv(rois, ratio, aligned):
    options = (7, 0.25, ratio, "avg", aligned)
    x = maps(channels=1)
    with torch.no_grad():
        expected = RoIAlign(*options)(x, rois)
        torch.testing.assert_close(MatrixRoIAlign(*options)(x, rois), expected)


@pytest.mark.parametrize("shape", [(1, 14), (12, 1), (1, 1)])
def test_maps_of_one_row_or_column(shape):
    x, rois = maps(1, 3, *shape), regions(20, images=1)
    with torch.no_grad():
        expected = RoIAlign(4, 0.25, 2)(x, rois)
        torch.testing.assert_close(MatrixRoIAlign(4, 0.25, 2)(x, rois), expected)


def test_any_memory_layout_is_the_same():
    x, rois, layer = maps(), regions(), MatrixRoIAlign(7, 0.25, 2)
    with torch.no_grad():
        expected = layer(x, rois)
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(last, rois), expected)
        wide = torch.cat([x, x], 1)[:, 1:6]  # strides of a larger tensor
        torch.testing.assert_close(layer(wide, rois), layer(wide.contiguous(), rois))
    # mmcv's own code, too, which would read channels-last memory wrongly.
    last.requires_grad_()
    torch.testing.assert_close(layer(last, rois), expected)


def test_groups_of_any_size_are_the_same(monkeypatch):
    x, rois, layer = maps(), regions(), MatrixRoIAlign(7, 0.25, 0)
    with torch.no_grad():
        expected = layer(x, rois)
        for most in (1, 5 * 30, 5 * 10_000):
            monkeypatch.setattr(module, "GROUP_NUMBERS", most)
            torch.testing.assert_close(layer(x, rois), expected)


def test_training_is_mmcv_s():
    x, rois = maps(), regions()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for layer, leaf in zip((RoIAlign(7, 0.25, 2), MatrixRoIAlign(7, 0.25, 2)), leaves):
        layer(leaf, rois).square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_pooling_of_largest_values_is_mmcv_s():
    x, rois = maps(), regions()
    with torch.no_grad():
        expected = RoIAlign(7, 0.25, 2, "max")(x, rois)
        assert torch.equal(MatrixRoIAlign(7, 0.25, 2, "max")(x, rois), expected)


def test_a_detector_s_layers_are_replaced_and_keep_options_and_weights():
    extractor = SingleRoIExtractor(
        roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2),
        out_channels=5,
        featmap_strides=[4, 8],
    )
    names = list(extractor.state_dict())
    x, rois = [maps(), maps(rows=6, columns=7)], regions()
    with torch.no_grad():
        expected = extractor(x, rois)
        use_matrix_roi_align(extractor)
        assert all(type(layer) is MatrixRoIAlign for layer in extractor.roi_layers)
        assert [layer.spatial_scale for layer in extractor.roi_layers] == [1 / 4, 1 / 8]
        torch.testing.assert_close(extractor(x, rois), expected, atol=2e-5, rtol=1e-5)
    assert list(extractor.state_dict()) == names


@pytest.mark.parametrize(
    "roi, message",
    [([2.0, 1, 1, 5, 5], "there are 2"), ([0.0, 5, 1, 1, 5], "before it begins")],
)
def test_wrong_regions_are_refused(roi, message):
    with pytest.raises(ValueError, match=message):
        roi_align(maps(), torch.tensor([roi]), (7, 7))
