"""Code written for images, as networks have it in their forward, run on volumes by a converted
network: each against the same written for volumes, with an odd depth beside even sides."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmdet.models.backbones import EfficientNet
from torch import nn

from mmdet_ext.convert import convert_to_3d


class Code(nn.Module):
    """A network that is a function of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.function(x)


def on_volumes(model):
    return convert_to_3d(model, "ACSConv", depth="isotropic")


X = torch.randn(2, 4, 7, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROW = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MAP, MAPS = (1, 2, 3), (2, 3, 4)


def group_norm(x):
    b, c, h, w = x.shape
    y = x.view(b, 2, c // 2, h, w)
    mean, var = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), keepdim=True, unbiased=False)
    return ((y - mean) / (var + 1e-5).sqrt()).view(b, c, h, w)


def divided_by_group_std(x):
    b, c, h, w = x.shape
    y = x.reshape(b, 2, c // 2, h, w)
    std = y.var(dim=(2, 3, 4), unbiased=False, keepdim=True).sqrt()
    return x / std.expand(y.shape).reshape(b, c, h, w)


def padded_to_a_multiple(x):
    h, w = x.shape[-2:]
    return F.pad(x, (0, (5 - w % 5) % 5, 0, (5 - h % 5) % 5))


def padded_by_ceil(x):
    h, w = x.shape[-2:]
    return F.pad(x, (0, math.ceil(w / 5) * 5 - w, 0, math.ceil(h / 5) * 5 - h))


def spatial_attention(x):
    m = x.abs().mean(1)
    return x * (m / m.sum((1, 2), keepdim=True)).unsqueeze(1)


def as_large_as_before(x):
    y = F.max_pool2d(x, 2, ceil_mode=True)
    return F.interpolate(y, size=tuple(int(n) for n in x.shape[2:]))


def layer_norm_and_crop_with_channels_last(x):
    y = x.permute(0, 2, 3, 1)
    b, h, w, c = y.shape
    y = (y - y.mean(-1, keepdim=True)) * ROW
    y = F.pad(y, (0, 0, 0, 1, 0, 1))[:, :h, :w, :].reshape(b, h * w, c).view(b, h, w, c)
    return y.permute(0, 3, 1, 2)


def assigned(x):
    y = x.clone()
    y[:, :, ::2, ::2] = ROW[None, :, None, None]
    return y


def assigned_in_volumes(x):
    y = x.clone()
    y[:, :, ::2, ::2, ::2] = ROW.view(1, 4, 1, 1, 1)
    return y


CODE = {
    "group norm by hand": (group_norm, lambda x: F.group_norm(x, 2)),
    "deviation of groups": (
        divided_by_group_std,
        lambda x: x / x.view(2, 2, -1).std(2, correction=0).repeat_interleave(2, 1).view(
            2, 4, 1, 1, 1
        ),
    ),
    "padded to a multiple": (padded_to_a_multiple, lambda x: F.pad(x, (0, 2, 0, 2, 0, 3))),
    "padded by ceil": (padded_by_ceil, lambda x: F.pad(x, (0, 2, 0, 2, 0, 3))),
    "spatial attention": (
        spatial_attention,
        lambda x: x * (x.abs().mean(1) / x.abs().mean(1).sum(MAP, keepdim=True))[:, None],
    ),
    "as large as before": (
        as_large_as_before,
        lambda x: F.interpolate(F.max_pool3d(x, 2, ceil_mode=True), size=(7, 8, 8)),
    ),
    "channels last": (
        layer_norm_and_crop_with_channels_last,
        lambda x: (x - x.mean(1, keepdim=True)) * ROW.view(4, 1, 1, 1),
    ),
    "image by image": (
        lambda x: torch.stack([F.max_pool2d(image, 2) for image in x]),
        lambda x: F.max_pool3d(x, 2),
    ),
    "a sample's mean": (lambda x: x[0].mean((1, 2)), lambda x: x[0].mean(MAP)),
    "a channel's mean": (lambda x: x[:, 0].mean((-2, -1)), lambda x: x[:, 0].mean(MAP)),
    "pooled labels": (
        lambda x: F.max_pool2d((x.argmax(1) > 1).double(), 3, 1, 1),
        lambda x: F.max_pool3d((x.argmax(1) > 1).double(), 3, 1, 1),
    ),
    "of two maps the larger": (
        lambda x: torch.stack([x, x + 1], 1).amax((3, 4)), lambda x: (x + 1).amax(MAPS)[:, None]
        .expand(-1, 2, -1) - torch.tensor([1.0, 0.0], dtype=x.dtype).view(1, 2, 1),
    ),
    "shifted": (
        lambda x: torch.roll(x, shifts=(1, 1), dims=(2, 3)), lambda x: x.roll((1, 1, 1), MAPS)
    ),
    "tiled": (lambda x: x.tile(1, 1, 2, 2), lambda x: x.repeat(1, 1, 2, 2, 2)),
    "tiled, the last two": (lambda x: x.tile(2, 2), lambda x: x.repeat(1, 1, 2, 2, 2)),
    "sum without nan": (lambda x: x.nansum((2, 3)), lambda x: x.sum(MAPS)),
    "special.logsumexp": (
        lambda x: torch.special.logsumexp(x, (2, 3)), lambda x: x.exp().sum(MAPS).log()
    ),
    "an axis more before the pixels": (
        lambda x: x[:, None, :, ::2, ::2], lambda x: x[:, None, :, ::2, ::2, ::2]
    ),
    "mean by the number of pixels": (
        lambda x: x.sum((2, 3)) / x.shape[2:].numel(), lambda x: x.mean(MAPS)
    ),
    "assigned": (assigned, assigned_in_volumes),
    "unflattened channels": (
        lambda x: nn.Unflatten(-3, (2, 2))(x).mean((-1, -2)), lambda x: x.mean(MAPS).view(2, 2, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_code_for_images_does_on_volumes_what_code_for_volumes_does(name):
    of_images, of_volumes = CODE[name]
    got = on_volumes(Code(of_images))(X)
    torch.testing.assert_close(got, of_volumes(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: x.sum((2, 3)) / x.shape[2] / x.shape[3], r"div with a map's height .* h \* w"),
        (lambda x: F.max_pool2d(x, 2) if x.shape[2] % 2 else x, "the truth of a map's height"),
        (lambda x: F.interpolate(x, size=(32, 32)), "nothing says how deep"),
        (lambda x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[2] // 2, 2, 4, 2, 4), "one alone"),
        (lambda x: x.flatten(2).view(2, 4, -1, x.shape[3]), "one alone is a size"),
        (lambda x: x + torch.arange(8.0).view(1, 1, 1, 8), "a table of an image's pixels"),
        (lambda x: x + torch.arange(8.0), "a table of an image's pixels"),
        (lambda x: x[:, :, [0, 2]], "an index by a tensor"),
        (lambda x: x[:, :, torch.tensor([0, 2])][:, :, :, torch.tensor([0, 2])], "by a tensor"),
        (lambda x: x[:, :, torch.ones(8, 8, dtype=torch.bool)], "by a tensor"),
        (lambda x: x[..., None], "behind height and width"),
        (lambda x: x.unsqueeze(-1), "behind height and width"),
        (lambda x: torch.stack([x, x], 3), "behind height and width"),
        (lambda x: x.unfold(2, 2, 2), "unfold of a map with whole numbers"),
        (lambda x: x.movedim(1, 3), "movedim of a map"),
        (lambda x: torch.fft.fftn(x, dim=(-2, -1)), "fft_fftn of a map with dim"),
        (lambda x: torch.rot90(x, k=1, dims=[2, 3]), "rot90 has no counterpart"),
        (lambda x: x.repeat_interleave(2, 2), "one alone"),
        (lambda x: x.cummax(2), "one alone"),
        (lambda x: x.diff(dim=2), "one alone"),
        (lambda x: x.sort(), "one alone"),
        (lambda x: x.mean((1, 2)), "one alone"),
        (lambda x: nn.Softmin(dim=-1)(x), "one alone"),
        (lambda x: x.permute(0, 2, 3, 1)[..., :1, :], "an index is"),
    ],
)  # fmt: skip
def test_what_says_nothing_of_depth_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        on_volumes(Code(function))(X)


@pytest.mark.parametrize("sides", [(8, 7, 7), (7, 8, 8), (9, 8, 7)])
def test_padding_that_depends_on_the_size(sides):
    """mmcv's, as TensorFlow pads: by what a side of this length needs."""
    conv = Conv2dAdaptivePadding(4, 3, 3, stride=2).double()
    x = torch.randn(1, 4, *sides, dtype=torch.float64)
    widths = []
    for n in reversed(sides):
        more = (math.ceil(n / 2) - 1) * 2 + 3 - n
        widths += [more // 2, more - more // 2]
    network = convert_to_3d(conv, "SliceConv", in_channels=4, depth="isotropic")
    weight = conv.weight.new_zeros(3, 4, 3, 3, 3)
    weight[:, :, 1] = conv.weight.detach()
    expected = F.conv3d(F.pad(x, widths), weight, conv.bias, stride=2)
    torch.testing.assert_close(network(x), expected)


def test_mmdets_efficientnet_has_the_size_of_each_side():
    model = EfficientNet("b0", out_indices=(2, 3, 4, 5))
    model.eval()
    network = convert_to_3d(model, "ACSConv", depth="isotropic")
    with torch.no_grad():
        sizes = {n: [y.shape[-1] for y in model(torch.zeros(1, 3, n, n))] for n in (32, 33)}
        for depth, side in ((32, 33), (33, 32)):
            maps = network(torch.zeros(1, 1, depth, side, side))
            assert [tuple(y.shape[2:]) for y in maps] == [
                (d, n, n) for d, n in zip(sizes[depth], sizes[side])
            ]


def test_padding_that_differs_along_the_axes_is_refused_whatever_the_mode():
    for mode in ("zeros", "reflect", "circular"):
        conv = nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode=mode)
        with pytest.raises(ValueError, match="padding is 1 along height and 2 along width"):
            convert_to_3d(conv, "ACSConv", in_channels=4, depth="isotropic")


def test_a_users_hook_is_code_for_images():
    def gate(module, args, output):
        return output * output.mean((2, 3), keepdim=True)

    norm = nn.BatchNorm2d(4).double().eval()
    norm.register_forward_hook(gate)
    got = on_volumes(norm)(X)
    y = X / math.sqrt(1 + norm.eps)
    torch.testing.assert_close(got, y * y.mean(MAPS, keepdim=True))


def test_code_goes_on_for_images_after_an_error_that_was_caught():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.MaxPool2d(16)

        def forward(self, x):
            try:
                return self.pool(x)
            except RuntimeError:
                return x * x.mean((2, 3), keepdim=True)

    torch.testing.assert_close(on_volumes(Pool())(X), X * X.mean(MAPS, keepdim=True))
