"""Functional 2D calls on volumes, each against its 3D counterpart written out."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdet_ext.functional_3d import Functions3D, inflate_transposed
from mmdet_ext.image_shape import Extent, NoCounterpart, image_shape

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def never(*args, **kwargs):
    raise AssertionError("there is no convolution here")


X = randn(2, 4, 6, 8, 10)
Y = randn(2, 4, 3, 5, 7, seed=1)  # another map
EQUAL = randn(1, 6, 6, 8, 10)
SQUARE = X[..., :8]
ROW, GATE = randn(4, seed=2), randn(2, 4, seed=3)
KERNEL = randn(4, 3, 3, 3, seed=4)
LAST = X.permute(0, 2, 3, 4, 1)  # channels last
SLICE = X[:, :, 0]


def to_size_of(x, other):
    h, w = other.shape[-2:]
    return F.interpolate(x, size=(h, w))


def shuffle(x):
    b, c, h, w = x.size()
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def tokens_and_back(x):
    b, c, h, w = x.shape
    y = x.view(b, c, h * w).transpose(1, 2)
    return y.transpose(1, 2).reshape(b, c, h, w) + y.sum()


def expanded(x, gate):
    n, c, h, w = x.shape
    return gate.expand(n, c, h, w)


def repeated(x, gate):
    return gate.repeat(1, 1, *x.shape[2:])


def crop_to(x, other):
    return x[:, :, : other.shape[2], : other.size(3)]


def pad_to(x, other):
    """Of a U-Net whose maps differ by a pixel."""
    dy, dx = other.size()[2] - x.size()[2], other.size()[3] - x.size()[3]
    return F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])


def to_larger(x, other):
    """What `pad_to` is to give, along all three axes."""
    widths = []
    for axis in (4, 3, 2):
        more = other.shape[axis] - x.shape[axis]
        widths += [more // 2, more - more // 2]
    return F.pad(x, widths)


def double_by_int(x):
    return F.interpolate(x, size=[int(n * 2.0) for n in x.shape[-2:]])


# The call of a network's code, and what it is to give.
CALLS = {
    "max_pool2d": (lambda: F.max_pool2d(X, 2), lambda: F.max_pool3d(X, 2)),
    "max_pool2d, pairs": (
        lambda: F.max_pool2d(X, (3, 3), stride=(2, 2), padding=1, ceil_mode=True),
        lambda: F.max_pool3d(X, 3, 2, 1, ceil_mode=True),
    ),
    "torch.max_pool2d": (lambda: torch.max_pool2d(X, 2, 2), lambda: F.max_pool3d(X, 2, 2)),
    "max_pool2d with indices": (
        lambda: F.max_pool2d(X, 2, return_indices=True)[1],
        lambda: F.max_pool3d(X, 2, return_indices=True)[1],
    ),
    "max_unpool2d": (
        lambda: F.max_unpool2d(*F.max_pool2d(X, 2, return_indices=True), 2),
        lambda: F.max_unpool3d(*F.max_pool3d(X, 2, return_indices=True), 2),
    ),
    "avg_pool2d": (
        lambda: F.avg_pool2d(X, 3, 2, 1, count_include_pad=False),
        lambda: F.avg_pool3d(X, 3, 2, 1, count_include_pad=False),
    ),
    "avg_pool2d, own divisor": (
        lambda: F.avg_pool2d(X, kernel_size=2, divisor_override=2),
        lambda: F.avg_pool3d(X, 2, divisor_override=4),
    ),
    "avg_pool2d of the whole map": (
        lambda: F.avg_pool2d(X, X.shape[2:]),
        lambda: F.avg_pool3d(X, (6, 8, 10)),
    ),
    "lp_pool2d": (lambda: F.lp_pool2d(X, 2, 2), lambda: F.lp_pool3d(X, 2, 2)),
    "adaptive_avg_pool2d": (
        lambda: F.adaptive_avg_pool2d(input=X, output_size=(3, 3)),
        lambda: F.adaptive_avg_pool3d(X, 3),
    ),
    "adaptive_avg_pool2d to another map": (
        lambda: F.adaptive_avg_pool2d(X, Y.shape[-2:]),
        lambda: F.adaptive_avg_pool3d(X, (3, 5, 7)),
    ),
    "adaptive_max_pool2d": (
        lambda: F.adaptive_max_pool2d(X, 1), lambda: X.amax((2, 3, 4), keepdim=True)
    ),
    "interpolate bilinear": (
        lambda: F.interpolate(X, scale_factor=2, mode="bilinear", align_corners=True),
        lambda: F.interpolate(X, scale_factor=2, mode="trilinear", align_corners=True),
    ),
    "interpolate by a pair": (
        lambda: F.interpolate(X, scale_factor=(0.5, 0.5)),
        lambda: F.interpolate(X, scale_factor=0.5),
    ),
    "interpolate to another map": (
        lambda: F.interpolate(X, Y.shape[-2:], mode="bilinear"),
        lambda: F.interpolate(X, (3, 5, 7), mode="trilinear"),
    ),
    "interpolate to shape[2:]": (
        lambda: F.interpolate(X, size=Y.size()[2:]), lambda: F.interpolate(X, (3, 5, 7))
    ),
    "interpolate to h, w": (lambda: to_size_of(X, Y), lambda: F.interpolate(X, (3, 5, 7))),
    "interpolate to h * 2": (
        lambda: F.interpolate(X, (X.shape[2] * 2, 2 * X.shape[3])),
        lambda: F.interpolate(X, scale_factor=2),
    ),
    "interpolate to int(h * 2.0)": (
        lambda: double_by_int(X), lambda: F.interpolate(X, scale_factor=2)
    ),
    "interpolate a cube to a size": (
        lambda: F.interpolate(X[..., :6, :6], 4), lambda: F.interpolate(X[..., :6, :6], (4, 4, 4))
    ),
    "mean of all pixels": (lambda: X.mean((2, 3)), lambda: X.mean((2, 3, 4))),
    "mean, negative axes": (
        lambda: torch.mean(X, dim=[-1, -2], keepdim=True),
        lambda: X.mean((2, 3, 4), keepdim=True),
    ),
    "sum over channels and pixels": (lambda: X.sum((1, 2, 3)), lambda: X.sum((1, 2, 3, 4))),
    "mean of channels": (lambda: X.mean(1), lambda: X.mean(dim=1)),
    "max of channels": (lambda: X.max(1)[0], lambda: X.amax(1)),
    "mean of channels, negative axis": (
        lambda: X.mean(-3, keepdim=True), lambda: X.mean(dim=1, keepdim=True)
    ),
    "max over the batch, negative axis": (lambda: X.amax(-4), lambda: X.amax(0)),
    "channels' softmax, negative axis": (
        lambda: F.softmax(X, dim=-3), lambda: X.exp() / X.exp().sum(1, keepdim=True)
    ),
    "softmax, channels last": (
        lambda: LAST.softmax(3), lambda: LAST.exp() / LAST.exp().sum(4, keepdim=True)
    ),
    "concatenated channels": (lambda: torch.cat([X, X + 1], -3), lambda: torch.cat([X, X + 1], 1)),
    "half of the channels": (lambda: X.chunk(2, dim=-3)[1], lambda: X[:, 2:]),
    "any over pixels": (lambda: (X > 2).any(dim=(2, 3)), lambda: (X > 2).flatten(2).any(2)),
    "flipped": (lambda: X.flip(2, 3), lambda: X.flip((2, 3, 4))),
    "flipped, a tuple": (lambda: torch.flip(X, (-1, -2)), lambda: X.flip((2, 3, 4))),
    "pooled and squeezed, one axis each": (
        lambda: F.adaptive_avg_pool2d(X, 1).squeeze(-1).squeeze(-1), lambda: X.mean((2, 3, 4))
    ),
    "pooled and squeezed from behind": (
        lambda: X.mean((2, 3), keepdim=True).squeeze(3).squeeze(2), lambda: X.mean((2, 3, 4))
    ),
    "squeezed where it is longer": (lambda: X.squeeze(-1), lambda: X),
    "squeezed channel": (lambda: X[:, :1].squeeze(-3), lambda: X[:, 0]),
    "pool of the width": (
        lambda: F.avg_pool2d(SQUARE, SQUARE.size(3)), lambda: F.avg_pool3d(SQUARE, (6, 8, 8))
    ),
    "interpolate to twice the width": (
        lambda: F.interpolate(SQUARE, SQUARE.shape[-1] * 2),
        lambda: F.interpolate(SQUARE, (12, 16, 16)),
    ),
    "mean of all": (lambda: X.mean(), lambda: X.mean((0, 1, 2, 3, 4))),
    "norm, channels last": (
        lambda: LAST.norm(p=2, dim=(1, 2), keepdim=True),
        lambda: LAST.square().sum((1, 2, 3), keepdim=True).sqrt(),
    ),
    "axes of five": (lambda: X.amax((3, 4)), lambda: X.flatten(3).amax(3)),
    "flatten": (lambda: X.flatten(2), lambda: X.reshape(2, 4, 480)),
    "flatten the last two": (lambda: X.flatten(-2), lambda: X.reshape(2, 4, 480)),
    "flatten, channels last": (lambda: LAST.flatten(1, 2), lambda: LAST.reshape(2, 480, 4)),
    "to channels last": (lambda: X.permute(0, 2, 3, 1), lambda: LAST),
    "to channels first": (lambda: torch.permute(LAST, (0, 3, 1, 2)), lambda: X),
    "pixels first": (lambda: X.permute(2, 3, 0, 1), lambda: X.permute(2, 3, 4, 0, 1)),
    "pad": (
        lambda: F.pad(X, (1, 2, 1, 2), mode="replicate"),
        lambda: F.pad(X, (1, 2, 1, 2, 1, 2), mode="replicate"),
    ),
    "pad channels": (
        lambda: F.pad(X, (0, 0, 0, 0, 1, 3)),
        lambda: torch.cat([X[:, :1] * 0, X, X[:, :3] * 0], 1),
    ),
    "pad to another map": (lambda: pad_to(Y, X), lambda: to_larger(Y, X)),
    "every other pixel": (lambda: X[:, :, ::2, ::2], lambda: X[:, :, ::2, ::2, ::2]),
    "but the border, after channels": (
        lambda: X[:, ..., 1:-1, 1:-1], lambda: X[:, :, 1:-1, 1:-1, 1:-1]
    ),
    "the last three axes": (
        lambda: X[..., 1:, ::2, ::2], lambda: X[:, 1:, ::2, ::2, ::2]
    ),
    "batch and channels swapped": (lambda: X.transpose(0, 1), lambda: X.permute(1, 0, 2, 3, 4)),
    "but the border": (lambda: X[..., 1:-1, 1:-1], lambda: X[:, :, 1:-1, 1:-1, 1:-1]),
    "crop to another map": (lambda: crop_to(X, Y), lambda: X[:, :, :3, :5, :7]),
    "channels": (lambda: X[:, 1:3], lambda: X.narrow(1, 1, 2)),
    "gate": (
        lambda: X * GATE.view(2, 4, 1, 1), lambda: torch.einsum("ncdhw,nc->ncdhw", X, GATE)
    ),
    "gate, the other way round": (
        lambda: GATE[:, :, None, None] * X, lambda: torch.einsum("ncdhw,nc->ncdhw", X, GATE)
    ),
    "scale and shift": (
        lambda: ROW[:, None, None] * X + ROW.view(1, -1, 1, 1),
        lambda: torch.einsum("ncdhw,c->ncdhw", X + 1, ROW),
    ),
    "scale, channels last": (
        lambda: LAST * ROW.view(1, 1, 1, 4), lambda: torch.einsum("ndhwc,c->ndhwc", LAST, ROW)
    ),
    "gate, channels last": (
        lambda: LAST * GATE.view(2, 1, 1, 4), lambda: torch.einsum("ndhwc,nc->ndhwc", LAST, GATE)
    ),
    "drop path": (
        lambda: X * GATE[:, 0].view((2,) + (1,) * (X.ndim - 1)),
        lambda: torch.einsum("ncdhw,n->ncdhw", X, GATE[:, 0]),
    ),
    "expand_as": (
        lambda: GATE.view(2, 4, 1, 1).expand_as(X),
        lambda: GATE.view(2, 4, 1, 1, 1).expand(2, 4, 6, 8, 10),
    ),
    # As many channels as slices: not to be taken for each other.
    "expand a gate": (
        lambda: expanded(EQUAL, EQUAL[0, :, 0, 0, 0].view(1, 6, 1, 1)),
        lambda: EQUAL[:, :, :1, :1, :1].expand(-1, -1, 6, 8, 10),
    ),
    "expand a gate of channels": (
        lambda: expanded(EQUAL, EQUAL[0, :, 0, 0, 0].view(6, 1, 1)),
        lambda: EQUAL[:, :, :1, :1, :1].expand(-1, -1, 6, 8, 10),
    ),
    "repeat a gate": (
        lambda: repeated(EQUAL, EQUAL[0, :, 0, 0, 0].view(1, 6, 1, 1)),
        lambda: EQUAL[:, :, :1, :1, :1].expand(-1, -1, 6, 8, 10),
    ),
    "expand to h, w": (
        lambda: Y[:, :, :1, :1].expand(-1, -1, *X.shape[-2:]),
        lambda: Y[:, :, :1, :1, :1].expand(-1, -1, 6, 8, 10),
    ),
    "repeat": (lambda: X.repeat(1, 2, 1, 1), lambda: torch.cat([X, X], 1)),
    "zeros": (lambda: X.new_zeros(X.shape), lambda: torch.zeros_like(X)),
    "channel shuffle": (lambda: shuffle(X), lambda: F.channel_shuffle(X, 2)),
    "tokens": (lambda: tokens_and_back(X), lambda: X + X.sum()),
    "dimensions": (
        lambda: torch.tensor([X.ndim, X.dim(), len(X.shape)]), lambda: torch.tensor([4, 4, 4])
    ),
    "conv_transpose2d": (
        lambda: F.conv_transpose2d(X, KERNEL, stride=2, padding=1, output_padding=1),
        lambda: F.conv_transpose3d(X, inflate_transposed(KERNEL, 2, 1), None, 2, 1, 1),
    ),
    "images": (
        lambda: F.max_pool2d(SLICE, 2), lambda: F.max_pool3d(SLICE, (1, 2, 2))
    ),
    "tokens' mean": (lambda: X.flatten(2).mean(2), lambda: X.mean((2, 3, 4))),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_call_on_volumes_is_its_counterpart(call):
    of_images, of_volumes = CALLS[call]
    with Functions3D(never):
        got = of_images()
    torch.testing.assert_close(got, of_volumes(), rtol=0, atol=1e-12)


# Functions of two operands; in place where the name ends so.
OPERATIONS = [
    "add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "max", "min", "fmax",
    "fmin", "gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_xor",
    "floor_divide", "remainder", "fmod", "atan2", "hypot", "xlogy", "logaddexp", "copy_", "mul_",
    "add_", "sub_", "div_", "clamp_", "__iadd__", "__imul__", "__isub__", "__itruediv__",
    "__rpow__", "__rsub__", "__floordiv__",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_gate_beside_a_volume_is_of_channels_even_if_there_are_as_many_slices(name):
    x = EQUAL.abs() + 0.5
    gate = x[:, :, 2, 3, 4].view(1, 6, 1, 1)
    whole = gate[..., None].expand_as(x).contiguous()
    expected = getattr(x.clone(), name)(whole)
    of_module = getattr(torch, name, None)
    with Functions3D(never):
        got = [getattr(x.clone(), name)(gate)]
        if not name.endswith("_") and of_module is not None:
            got.append(of_module(x, other=gate) if name == "add" else of_module(x, gate))
    for result in got:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_a_mask_of_channels():
    x = EQUAL.clone()
    mask = EQUAL[:, :, 2, 3, 4].view(1, 6, 1, 1) > 0
    whole = mask[..., None].expand_as(x)
    with Functions3D(never):
        got = x.masked_fill(mask, 7.0), (x > 1) & mask, torch.clamp(x, min=mask.double())
    torch.testing.assert_close(got[0], torch.where(whole, 7.0, x))
    assert torch.equal(got[1], (x > 1) & whole)
    torch.testing.assert_close(got[2], torch.maximum(x, whole.double()))


def test_dropout2d_drops_whole_channels_of_volumes():
    torch.manual_seed(0)
    with Functions3D(never):
        dropped = F.dropout2d(torch.ones(8, 16, 3, 4, 5), 0.5)
    of_channel = dropped.flatten(2)
    assert (of_channel == of_channel[..., :1]).all() and 0.3 < (dropped == 0).float().mean() < 0.7


def test_parts_of_the_channels():
    with Functions3D(never):
        got = X.select(1, 2), X.narrow(1, 1, 2), X.unbind(1)[3], X.topk(2, dim=1).values
    expected = X[:, 2], X[:, 1:3], X[:, 3], X.sort(1, descending=True).values[:, :2]
    for one, wanted in zip(got, expected, strict=True):
        assert torch.equal(one, wanted)


def test_in_place_on_part_of_a_map():
    x = X.clone()
    with Functions3D(never):
        x[:, :, ::2, ::2] = 0.0
        x[:, :, 1:, 1:].mul_(GATE.view(2, 4, 1, 1))
    expected = X.clone()
    expected[:, :, ::2, ::2, ::2] = 0.0
    expected[:, :, 1:, 1:, 1:] *= GATE.view(2, 4, 1, 1, 1)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: F.max_pool2d(X, (1, 2)), "is 1 along height and 2 along width"),
        (lambda: F.avg_pool2d(X, (2, 1)), "kernel_size is 2 along height"),
        (lambda: F.pad(X, (1, 1)), "padding"),
        (lambda: F.pad(X, (1, 1, 2, 2)), "padding is 2 along height and 1 along width"),
        (lambda: F.interpolate(X, size=(16, 16)), "nothing says how deep"),
        (lambda: F.interpolate(X, size=16), "nothing says how deep"),
        (lambda: F.interpolate(X, scale_factor=(1, 2)), "scale_factor"),
        (lambda: F.interpolate(X, scale_factor=2, mode="bicubic"), "mode='bicubic'"),
        (lambda: F.interpolate(X, scale_factor=0.5, mode="bilinear", antialias=True), "antialias"),
        (lambda: X.mean(2), "one alone"),
        (lambda: X.sum(-1), "one alone"),
        (lambda: X.amax((1, 3)), "one alone"),
        (lambda: X.permute(0, 1, 3, 2), "nothing says where depth goes"),
        (lambda: X.softmax(2), "one alone"),
        (lambda: X.flip(-1), "one alone"),
        (lambda: torch.cat([X, X], 2), "one alone"),
        (lambda: X.select(2, 0), "one alone"),
        (lambda: X.narrow(-1, 0, 2), "one alone"),
        (lambda: torch.unbind(X, dim=3), "one alone"),
        (lambda: X.index_select(2, torch.tensor([0, 1])), "one alone"),
        (lambda: X.sort(dim=2), "one alone"),
        (lambda: X.topk(2, dim=3), "one alone"),
        (lambda: X.transpose(2, 3), "nothing says where depth goes"),
        (lambda: X[:, :, 1:, :-1], "an index is"),
        (lambda: X[:, :, 0], "an index is 0 along height"),
        (lambda: X[:, :, 1:], "an index is"),
        (lambda: LAST[:, ::2, ::2], "an index is"),
        (lambda: X[..., :1].squeeze(-1), "6 deep"),
        (lambda: F.adaptive_avg_pool2d(X, X.size(3)), "10 of a map of 8 x 10"),
        (lambda: X + randn(8, 10), "a table of an image's pixels"),
        (lambda: torch.fft.hfft2(X), "fft_hfft2 has no counterpart"),
        (lambda: torch.fft.fft2(X), "fft_fft2 has no counterpart"),
        (lambda: X + randn(1, 4, 8, 10), "a table of an image's pixels"),
        (lambda: F.pixel_shuffle(X, 2), "pixel_shuffle has no counterpart"),
        (lambda: F.conv_transpose2d(X, randn(4, 2, 1, 3)), "1 x 3"),
    ],
)
def test_what_has_no_counterpart_is_refused(call, message):
    with Functions3D(never), pytest.raises(NoCounterpart, match=message):
        call()


SWAPS = {
    "both from the end": lambda x: x.transpose(-1, -2),
    "one from the end": lambda x: x.transpose(x.ndim - 2, -1),
    "named": lambda x: torch.transpose(x, dim0=-2, dim1=-1),
    "swapaxes": lambda x: x.swapaxes(-2, -1),
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "adjoint": lambda x: x.adjoint(),
}


def knowing(*maps):
    """Functions3D that has met these maps, each with the place of its depth."""
    functions = Functions3D(never)
    for x, place in maps:
        functions.record(x, place)
    return functions


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
@pytest.mark.parametrize(
    "x, place", [(X, 2), (X[0], 1), (LAST, 1)], ids=["map", "one sample", "channels last"]
)
def test_one_spatial_axis_of_a_map_is_never_swapped_silently(x, place, swap):
    with knowing((x, place)), pytest.raises(NoCounterpart, match="nothing says where depth goes"):
        swap(x)


@pytest.mark.parametrize("swap", [s for s in SWAPS if s != "one from the end"])
@pytest.mark.parametrize("shape", [(2, 2, 480, 4), (2, 3, 2, 480, 4)], ids=["image", "windows"])
def test_the_matrices_of_attention_are_transposed(shape, swap):
    """(B, heads, N, c), and (B, windows, heads, N, c), which has as many axes as a volume."""
    tokens = randn(*shape)
    with knowing((X, 2), (LAST, 1)):
        got = SWAPS[swap](tokens)
    assert torch.equal(got, torch.einsum("...nc->...cn", tokens))


def test_batch_and_channels_are_swapped_by_negative_axes_too():
    with knowing((X, 2)):
        got = X.transpose(-3, -4)
    assert torch.equal(got, X.permute(1, 0, 2, 3, 4))


CUBE = EQUAL[..., :6, :6]
SIX = randn(6, 6, seed=5)
LAST_AXES = {
    "linear": lambda x: F.linear(x, SIX),
    "@": lambda x: x @ SIX,
    "@, the other way round": lambda x: SIX @ x,
    "matmul": lambda x: torch.matmul(x, other=SIX),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "layer_norm of a plane": lambda x: F.layer_norm(x, normalized_shape=(6, 6)),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "fft": lambda x: torch.fft.rfft(x),
    "tril": lambda x: x.tril(),
    "cdist": lambda x: torch.cdist(x, x),
    "linalg.matrix_norm": lambda x: torch.linalg.matrix_norm(x),
    "linalg.det": lambda x: torch.linalg.det(x),
    "inverse": lambda x: x.inverse(),
}


@pytest.mark.parametrize("call", LAST_AXES.values(), ids=LAST_AXES)
def test_what_acts_on_the_last_axes_is_refused_where_they_are_height_and_width(call):
    with knowing((CUBE, 2)), pytest.raises(NoCounterpart, match="acts on the last axes of a map"):
        call(CUBE)


@pytest.mark.parametrize("call", LAST_AXES.values(), ids=LAST_AXES)
@pytest.mark.parametrize("known", [[(LAST, 1)], []], ids=["channels last", "no map"])
def test_what_acts_on_the_last_axes_stays_where_they_may_be_others(call, known):
    """`CUBE` itself is not among the maps that were met."""
    with knowing(*known):
        got = call(CUBE)
    assert torch.equal(got, call(CUBE))


def test_layer_norm_of_channels_last_and_of_whole_maps():
    with knowing((LAST, 1)):
        of_channels = F.layer_norm(LAST, (4,)), F.linear(LAST, SIX[:, :4])
    assert torch.equal(of_channels[0], F.layer_norm(LAST, (4,)))
    expected = torch.einsum("ndhwc,oc->ndhwo", LAST, SIX[:, :4])
    torch.testing.assert_close(of_channels[1], expected, rtol=0, atol=1e-12)
    with knowing((X, 2)):
        whole = F.layer_norm(X, X.shape[1:]), F.layer_norm(X, X.shape[2:])
    assert torch.equal(whole[0], F.layer_norm(X, (4, 6, 8, 10)))
    assert torch.equal(whole[1], F.layer_norm(X, (6, 8, 10)))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_transposed_convolution_answers_equal_slices_as_one_image(size, stride, dilation):
    """Away from the ends; slices that no tap reaches hold nothing."""
    weight, image = randn(3, 2, size, size), randn(2, 3, 4, 5)
    depth = 11
    got = F.conv_transpose3d(
        image[:, :, None].expand(-1, -1, depth, -1, -1),
        inflate_transposed(weight, stride, dilation), None, stride, dilation=dilation,
    )  # fmt: skip
    expected = F.conv_transpose2d(image, weight, stride=stride, dilation=dilation)
    reached = {dilation * j % stride for j in range(size)}
    reach = dilation * (size - 1)
    for d in range(reach, stride * (depth - 1) + 1):
        wanted = expected if d % stride in reached else torch.zeros_like(expected)
        torch.testing.assert_close(got[:, :, d], wanted, rtol=0, atol=1e-12)


def test_an_extent_knows_its_volume_through_computation():
    _, _, h, w = image_shape(torch.Size((2, 4, 6, 8, 10)))
    assert (int(h), int(w), h * w, w * h) == (8, 10, 480, 480)
    assert (2 * 4 * h * w, (h * 2) * (w * 2)) == (2 * 4 * 480, 8 * 480)
    half = (h + 1) // 2 - 1
    assert isinstance(half, Extent) and half.plain == 3 and half.volume == (2, 3, 4)
    assert type(h - w) is int and h - w == -2
    assert (h % 4).volume == (2, 0, 2)
    assert (-(-h // 3)).volume == (2, 3, 4) == math.ceil(h / 3).volume  # rounded up
    assert ((12 - h) % 5).volume == (1, 4, 2)
    assert (h / 4).volume == (1.5, 2, 2.5) and round(h / 4).volume == (2, 2, 2)
    assert (h**0.5).volume == (6**0.5, 8**0.5, 10**0.5)
    assert copy.deepcopy(h).volume == pickle.loads(pickle.dumps(h)).volume == (6, 8, 10)


def test_what_depth_would_answer_otherwise_is_refused():
    _, _, h, w = image_shape(torch.Size((2, 4, 6, 8, 10)))
    other = image_shape(torch.Size((2, 4, 7, 8, 10)))
    assert h > 5 and not h < 5 and h != 7 and h % 2 == 0 and max(h - 3, 0).volume == (3, 5, 7)
    # Not the same volumes, even if their planes are.
    assert h != other[2] and image_shape(torch.Size((2, 4, 6, 8, 10)))[2:] == (h, w)
    for question in (
        lambda: h == 8, lambda: h > 7, lambda: bool(h % 4), lambda: max(h - 8, 0), lambda: float(h),
        lambda: (h // 2) * (w // 4), lambda: h >= other[2],
    ):  # fmt: skip
        with pytest.raises(NoCounterpart):
            question()


def test_the_number_of_pixels_is_that_of_voxels_however_it_is_computed():
    shape = image_shape(torch.Size((2, 4, 6, 8, 10)))
    counts = shape[2:].numel(), math.prod(shape[2:]), np.prod(shape[2:])
    assert counts == (480, 480, 480)
    assert np.asarray(shape[2:]).dtype == np.int64
    assert (shape.numel(), math.prod(shape)) == (8 * 480, 8 * 480)


def test_the_mode_is_over_after_an_error():
    with pytest.raises(NoCounterpart), Functions3D(never):
        X.mean(2)
    assert X.mean(2).shape == (2, 4, 8, 10)
