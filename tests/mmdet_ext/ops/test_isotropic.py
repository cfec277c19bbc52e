"""Operators with depth='isotropic': stride, padding and dilation along all three axes.

The oracle is a dense K x K x K kernel that holds the 2D kernel in its middle plane, convolved
position by position.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.twins import shift
from mmdet_ext.ops import OPERATORS, A3DConv, AlignShiftConv, SliceConv, build_conv3d, conv_depth

from .users_operators import CentredConv

DOUBLE = torch.float64
OPERATORS_3D = [name for name, kind in OPERATORS.items() if not kind.keeps_depth]
every_operator = pytest.mark.parametrize("name", OPERATORS_3D)


def volume(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def make(name, *args, **kwargs):
    """An operator of random parameters in float64."""
    torch.manual_seed(0)
    conv = build_conv3d(name, *args, depth="isotropic", **kwargs).double()
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    return conv


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def in_cube(weight, view):
    """The K x K kernel in the middle axial, coronal or sagittal plane of a K x K x K one."""
    size = weight.shape[-1]
    kernel = weight.new_zeros(*weight.shape[:2], size, size, size)
    kernel.select(2 + view, (size - 1) // 2).copy_(weight)
    return kernel


def dense(conv):
    """The K x K x K kernel of a whole operator; None where it is more than one convolution."""
    name, weight = type(conv).__name__, conv.weight
    if name in ("SliceConv", "TSMConv"):
        return in_cube(weight, 0)
    if name == "I3DConv":
        return weight
    if name == "ACSConv":
        thirds = weight.tensor_split(3)
        return torch.cat([in_cube(part, view) for view, part in enumerate(thirds)])
    if name in ("MeanACSConv", "SoftACSConv"):
        shares = weight.new_full((len(weight), 3), 1 / 3)
        if getattr(conv, "view_weight", None) is not None:
            shares = conv.view_weight.softmax(1)
        return sum(shares[:, v].view(-1, 1, 1, 1, 1) * in_cube(weight, v) for v in range(3))
    return None


def loop(x, kernel, bias, stride, padding, dilation, groups=1):
    """Conv3d, one output position after another; geometry (depth, height, width)."""
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel.shape[2:], stride)
    ]
    out = x.new_zeros(len(x), len(kernel), *sizes)
    inputs, outputs = x.shape[1] // groups, len(kernel) // groups
    for place in itertools.product(*map(range, sizes)):
        for tap in itertools.product(*map(range, kernel.shape[2:])):
            at = [i * s - p + t * d for i, s, p, t, d in zip(place, stride, padding, tap, dilation)]
            if not all(0 <= a < n for a, n in zip(at, x.shape[2:])):
                continue
            for g in range(groups):
                o = slice(g * outputs, (g + 1) * outputs)
                voxels = x[(slice(None), slice(g * inputs, (g + 1) * inputs), *at)]
                out[(slice(None), o, *place)] += voxels @ kernel[(o, slice(None), *tap)].T
    return out if bias is None else out + bias.view(-1, 1, 1, 1)


# In and out channels, the volume's size, and the convolution's options.
GEOMETRIES = {
    "3x3x3": (4, 5, (4, 5, 6), dict(kernel_size=3, padding=1)),
    "1x1x1": (5, 4, (3, 4, 5), dict(kernel_size=1)),
    "1x1x1 strided, padded": (3, 3, (4, 5, 4), dict(kernel_size=1, stride=2, padding=1)),
    "strided": (6, 4, (5, 6, 7), dict(kernel_size=3, stride=2, padding=1, bias=False)),
    "stride 3": (2, 4, (8, 7, 9), dict(kernel_size=3, stride=3, padding=1)),
    "not padded": (3, 6, (4, 5, 5), dict(kernel_size=3)),
    "padded by more": (3, 4, (2, 3, 3), dict(kernel_size=3, padding=2)),
    "dilated": (3, 4, (5, 6, 5), dict(kernel_size=3, padding=2, dilation=2)),
    "strided, dilated": (3, 4, (7, 6, 8), dict(kernel_size=3, stride=2, padding=2, dilation=2)),
    "dilated, not padded": (2, 3, (5, 6, 7), dict(kernel_size=3, dilation=2)),
    "depthwise": (6, 6, (4, 5, 4), dict(kernel_size=3, padding=1, groups=6)),
    "depthwise, strided": (3, 6, (5, 4, 5), dict(kernel_size=3, stride=2, padding=1, groups=3)),
    "even": (3, 4, (4, 5, 6), dict(kernel_size=2, stride=2)),
    "even, dilated": (3, 4, (4, 5, 6), dict(kernel_size=2, dilation=2, padding=1)),
    "large": (2, 4, (4, 5, 6), dict(kernel_size=5, stride=2, padding=2)),
    "one slice": (4, 5, (1, 4, 5), dict(kernel_size=3, padding=1)),
    "unequal": (
        3, 4, (6, 5, 7),
        dict(kernel_size=3, stride=(2, 1, 3), padding=(0, 1, 2), dilation=(1, 2, 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("geometry", ["strided, dilated", "depthwise, strided", "even", "unequal"])
@torch.no_grad()
def test_the_dense_kernel_is_what_a_loop_computes(geometry):
    """F.conv3d, the oracle of the tests below, by the definition."""
    channels, outputs, shape, options = GEOMETRIES[geometry]
    conv = make("ACSConv", channels, outputs, **options)
    x, kernel = volume(1, channels, *shape), dense(conv)
    where = (conv.stride, conv.padding, conv.dilation, conv.groups)
    assert_same(F.conv3d(x, kernel, conv.bias, *where), loop(x, kernel, conv.bias, *where))


@every_operator
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_operator_and_its_gradients_equal_the_dense_kernel(name, geometry):
    channels, outputs, shape, options = GEOMETRIES[geometry]
    conv = make(name, channels, outputs, **options)
    x = volume(2, channels, *shape).requires_grad_()
    where = (conv.stride, conv.padding, conv.dilation, conv.groups)
    got = conv(x)
    if name == "P3DConv":
        expected = p3d(conv, x)
    else:
        y = shift(conv, x, zero_padding=True) if name == "TSMConv" else x
        expected = F.conv3d(y, dense(conv), conv.bias, *where)
    assert_same(got, expected)
    probe = volume(*got.shape, seed=1)
    variables = [x, *conv.parameters()]
    gradients = torch.autograd.grad((got * probe).sum(), variables)
    wanted = torch.autograd.grad((expected * probe).sum(), variables)
    for a, b in zip(gradients, wanted):
        assert_same(a, b)


def p3d(conv, x):
    """In-plane first, all slices kept; then along depth, as the dense kernel reaches."""
    (step, *stride), (rate, *dilation), (front, *padding) = (
        conv.stride, conv.dilation, conv.padding
    )  # fmt: skip
    y = F.conv3d(
        x, conv.weight[:, :, None], conv.bias, (1, *stride), (0, *padding), (1, *dilation),
        conv.groups,
    )  # fmt: skip
    if conv.kernel_size == (1, 1):
        front = front + rate  # three taps where a dense kernel has one
    return F.conv3d(
        y, conv.depth_weight, None, (step, 1, 1), (front, 0, 0), (rate, 1, 1), conv.groups
    )


@pytest.mark.parametrize("name", ["MeanACSConv", "SoftACSConv", "I3DConv", "SliceConv"])
def test_groups(name):
    conv = make(name, 4, 6, kernel_size=3, stride=2, padding=1, groups=2)
    x = volume(2, 4, 5, 4, 6)
    assert_same(conv(x), F.conv3d(x, dense(conv), conv.bias, 2, 1, 1, 2))


@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (3, 2), (2, 1), (4, 3)])
def test_padding_same_keeps_all_sizes_and_lies_as_torch_has_it(kernel_size, dilation):
    x = volume(1, 3, 5, 6, 7)
    options = dict(kernel_size=kernel_size, padding="same", dilation=dilation)
    for name in OPERATORS_3D:
        assert make(name, 3, 4, **options)(x).shape == (1, 4, 5, 6, 7)
    conv = make("I3DConv", 3, 4, **options)
    reference = F.conv3d(x, conv.weight, conv.bias, padding="same", dilation=dilation)
    assert_same(conv(x), reference)


# --- Laws ---


@pytest.mark.parametrize("name", ["MeanACSConv", "I3DConv"])
@pytest.mark.parametrize("axes", list(itertools.permutations((2, 3, 4)))[1:])
def test_axes_permuted_with_the_kernels_permuted(name, axes):
    conv = make(name, 3, 5, 3, stride=2, padding=1, dilation=1)
    x = volume(2, 3, 5, 6, 7)
    order = (0, 1, *axes)
    moved = F.conv3d(x.permute(order), dense(conv).permute(order), conv.bias, 2, 1)
    assert_same(moved, conv(x).permute(order))


def test_acs_turned_in_plane_swaps_its_coronal_and_sagittal_parts():
    """Height and width exchanged: the axial kernels are transposed, the other two change places."""
    conv = make("ACSConv", 4, 6, 3, stride=2, padding=1)
    turned = make("ACSConv", 4, 6, 3, stride=2, padding=1)
    a, c, s = conv.weight.data.chunk(3)
    turned.weight.data.copy_(torch.cat([a.mT, s, c]))
    turned.bias.data.copy_(conv.bias[[0, 1, 4, 5, 2, 3]])
    x = volume(1, 4, 5, 6, 7)
    assert_same(turned(x.mT)[:, [0, 1, 4, 5, 2, 3]], conv(x).mT)


@pytest.mark.parametrize("name", ["SliceConv", "I3DConv", "P3DConv"])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (2, 2)])
def test_volumes_equal_along_depth_are_answered_as_the_image(name, stride, dilation):
    """Away from the ends, as initialised."""
    torch.manual_seed(0)
    reference = nn.Conv2d(3, 4, 3, stride, dilation, dilation).double()
    conv = build_conv3d(
        name, 3, 4, 3, stride=stride, padding=dilation, dilation=dilation, depth="isotropic"
    ).double()
    conv.load_weight2d(reference.weight)
    conv.bias.data.copy_(reference.bias)
    image = volume(2, 3, 8, 9)
    got = conv(image[:, :, None].expand(-1, -1, 11, -1, -1))
    for d in range(dilation, got.shape[2] - dilation):
        assert_same(got[:, :, d], reference(image))


@pytest.mark.parametrize("name", OPERATORS_3D)
def test_with_stride_1_and_half_the_kernel_as_padding_depth_is_kept_alike(name):
    """The depth-keeping operator is the special case."""
    for kernel_size in (1, 3, 5):
        options = dict(kernel_size=kernel_size, padding=kernel_size // 2)
        conv = make(name, 8, 6, **options)
        kept = build_conv3d(name, 8, 6, **options).double()
        kept.load_state_dict(conv.state_dict())
        x = volume(2, 8, 4, 6, 5)
        assert_same(conv(x), kept(x))


@every_operator
def test_channels_last_memory_autocast_and_repr(name):
    conv = make(name, 8, 6, 3, stride=2, padding=1)
    x = volume(2, 8, 5, 6, 7)
    expected = conv(x)
    assert_same(conv(x.contiguous(memory_format=torch.channels_last_3d)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = conv.float()(x.float())
    assert low.dtype == torch.bfloat16
    assert (low - expected).norm() < 0.02 * expected.norm()
    shown = "stride=(2, 2, 2), padding=(1, 1, 1), depth='isotropic'"
    assert shown in repr(conv)


def test_compiled_equals_eager():
    conv, x = make("SoftACSConv", 4, 3, 3, stride=2, padding=1), volume(1, 4, 5, 6, 7)
    assert_same(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), conv(x))


def test_an_affine_is_folded_in():
    conv = make("ACSConv", 4, 6, 3, stride=2, padding=1)
    x, (scale, shift) = volume(1, 4, 5, 5, 5), volume(2, 6)
    got = conv(x, affine=(scale, shift))
    assert_same(got, conv(x) * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1))


def test_an_operator_of_ones_own_needs_to_say_no_more():
    """`conv_depth` takes the geometry that the operator hands on, of either kind."""
    conv = CentredConv(4, 3, 3, stride=2, padding=1, depth="isotropic").double()
    x = volume(1, 4, 6, 7, 8)
    weight = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True) + 0.1 * conv.weight.abs()
    kernel = torch.stack([0.5 * weight, weight, 0.5 * weight], 2)
    assert_same(conv(x), F.conv3d(x, kernel, conv.bias, 2, 1))
    assert_same(conv_depth(x, kernel, None, (2, 2, 2), (1,) * 6, (1, 1, 1)),
                F.conv3d(x, kernel, None, 2, 1))  # fmt: skip


def test_acs_is_as_large_as_the_2d_convolution():
    for name in ("ACSConv", "MeanACSConv", "SliceConv"):
        conv, flat = make(name, 8, 6, 3), nn.Conv2d(8, 6, 3)
        assert {k: v.shape for k, v in conv.state_dict().items()} == {
            k: v.shape for k, v in flat.state_dict().items()
        }


# --- Refusals ---


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (SliceConv, dict(depth="all"), "depth must be 'keep' or 'isotropic'"),
        (SliceConv, dict(stride=(2, 2)), r"stride must be an int or a \(depth, height, width\)"),
        (SliceConv, dict(padding=-1), "padding must be"),
        (SliceConv, dict(dilation=0), "dilation must be"),
        (SliceConv, dict(kernel_size=(1, 3)), "square kernel"),
        (SliceConv, dict(padding="same", stride=2), "needs stride 1"),
        (AlignShiftConv, {}, "AlignShiftConv works between slices of one stack"),
        (A3DConv, dict(num_slices=3), "A3DConv works between slices of one stack"),
    ],
)
def test_what_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(4, 4, **{"kernel_size": 3, "depth": "isotropic", **options})


@every_operator
@pytest.mark.parametrize("shape", [(1, 1, 8, 9), (2, 1, 8, 9), (8, 9)])
def test_an_image_is_not_taken_for_a_volume_without_a_batch(name, shape):
    conv = make(name, 1, 3, 3, padding=1)
    with pytest.raises(ValueError, match=rf"a \(B, C, D, H, W\) volume, got \({shape[0]}, "):
        conv(torch.zeros(shape, dtype=DOUBLE))
