"""3 x 3 convolutions by Winograd's algorithm against torch's, and where they are taken."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdet_ext.models import winograd
from mmdet_ext.models.winograd import InferenceConv2d, conv3x3, use_inference_conv


def tensors(batch, channels, outputs, height, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator, dtype=dtype)
    return x, weight / 3, torch.randn(outputs, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 5, 8, 8), (2, 4, 3, 4, 4), (2, 4, 3, 1, 1), (1, 2, 2, 3, 9), (3, 1, 1, 17, 6),
        (2, 8, 6, 40, 70),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tiles", [1, 5, 256])
def test_equal_to_a_plain_convolution(shape, tiles, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)
    x, weight, bias = tensors(*shape, dtype=torch.float64)
    for b in (bias, None):
        expected = F.conv2d(x, weight, b, padding=1)
        for memory in (torch.contiguous_format, torch.channels_last):
            found = conv3x3(x.contiguous(memory_format=memory), weight, b)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_rounding_is_a_few_times_that_of_the_plain_sum():
    x, weight, bias = tensors(1, 256, 64, 24, 24)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    error = (conv3x3(x, weight, bias) - exact).abs().max()
    assert error < 2e-5 * exact.abs().max()
    # Term by term: how a library orders its sum, and so its error, depends on the processor.
    taps = F.unfold(x, 3, padding=1)[0]
    terms = weight.flatten(1)
    plain = bias[:, None].expand(-1, taps.shape[1]).clone()
    for i in range(len(taps)):
        plain += terms[:, i : i + 1] * taps[i]
    assert error < 10 * (plain.view_as(exact) - exact).abs().max()


def wide(**options):
    torch.manual_seed(0)
    layer = nn.Sequential()
    layer.conv = nn.Conv2d(256, 256, 3, **{"padding": 1, **options})
    return layer


def test_a_wide_layer_is_replaced_and_keeps_its_parameters():
    layer = wide()
    plain, state = copy.deepcopy(layer), torch.get_rng_state()
    use_inference_conv(layer, "conv")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(layer.conv) is InferenceConv2d
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert all(p.device.type == "cpu" and p.requires_grad for p in layer.parameters())
    x, *_ = tensors(1, 256, 1, 64, 64)
    with torch.no_grad():
        expected = plain(x)
        assert layer.conv.is_faster(x)
        found = layer(x)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    # Where autograd records, and of small maps, it is torch's.
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        small = x[:, :, :60]
        assert torch.equal(layer(small), plain(small))
        assert not layer.conv.is_faster(x.to("meta"))
        assert not layer.conv.is_faster(x.double())
        with torch.autocast("cpu"):
            assert not layer.conv.is_faster(x)


@pytest.mark.parametrize(
    "options",
    [
        dict(stride=2), dict(padding=0), dict(dilation=2, padding=2), dict(groups=2),
        dict(padding_mode="reflect"),
    ],
)  # fmt: skip
def test_other_convolutions_stay(options):
    layer = wide(**options)
    use_inference_conv(layer, "conv")
    assert type(layer.conv) is nn.Conv2d


def test_narrow_layers_layers_of_another_class_and_none_stay():
    class Custom(nn.Conv2d):
        pass

    layer = nn.Module()
    layer.narrow, layer.custom = nn.Conv2d(128, 256, 3, padding=1), Custom(256, 256, 3, padding=1)
    for name in ("narrow", "custom", "nothing"):
        use_inference_conv(layer, name)
    assert type(layer.narrow) is nn.Conv2d and type(layer.custom) is Custom
