"""KeySliceFPN against 3D convolutions and a feature pyramid written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign

from mmdet_ext.models.dino import KeySliceLevels
from mmdet_ext.models.neck import DepthReduction, KeySliceFPN

from .let_go import one_at_a_time


def maps(depth=3, batch=2, channels=(4, 6, 8), size=16):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, depth, size >> i, size >> i, generator=generator, dtype=torch.float64)
        for i, c in enumerate(channels)
    ]


@pytest.mark.parametrize("depth", [1, 3, 7])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_depth_reduction_is_a_d_1_1_convolution(depth, memory_format):
    reduction = DepthReduction(4, depth).double()
    x = maps(depth)[0].contiguous(memory_format=memory_format)
    expected = F.conv3d(x, reduction.weight)[:, :, 0]
    torch.testing.assert_close(reduction(x), expected, rtol=0, atol=1e-10)


def test_depth_reduction_adds_in_the_order_of_slices():
    """Bit for bit, and with the gradients of a sum that is not in place."""
    reduction, x = DepthReduction(4, 3), maps()[0].float().requires_grad_()
    terms = [F.conv2d(x[:, :, d], reduction.weight[:, :, d]) for d in range(3)]
    expected, got = terms[0] + terms[1] + terms[2], reduction(x)
    assert torch.equal(got, expected)
    leaves = [x, reduction.weight]
    of = [torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*of))


def test_pyramid_by_hand():
    neck = KeySliceFPN((4, 6, 8), num_slices=3, out_channels=5).double()
    for lateral in neck.laterals:
        torch.nn.init.normal_(lateral.bias)
    features = maps()
    (output,) = neck(features)
    expected = 0
    for x, reduction, lateral in reversed(
        list(zip(features, neck.reductions, neck.laterals, strict=True))
    ):
        y = F.conv2d(F.conv3d(x, reduction.weight)[:, :, 0], lateral.weight, lateral.bias)
        if torch.is_tensor(expected):
            expected = expected.repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = expected + y
    assert output.shape == (2, 5, 16, 16)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_weights_start_as_in_the_released_code(depth):
    torch.manual_seed(0)
    channels = (256, 512)
    neck = KeySliceFPN(channels, num_slices=depth, out_channels=512)
    for c, reduction, lateral in zip(channels, neck.reductions, neck.laterals, strict=True):
        bound = math.sqrt(3 / c)  # of a uniform distribution with variance 1 / c
        assert 0.99 * bound < lateral.weight.abs().max() <= bound
        assert lateral.weight.std().item() == pytest.approx(math.sqrt(1 / c), rel=0.01)
        assert lateral.bias.abs().max() == 0
        if depth > 1:
            std = math.sqrt(2 / (c * depth))
            assert reduction.weight.std().item() == pytest.approx(std, rel=0.01)
            # Normal, not uniform: 4.55 % lie beyond two standard deviations.
            beyond = (reduction.weight.abs() > 2 * std).float().mean().item()
            assert beyond == pytest.approx(0.0455, abs=0.003)


def test_maps_of_one_slice_are_not_convolved_along_depth():
    neck = KeySliceFPN((4, 6, 8), num_slices=1, out_channels=5).double()
    assert not any("reductions" in name for name, _ in neck.named_parameters())
    coarsest = maps(1)[2]
    zeros = [torch.zeros_like(x) for x in maps(1)[:2]]
    (output,) = neck([*zeros, coarsest])
    expected = F.conv2d(coarsest[:, :, 0], neck.laterals[2].weight)
    expected = expected.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


def test_another_depth_is_refused():
    for num_slices in (1, 3):
        neck = KeySliceFPN((4, 6, 8), num_slices=num_slices, out_channels=5).double()
        with pytest.raises(ValueError, match=f"num_slices={num_slices}, the volume has 7"):
            neck(maps(7))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_regions_are_pooled_from_where_they_lie(memory_format):
    """Found in training: heads on channels-last features saw scrambled regions."""
    neck = KeySliceFPN((4, 6, 8), 3, out_channels=5)
    features = [x.float().contiguous(memory_format=memory_format) for x in maps()]
    (output,) = neck(features)
    regions = torch.tensor([[0, 8.0, 16.0, 24.0, 40.0], [1, 0.0, 0.0, 64.0, 64.0]])
    pooled = RoIAlign(2, spatial_scale=0.25, sampling_ratio=2)(output, regions)
    torch.testing.assert_close(pooled[1, :, 0, 0], average(output[1], 0, 0, 32, 32))
    torch.testing.assert_close(pooled[0, :, 1, 1], average(output[0], 16, 28, 24, 40))


def average(feature, x1, y1, x2, y2):
    """Mean of 2 x 2 bilinear samples of (C, H, W) in a bin given in image pixels, stride 4."""
    samples = []
    for fy in (0.25, 0.75):
        for fx in (0.25, 0.75):
            x = (x1 + fx * (x2 - x1)) / 4 - 0.5
            y = (y1 + fy * (y2 - y1)) / 4 - 0.5
            x0, y0 = int(x), int(y)
            top = feature[:, y0, x0] * (1 - x + x0) + feature[:, y0, x0 + 1] * (x - x0)
            low = feature[:, y0 + 1, x0] * (1 - x + x0) + feature[:, y0 + 1, x0 + 1] * (x - x0)
            samples.append(top * (1 - y + y0) + low * (y - y0))
    return sum(samples) / 4


def test_norm_follows_each_lateral():
    neck = KeySliceFPN((4, 6, 8), 3, out_channels=5, norm_cfg=dict(type="BN")).double().eval()
    plain = KeySliceFPN((4, 6, 8), 3, out_channels=5).double()
    plain.load_state_dict(neck.state_dict(), strict=False)
    for norm in neck.norms:
        norm.weight.data.fill_(2.0)
        norm.running_var.fill_(1 - norm.eps)
    torch.testing.assert_close(neck(maps())[0], 2 * plain(maps())[0])


def test_gradients_numerically():
    neck = KeySliceFPN((2, 3), num_slices=3, out_channels=2).double()
    features = [x.requires_grad_() for x in maps(3, 1, (2, 3), 4)]
    assert torch.autograd.gradcheck(lambda *x: neck(x), features)


def test_other_number_of_slices_is_refused():
    with pytest.raises(ValueError, match=r"num_slices=3.*has 7 slices"):
        KeySliceFPN((4, 6, 8), num_slices=3)(maps(7))


@pytest.mark.parametrize("levels", [2, 4])
@pytest.mark.parametrize("kind", [KeySliceFPN, KeySliceLevels])
def test_another_number_of_maps_is_refused(kind, levels):
    """Three maps: with a level less the deepest was dropped, one more had no gradient."""
    neck = kind((4, 6, 8, 10)[:levels], num_slices=3, out_channels=4).double()
    expected = rf"built for {levels} maps.* given {'more' if levels == 2 else 'fewer'}"
    for features in (maps(), iter(maps())):
        with pytest.raises(ValueError, match=expected):
            neck(features)


def test_maps_that_come_one_at_a_time_are_let_go():
    neck = KeySliceFPN((4, 6, 8), num_slices=3, out_channels=5).double()
    alive = []

    with torch.no_grad():
        torch.testing.assert_close(neck(one_at_a_time(maps(), alive))[0], neck(maps())[0])
    assert len(alive) == 3
