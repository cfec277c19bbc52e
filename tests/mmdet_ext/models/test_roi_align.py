"""RoIAlign at CPU inference against mmcv's, and against a loop over samples."""

import math

import pytest
import torch
from mmcv.ops import RoIAlign, RoIPool
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import nn

from mmdet_ext.models import roi_align as module
from mmdet_ext.models.roi_align import InferenceRoIAlign, roi_align, use_inference_roi_align

REGIONS = torch.tensor(
    [
        [0, 8.0, 16.0, 24.0, 40.0],
        [1, 0.0, 0.0, 80.0, 48.0],  # the whole map
        [0, 10.3, 10.3, 10.3, 30.0],  # no width
        [1, 5.0, 5.0, 5.0, 5.0],
        [0, 20.0, 20.0, 20.5, 20.25],
        [1, -30.0, -20.0, 20.0, 30.0],  # partly out of the map
        [0, 60.0, 30.0, 200.0, 90.0],
        [1, 300.0, 300.0, 340.0, 340.0],  # out of it
        [0, -3000.0, -2000.0, 4000.0, 3000.0],
        [0, -4.0, -4.0, 4.0, 4.0],  # samples on and beyond the last that count
    ]
)


def features(batch=2, channels=5, height=12, width=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator)


def by_loop(x, rois, bins, scale, ratio, aligned):
    """Bins as the mean of bilinear samples, one number at a time."""
    _, channels, height, width = x.shape
    out = torch.zeros(len(rois), channels, *bins)
    for n, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (edge * scale - (0.5 if aligned else 0) for edge in box)
        size = [x2 - x1, y2 - y1] if aligned else [max(x2 - x1, 1), max(y2 - y1, 1)]
        step = size[0] / bins[1], size[1] / bins[0]
        grid = [ratio or math.ceil(s) for s in step]
        for i in range(bins[0]):
            for j in range(bins[1]):
                for row in range(grid[1]):
                    y = y1 + (i + (row + 0.5) / grid[1]) * step[1]
                    for column in range(grid[0]):
                        px = x1 + (j + (column + 0.5) / grid[0]) * step[0]
                        value = bilinear(x[int(image)], px, y, height, width)
                        out[n, :, i, j] += value / (grid[0] * grid[1])
    return out


def bilinear(x, px, py, height, width):
    if not (-1 <= px <= width and -1 <= py <= height):
        return torch.zeros(len(x))
    px, py = min(max(px, 0), width - 1), min(max(py, 0), height - 1)
    value = torch.zeros(len(x))
    for row in {int(py), min(int(py) + 1, height - 1)}:
        for column in {int(px), min(int(px) + 1, width - 1)}:
            value += x[:, row, column] * (1 - abs(px - column)) * (1 - abs(py - row))
    return value


@torch.no_grad()
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("bins", [(7, 7), (14, 14), (3, 5), (1, 1)])
def test_equal_to_mmcv(bins, ratio, aligned, monkeypatch):
    options = dict(spatial_scale=0.25, sampling_ratio=ratio, aligned=aligned)
    generator = torch.Generator().manual_seed(1)
    boxes = 120 * torch.rand(40, 4, generator=generator) - 20
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:].abs()], 1)
    images = torch.arange(40).view(-1, 1) % 2
    rois = torch.cat([REGIONS, torch.cat([images, corners], 1)])
    x = features()
    expected = RoIAlign(bins, **options)(x, rois)
    layer = InferenceRoIAlign(bins, **options)
    assert layer.is_faster(x, rois)
    torch.testing.assert_close(layer(x, rois), expected, rtol=0, atol=1e-5)
    # In passes as small as they get.
    monkeypatch.setattr(module, "TAPS", 1)
    torch.testing.assert_close(layer(x, rois), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_equal_to_a_loop(ratio, aligned):
    rois = REGIONS[:8]
    expected = by_loop(features(), rois, (2, 3), 0.25, ratio, aligned)
    found = roi_align(features(), rois, (2, 3), 0.25, ratio, aligned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 20), (12, 1), (1, 1)])
def test_maps_of_one_row_and_one_channel(shape):
    x = features(channels=1, height=shape[0], width=shape[1])
    expected = RoIAlign(7, 0.25, 2)(x, REGIONS)
    torch.testing.assert_close(InferenceRoIAlign(7, 0.25, 2)(x, REGIONS), expected)


@pytest.mark.parametrize("record", [True, False])
def test_any_memory_format_in_and_nchw_out(record):
    """In training too, where mmcv's own would scramble the first two."""
    x, layer = features(), InferenceRoIAlign(7, 0.25, 2)
    expected = RoIAlign(7, 0.25, 2)(x, REGIONS)
    padded = torch.cat([x, x], 3)[..., : x.shape[3]]
    with torch.set_grad_enabled(record):
        for other in (
            x.contiguous(memory_format=torch.channels_last),
            padded,
            x.mT.contiguous().mT,
        ):
            assert not other.is_contiguous()
            found = layer(other, REGIONS)
            assert found.is_contiguous()
            torch.testing.assert_close(found, expected)
        assert layer(x, REGIONS[:0]).shape == (0, 5, 7, 7)


def test_where_autograd_records_the_gradient_is_that_of_mmcv():
    ours, theirs = features().requires_grad_(), features().requires_grad_()
    InferenceRoIAlign(7, 0.25, 2)(ours, REGIONS).square().sum().backward()
    RoIAlign(7, 0.25, 2)(theirs, REGIONS).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad) and ours.grad.abs().max() > 0


@torch.no_grad()
def test_other_types_and_maximum_pooling_are_mmcvs():
    x = features().double()
    found = InferenceRoIAlign(7, 0.25, 2)(x, REGIONS.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, RoIAlign(7, 0.25, 2)(x, REGIONS.double()))
    maximum = InferenceRoIAlign(7, 0.25, 2, pool_mode="max")
    expected = RoIAlign(7, 0.25, 2, pool_mode="max")(features(), REGIONS)
    assert torch.equal(maximum(features(), REGIONS), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "roi, said",
    [
        ([0, 5, 5, 4, 6], "end where they begin"),
        ([0, 5, float("nan"), 6, 6], "finite"),
        ([2, 5, 5, 6, 6], "batch of 2"),
        ([-1, 5, 5, 6, 6], "batch of 2"),
    ],
)
def test_bad_regions_are_refused(roi, said):
    with pytest.raises(ValueError, match=said):
        roi_align(features(), torch.tensor([roi], dtype=torch.float32), (7, 7), 0.25)


def extractor(**layer):
    return SingleRoIExtractor(
        roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2) | layer,
        out_channels=5,
        featmap_strides=[4, 8],
        finest_scale=16,
    )


@torch.no_grad()
def test_a_detector_gets_it_and_several_levels_pool_the_same():
    model = nn.ModuleList([extractor(), extractor(output_size=14, aligned=False)])
    maps = [features(), features(height=6, width=10, seed=1)]
    expected = [part(maps, REGIONS[:8]) for part in model]
    keys = model.state_dict().keys()
    assert use_inference_roi_align(model) and model.state_dict().keys() == keys
    assert all(type(layer) is InferenceRoIAlign for part in model for layer in part.roi_layers)
    last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    for part, pooled in zip(model, expected):
        torch.testing.assert_close(part(last, REGIONS[:8]), pooled, rtol=0, atol=1e-5)


def test_layers_of_other_kinds_stay():
    class Own(RoIAlign):
        pass

    model = nn.ModuleList([extractor(), extractor()])
    model[0].roi_layers[0] = Own(7)
    model[1].roi_layers[1] = RoIPool(7)
    assert not use_inference_roi_align(model)
    assert type(model[0].roi_layers[0]) is Own and type(model[1].roi_layers[1]) is RoIPool
