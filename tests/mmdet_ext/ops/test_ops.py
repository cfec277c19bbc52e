"""The operators against their twins in benchmarks/twins.py, written from the papers' formulas, and
the laws they obey."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.twins import TWINS, config, plain, shift
from mmdet_ext.ops import (
    OPERATORS,
    A3DConv,
    ACSConv,
    AlignA3DConv,
    AlignACSConv,
    AlignShiftConv,
    I3DConv,
    MeanACSConv,
    P3DConv,
    SliceConv,
    SoftACSConv,
    TSMConv,
    build_conv3d,
    check_operator,
    fold,
    shift_depth,
    unfold,
)

DOUBLE = torch.float64
THICKNESS = (0.8, 2.0, 5.0, float("inf"))


def volume(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mm(*values, dtype=DOUBLE):
    return torch.tensor(values, dtype=dtype)


# An operator and the options it is tried with.
CASES = {
    ", ".join([name, *(f"{key}={value}" for key, value in options.items())]): (name, options)
    for name, (_, variants) in TWINS.items()
    for options in variants
}
# Those that mix slices ahead of a per-slice convolution.
PER_SLICE = ("SliceConv", "TSMConv", "AlignShiftConv", "A3DConv", "AlignA3DConv")
ALIGNED = ("AlignShiftConv", "AlignA3DConv", "AlignACSConv")
every_operator = pytest.mark.parametrize("case", CASES)


def make(case, *args, depth=3, seed=0, **kwargs):
    """An operator of random parameters in float64, those of the fusion included."""
    torch.manual_seed(seed)
    conv = build_conv3d(config(CASES[case][0], depth, CASES[case][1]), *args, **kwargs).double()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return conv


def assert_same(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_every_registered_operator_has_a_twin():
    assert TWINS.keys() == OPERATORS.keys()


@every_operator
def test_operator_keeps_its_promises(case):
    name, options = CASES[case]
    options = config(name, 3, options)
    check_operator(OPERATORS[options.pop("type")], **options)


# In and out channels, depth, and the convolution's options.
GEOMETRIES = {
    "3x3": (4, 5, 3, dict(kernel_size=3, padding=1)),
    "1x1": (7, 4, 3, dict(kernel_size=1)),
    "1x1 strided, padded": (3, 3, 2, dict(kernel_size=1, stride=2, padding=1)),
    "strided": (6, 3, 4, dict(kernel_size=3, stride=2, padding=1, bias=False)),
    "not padded": (3, 6, 2, dict(kernel_size=3)),
    "padded by more": (3, 4, 2, dict(kernel_size=3, padding=2)),
    "dilated": (3, 4, 3, dict(kernel_size=3, padding=2, dilation=2)),
    "dilated, not padded": (2, 3, 2, dict(kernel_size=3, dilation=2)),
    "depthwise": (6, 6, 3, dict(kernel_size=3, padding=1, groups=6)),
    "depthwise, multiplied": (3, 6, 3, dict(kernel_size=3, padding=1, groups=3)),
    "even": (3, 4, 3, dict(kernel_size=2, stride=2)),
    "even, dilated": (3, 4, 3, dict(kernel_size=2, dilation=2, padding=1)),
    "large": (3, 5, 4, dict(kernel_size=5, padding=2)),
    "one slice": (4, 5, 1, dict(kernel_size=3, padding=1)),
    "unequal": (3, 4, 2, dict(kernel_size=3, stride=(1, 2), padding=(0, 2), dilation=(2, 1))),
    "one channel": (1, 1, 5, dict(kernel_size=3, padding=1)),
}


@every_operator
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_operator_and_its_gradients_equal_the_twin(case, geometry):
    channels, outputs, depth, options = GEOMETRIES[geometry]
    conv = make(case, channels, outputs, depth=depth, **options)
    x = volume(4, channels, depth, 6, 5).requires_grad_()
    thickness = mm(*THICKNESS)
    got, expected = conv(x, thickness), plain(conv, x, thickness)
    assert_same(got, expected)

    probe = volume(*got.shape, seed=1)
    variables = [x, *conv.parameters()]
    gradients = torch.autograd.grad((got * probe).sum(), variables)
    wanted = torch.autograd.grad((expected * probe).sum(), variables)
    for a, b in zip(gradients, wanted):
        assert_same(a, b)


@every_operator
def test_grouped_operator_equals_the_twin_or_is_refused(case):
    options = dict(kernel_size=3, padding=1, groups=2)
    if issubclass(OPERATORS[CASES[case][0]], ACSConv):
        with pytest.raises(ValueError, match=r"groups must be 1 or in_channels=4.*got 2"):
            make(case, 4, 6, **options)
        return
    conv = make(case, 4, 6, **options)
    x, thickness = volume(4, 4, 3, 4, 5), mm(*THICKNESS)
    assert_same(conv(x, thickness), plain(conv, x, thickness))


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith(PER_SLICE)])
@pytest.mark.parametrize("kernel_size", [(1, 3), (3, 2)])
def test_unequal_kernels_where_nothing_is_rotated(case, kernel_size):
    conv = make(case, 3, 4, kernel_size=kernel_size, padding=(0, 1))
    x, thickness = volume(4, 3, 3, 4, 5), mm(*THICKNESS)
    assert_same(conv(x, thickness), plain(conv, x, thickness))


@every_operator
@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (3, 2), (2, 1), (4, 3)])
def test_padding_same_and_valid(case, kernel_size, dilation):
    x, thickness = volume(4, 3, 3, 13, 14), mm(*THICKNESS)
    same = make(case, 3, 4, kernel_size=kernel_size, padding="same", dilation=dilation)
    assert same(x, thickness).shape == (4, 4, 3, 13, 14)
    ours = SliceConv(3, 4, kernel_size, padding="same", dilation=dilation).double()
    reference = nn.Conv2d(3, 4, kernel_size, padding="same", dilation=dilation).double()
    reference.load_state_dict(ours.state_dict())
    assert_same(ours(x)[:, :, 1], reference(x[:, :, 1]))
    valid = make(case, 3, 4, kernel_size=kernel_size, padding="valid", dilation=dilation)
    zero = make(case, 3, 4, kernel_size=kernel_size, padding=0, dilation=dilation)
    assert torch.equal(valid(x, thickness), zero(x, thickness))


# --- What the twins themselves are made of, position by position ---


def conv_loop(conv, x, kernel):
    """K x K x K convolution, kernel (C', C/groups, Kd, Kh, Kw), one output position after another.

    In-plane as `Conv2d`; along depth stride 1, dilation 1, zeros beyond the ends, and tap
    (Kd - 1) // 2 on the slice itself.
    """
    stride, padding, dilation, groups = conv.stride, conv.padding, conv.dilation, conv.groups
    batch, channels, depth, height, width = x.shape
    outputs, _, kd, kh, kw = kernel.shape
    rows = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    out = x.new_zeros(batch, outputs, depth, rows, columns)
    for d, i, j in itertools.product(range(depth), range(rows), range(columns)):
        for a, b, c in itertools.product(range(kd), range(kh), range(kw)):
            z = d + a - (kd - 1) // 2
            y = i * stride[0] - padding[0] + b * dilation[0]
            u = j * stride[1] - padding[1] + c * dilation[1]
            if not (0 <= z < depth and 0 <= y < height and 0 <= u < width):
                continue
            for g in range(groups):
                o = slice(g * outputs // groups, (g + 1) * outputs // groups)
                n = slice(g * channels // groups, (g + 1) * channels // groups)
                out[:, o, d, i, j] += x[:, n, z, y, u] @ kernel[o, :, a, b, c].T
    return out if conv.bias is None else out + conv.bias.view(1, -1, 1, 1, 1)


def in_cube(weight, view):
    """The K x K kernel in an axial, coronal or sagittal plane of a K x K x K one."""
    size = weight.shape[-1]
    centre = (size - 1) // 2
    kernel = weight.new_zeros(*weight.shape[:2], size, size, size)
    for j, k in itertools.product(range(size), repeat=2):
        place = [(centre, j, k), (j, centre, k), (j, k, centre)][view]
        kernel[(..., *place)] = weight[:, :, j, k]
    return kernel


@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_twins_convolve_as_a_loop_does(geometry):
    channels, outputs, depth, options = GEOMETRIES[geometry]
    x = volume(2, channels, depth, 6, 5)
    conv = make("SliceConv", channels, outputs, **options)
    assert_same(plain(conv, x), conv_loop(conv, x, conv.weight.unsqueeze(2)))
    conv = make("I3DConv", channels, outputs, **options)
    assert_same(plain(conv, x), conv_loop(conv, x, conv.weight))
    conv = make("ACSConv", channels, outputs, **options)
    thirds = conv.weight.tensor_split(3)
    kernel = torch.cat([in_cube(weight, view) for view, weight in enumerate(thirds)])
    assert_same(plain(conv, x), conv_loop(conv, x, kernel))


@torch.no_grad()
def test_twins_of_shifts_take_the_slices_that_the_papers_name():
    conv = make("AlignShiftConv, n_fold=3", 7, 2, 1)
    x = volume(1, 7, 4, 2, 2)
    for zero_padding in (True, False):
        got = shift(conv, x, zero_padding)
        for c, d in itertools.product(range(7), range(4)):
            e = d + (1 if c < 2 else -1 if c < 4 else 0)
            beyond = torch.zeros_like(x[0, c, d]) if zero_padding else x[0, c, d]
            assert torch.equal(got[0, c, d], x[0, c, e] if 0 <= e < 4 else beyond)


# --- Laws ---

volumes = dict(
    batch=st.integers(1, 3),
    channels=st.integers(1, 17),
    depth=st.integers(1, 6),
    n_fold=st.integers(2, 9),
    seed=st.integers(0, 100),
)


def with_weights_of(conv, kind, **own):
    other = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, **own
    ).double()
    other.load_weight2d(conv.weight)
    other.bias.data.copy_(conv.bias)
    return other


@settings(deadline=None, max_examples=40)
@given(**volumes, thin=st.floats(0.01, 2.0))
def test_thin_alignshift_is_tsm_and_infinite_no_fusion(batch, channels, depth, n_fold, seed, thin):
    conv = AlignShiftConv(channels, 3, 3, padding=1, n_fold=n_fold).double()
    x = volume(batch, channels, depth, 4, 3, seed=seed)
    tsm = with_weights_of(conv, TSMConv, n_fold=n_fold)
    assert_same(conv(x, mm(thin).expand(batch)), tsm(x))
    unfused = with_weights_of(conv, SliceConv)
    assert_same(conv(x, mm(torch.inf).expand(batch)), unfused(x))


@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(1, 3),
    depth=st.integers(1, 6),
    seed=st.integers(0, 100),
    kernel_size=st.sampled_from([1, 2, 3, 5]),
    thin=st.floats(0.01, 2.0),
)
def test_thin_aligned_operators_are_the_plain_ones_to_the_bit(
    batch, depth, seed, kernel_size, thin
):
    x = volume(batch, 5, depth, 6, 5, seed=seed)
    for aligned, plain_one in ((AlignA3DConv, A3DConv), (AlignACSConv, ACSConv)):
        own = config(aligned.__name__, depth)
        name = own.pop("type")
        conv = make(name, 5, 4, kernel_size, depth=depth, seed=seed, padding=kernel_size // 2)
        expected = plain_one(5, 4, kernel_size, padding=kernel_size // 2, **own).double()
        expected.load_state_dict(conv.state_dict())
        got = conv(x, mm(thin).expand(batch))
        if depth > kernel_size // 2:
            assert torch.equal(got, expected(x))
        else:  # ACS leaves taps out that reach no slice: a convolution of another shape
            assert_same(got, expected(x), 1e-12)


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 3), depth=st.integers(1, 6), seed=st.integers(0, 100))
def test_infinitely_thick_aligned_a3d_is_no_fusion(batch, depth, seed):
    conv = make("AlignA3DConv", 5, 4, 3, depth=depth, seed=seed, padding=1)
    x = volume(batch, 5, depth, 6, 5, seed=seed)
    assert torch.equal(conv.fuse(x, mm(torch.inf).expand(batch)), x)
    unfused = with_weights_of(conv, SliceConv)
    assert_same(conv(x, mm(torch.inf).expand(batch)), unfused(x))


def test_aligned_a3d_is_alpha_parts_of_a3d():
    conv = make("AlignA3DConv", 5, 4, 3, padding=1)
    a3d = A3DConv(5, 4, 3, padding=1, num_slices=3).double()
    a3d.load_state_dict(conv.state_dict())
    x = volume(1, 5, 3, 6, 5)
    for thickness, alpha in ((1.0, 1), (2.0, 1), (4.0, 0.5), (5.0, 0.4), (20.0, 0.1)):
        mixed = alpha * a3d(x) + (1 - alpha) * with_weights_of(conv, SliceConv)(x)
        assert_same(conv(x, mm(thickness)), mixed)


@pytest.mark.parametrize("name", ["AlignA3DConv", "AlignACSConv"])
def test_the_reference_thickness_is_what_thicknesses_are_measured_by(name):
    x, at_two = volume(3, 5, 3, 6, 5), make(name, 5, 4, 3, padding=1)
    at_one = build_conv3d({**config(name, 3), "ref_thickness": 1.0}, 5, 4, 3, padding=1).double()
    at_one.load_state_dict(at_two.state_dict())
    assert torch.equal(at_one(x, mm(0.5, 1.5, 4.0)), at_two(x, mm(1.0, 3.0, 8.0)))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_infinitely_thick_aligned_acs_sums_its_kernels_along_depth(kernel_size):
    """The coronal kernel (depth, width) is left with a row, the sagittal (depth, height) with a
    column."""
    conv = make("AlignACSConv", 5, 6, kernel_size, padding=kernel_size // 2, bias=False)
    x = volume(2, 5, 3, 7, 6)
    got = conv(x, mm(torch.inf, torch.inf))
    half = kernel_size // 2
    for d in range(3):
        axial, coronal, sagittal = conv.weight.split(2)
        row, column = coronal.sum(2).unsqueeze(2), sagittal.sum(2).unsqueeze(3)
        expected = [
            nn.functional.conv2d(x[:, :, d], axial, padding=half),
            nn.functional.conv2d(x[:, :, d], row, padding=(0, half)),
            nn.functional.conv2d(x[:, :, d], column, padding=(half, 0)),
        ]
        assert_same(got[:, :, d], torch.cat(expected, dim=1))


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
@pytest.mark.parametrize("times", [2, 3])
def test_aligned_acs_is_acs_on_slices_interpolated_to_the_reference(kernel_size, times):
    """Of slices `times` the reference apart, zeros beyond both ends included."""
    conv = make("AlignACSConv", 5, 6, kernel_size, padding=kernel_size // 2)
    acs = ACSConv(5, 6, kernel_size, padding=kernel_size // 2).double()
    acs.load_state_dict(conv.state_dict())
    x = volume(1, 5, 4, 6, 5)
    ends = nn.functional.pad(x, (0, 0, 0, 0, 1, 1))
    fine = torch.stack(
        [
            ends[:, :, d].lerp(ends[:, :, d + 1], step / times)
            for d in range(5)
            for step in range(times)
        ],
        dim=2,
    )
    assert_same(conv(x, mm(2.0 * times)), acs(fine)[:, :, times::times])


@settings(deadline=None, max_examples=40)
@given(**volumes, thickness=st.lists(st.floats(0.1, 20), min_size=3, max_size=3))
def test_shifts_only_move_what_they_should(batch, channels, depth, n_fold, seed, thickness):
    """One slice and one channel of the input reach just the slices that the formula names."""
    fold_channels = channels // n_fold
    x = volume(batch, channels, depth, 2, 2, seed=seed)
    mms = mm(*thickness[:batch])
    for conv in (
        TSMConv(channels, 1, 1, n_fold=n_fold),
        AlignShiftConv(channels, 1, 1, n_fold=n_fold),
        AlignShiftConv(channels, 1, 1, n_fold=n_fold, zero_padding=False),
    ):
        fused = conv.fuse(x, mms)
        assert torch.equal(fused[:, 2 * fold_channels :], x[:, 2 * fold_channels :])
        for channel in range(2 * fold_channels):
            source = 1 if channel < fold_channels else -1
            changed = x.clone()
            changed[:, channel, depth // 2] += 1
            moved = (conv.fuse(changed, mms) != fused).any(dim=(0, 3, 4))
            assert not moved[[c for c in range(channels) if c != channel]].any()
            allowed = {depth // 2, depth // 2 - source}
            assert set(moved[channel].nonzero().flatten().tolist()) <= allowed


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 100), kernel_size=st.sampled_from([1, 2, 3, 5]))
def test_as_initialised_equal_slices_are_answered_as_the_2d_network_does(case, seed, kernel_size):
    """Away from the ends, where zero padding shows."""
    depth = 7
    torch.manual_seed(seed)
    name, own = CASES[case]
    kind = OPERATORS[name]
    options = config(name, depth, own)
    conv = build_conv3d(options, 6, 4, kernel_size, padding=kernel_size // 2).double()
    if issubclass(kind, A3DConv):
        conv.fusion_weight.data.copy_(torch.eye(depth).unsqueeze(2).expand(-1, -1, 6))
    reference = nn.Conv2d(6, 4, kernel_size, padding=kernel_size // 2).double()
    torch.nn.init.normal_(reference.weight)
    conv.load_weight2d(reference.weight)
    conv.bias.data.copy_(reference.bias)
    if issubclass(kind, (ACSConv, MeanACSConv)):
        # They turn the kernel: only a volume equal in all directions is answered alike.
        x = torch.full((2, 6, depth, 12, 12), 1.5, dtype=DOUBLE)
        got, expected = conv(x, mm(1.0, 3.0)), reference(x[:, :, 0])
        inside = slice(kernel_size, -kernel_size)
        for d in range(kernel_size // 2, depth - kernel_size // 2):
            assert_same(got[:, :, d, inside, inside], expected[:, :, inside, inside])
        return
    x = volume(2, 6, 1, 6, 5, seed=seed).expand(-1, -1, depth, -1, -1)
    got, expected = conv(x, mm(1.0, 3.0)), reference(x[:, :, 0])
    reach = {I3DConv: kernel_size // 2, TSMConv: 1, AlignShiftConv: 1}.get(kind, 0)
    if own.get("zero_padding") is False:
        reach = 0
    for d in range(reach, depth - reach):
        assert_same(got[:, :, d], expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith(PER_SLICE[1:])])
def test_gradients_have_gradients(case):
    conv = make(case, 4, 2, 1)
    x = volume(2, 4, 3, 2, 1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: conv(x, mm(1.0, 5.0)), (x,))


@pytest.mark.parametrize("step", [-6, -5, -2, -1, 0, 1, 2, 5, 6])
def test_depth_is_shifted_by_any_step(step):
    x = volume(2, 3, 5, 2, 2)
    got = shift_depth(x, step)
    for d in range(5):
        inside = 0 <= d + step < 5
        assert torch.equal(got[:, :, d], x[:, :, d + step] if inside else 0 * x[:, :, d])


# --- Memory, precision, compilation, copies ---


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_fold_puts_slices_side_by_side_and_unfold_undoes_it(memory_format):
    x = volume(2, 4, 3, 5, 6).contiguous(memory_format=memory_format)
    folded = fold(x)
    for b in range(2):
        for d in range(3):
            assert torch.equal(folded[b * 3 + d], x[b, :, d])
    assert torch.equal(unfold(folded, 2), x)
    if memory_format is torch.channels_last_3d:
        assert folded.data_ptr() == x.data_ptr(), "folding must be a view in channels-last memory"
        assert unfold(folded, 2).is_contiguous(memory_format=torch.channels_last_3d)


@every_operator
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("outputs, groups", [(8, 1), (6, 6)])
def test_channels_last_memory_stays_so_also_when_joined(case, kernel_size, batch, outputs, groups):
    conv = make(case, 6, outputs, kernel_size, padding=kernel_size // 2, groups=groups)
    x = volume(batch, 6, 3, 5, 4).contiguous(memory_format=torch.channels_last_3d)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            y = conv(x, mm(*THICKNESS[:batch]))
            joined = torch.cat([y, y], dim=1)
        assert joined.is_contiguous(memory_format=torch.channels_last_3d)


@every_operator
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)]
)
def test_precisions(case, dtype, tolerance):
    conv = make(case, 8, 6, 3, padding=1, seed=1)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(0.1)
    x, thickness = volume(2, 8, 3, 6, 6), mm(2.0, 5.0)
    low = copy.deepcopy(conv).to(dtype)
    got = low(x.to(dtype), thickness.float())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), conv(x, thickness), rtol=tolerance, atol=tolerance)


def compiled_first(case, kernel_size):
    """Compiling takes seconds: always one operator each that shifts, mixes and splits."""
    always = kernel_size == 3 and case in ("AlignShiftConv, n_fold=3", "A3DConv", "ACSConv")
    return pytest.param(case, kernel_size, marks=[] if always else pytest.mark.slow)


@pytest.mark.parametrize(
    "case, kernel_size", [compiled_first(case, kernel) for case in CASES for kernel in (1, 3)]
)
def test_compiled_whole_operator_agrees_and_so_do_its_gradients(case, kernel_size):
    torch._dynamo.reset()
    conv = make(case, 8, 6, kernel_size, padding=kernel_size // 2)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    x, thickness = volume(2, 8, 3, 4, 4), mm(2.0, 5.0)
    got, expected = compiled(x, thickness), conv(x, thickness)
    assert_same(got, expected)
    parameters = tuple(conv.parameters())
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
    ):
        assert_same(a, b)


@every_operator
def test_copies_pickles_and_state_dicts(case):
    conv = make(case, 8, 6, 3)
    x, thickness = volume(1, 8, 3, 5, 5), mm(5.0)
    expected = conv(x, thickness)
    assert torch.equal(copy.deepcopy(conv)(x, thickness), expected)
    assert torch.equal(pickle.loads(pickle.dumps(conv))(x, thickness), expected)
    other = make(case, 8, 6, 3, seed=1)
    assert not torch.equal(other(x, thickness), expected)
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other(x, thickness), expected)


@every_operator
def test_weights_of_a_2d_convolution_load_as_they_are(case):
    conv = make(case, 8, 6, 3)
    saved = nn.Conv2d(8, 6, 3).double().state_dict()
    before = {k: v.clone() for k, v in saved.items()}
    report = conv.load_state_dict(saved, strict=False)
    assert not report.unexpected_keys
    assert not {"weight", "bias"} & set(report.missing_keys)
    weight = conv.weight.sum(2) if case == "I3DConv" else conv.weight
    assert_same(weight, saved["weight"], 1e-12)
    assert all(torch.equal(saved[k], before[k]) for k in before), "the file's tensors must stay"


def test_initialised_as_conv2d():
    torch.manual_seed(0)
    reference = nn.Conv2d(4, 8, 3)
    for name in OPERATORS:
        torch.manual_seed(0)
        conv = build_conv3d(config(name, 3), 4, 8, 3)
        weight = conv.weight[:, :, 0] * 3 if name == "I3DConv" else conv.weight
        torch.testing.assert_close(weight, reference.weight)
        assert torch.equal(conv.bias, reference.bias)


def test_fusion_as_initialised():
    torch.manual_seed(0)
    noise = A3DConv(64, 4, 1, num_slices=7).fusion_weight - torch.eye(7).unsqueeze(2)
    assert noise.abs().max() <= 0.1 and noise.abs().max() > 0.09
    assert abs(noise.mean()) < 0.01, "uniform around the identity"
    assert P3DConv(4, 6, 1).depth_weight.shape == (6, 6, 3, 1, 1)
    assert P3DConv(4, 6, 5).depth_weight.shape == (6, 6, 5, 1, 1)
    assert P3DConv(4, 6, 5, groups=2).depth_weight.shape == (6, 3, 5, 1, 1)
    assert I3DConv(4, 6, 1).weight.shape == (6, 4, 1, 1, 1)
    weight = SoftACSConv(4, 999, 3).view_weight
    assert 0 <= weight.min() < 0.01 and 0.99 < weight.max() < 1, "U(0, 1)"
    assert abs(weight.mean() - 0.5) < 0.02


# --- Refusals ---


def aligned(name, kernel_size):
    return build_conv3d(config(name, 3), 8, 4, kernel_size, padding=kernel_size // 2)


@pytest.mark.parametrize("name", ALIGNED)
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_bad_thickness_is_refused(name, bad):
    conv = aligned(name, 3)
    with pytest.raises(ValueError, match="must be > 0 mm"):
        conv(torch.zeros(2, 8, 3, 4, 4), torch.tensor([2.0, bad]))


@pytest.mark.parametrize("name", ALIGNED)
def test_bad_thickness_marks_compiled_output(name):
    conv = aligned(name, 3)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    marked = compiled(volume(2, 8, 3, 4, 4, dtype=torch.float32), torch.tensor([2.0, 0.0]))
    assert not marked[0].isnan().any() and marked[1].isnan().any()


@pytest.mark.parametrize("name", ALIGNED)
def test_missing_or_misshapen_thickness_is_refused(name):
    conv = aligned(name, 3)
    with pytest.raises(ValueError, match=f"{name} needs the slice thickness"):
        conv(torch.zeros(2, 8, 3, 4, 4))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        conv(torch.zeros(2, 8, 3, 4, 4), torch.tensor([2.0]))


def test_another_depth_is_refused_by_a3d():
    with pytest.raises(ValueError, match=r"num_slices=7.*3 slices"):
        A3DConv(8, 4, 1, num_slices=7)(torch.zeros(1, 8, 3, 4, 4))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (SliceConv, dict(kernel_size=(3, 3, 3)), "kernel_size is in-plane"),
        (SliceConv, dict(kernel_size=0), "kernel_size"),
        (SliceConv, dict(kernel_size=3, stride=0), "stride"),
        (SliceConv, dict(kernel_size=3, dilation=1.5), "dilation"),
        (SliceConv, dict(kernel_size=3, padding=-1), "padding"),
        (SliceConv, dict(kernel_size=3, padding="reflect"), "padding"),
        (SliceConv, dict(kernel_size=3, padding="same", stride=2), "needs stride 1"),
        (SliceConv, dict(kernel_size=3, groups=3), "must divide"),
        (SliceConv, dict(kernel_size=3, groups=0), "must divide"),
        (TSMConv, dict(kernel_size=3, n_fold=1), "n_fold"),
        (TSMConv, dict(kernel_size=3, n_fold=2.5), "n_fold must be an int, at least 2, got 2.5"),
        (AlignShiftConv, dict(kernel_size=3, n_fold=1), "n_fold"),
        (AlignShiftConv, dict(kernel_size=3, ref_thickness=0.0), "ref_thickness"),
        (AlignShiftConv, dict(kernel_size=3, ref_thickness=float("nan")), "ref_thickness"),
        (A3DConv, dict(kernel_size=3, num_slices=0), "num_slices"),
        (AlignA3DConv, dict(kernel_size=3, num_slices=3, ref_thickness=-2.0), "ref_thickness"),
        (AlignACSConv, dict(kernel_size=3, ref_thickness=float("inf")), "ref_thickness"),
        *(
            (kind, dict(kernel_size=(1, 3)), "square kernel.*got 1 x 3")
            for kind in (I3DConv, P3DConv, ACSConv, AlignACSConv, MeanACSConv, SoftACSConv)
        ),
    ],
)
def test_what_an_operator_cannot_take_is_refused_at_construction(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(8, 4, **options)


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="at least 1 channel"):
        SliceConv(0, 4, 3)


def test_build_by_name_and_by_dict():
    assert isinstance(build_conv3d("SliceConv", 4, 8, 3), SliceConv)
    config = dict(type="AlignShiftConv", n_fold=4)
    conv = build_conv3d(config, 8, 4, 3, padding=1, bias=False)
    assert (conv.n_fold, conv.padding, conv.bias) == (4, (1, 1), None)
    assert config == dict(type="AlignShiftConv", n_fold=4), "the config must not be changed"


def test_unknown_operator_and_option_are_named():
    with pytest.raises(ValueError, match="did you mean AlignShiftConv"):
        build_conv3d(dict(type="AlignShift"), 8, 4, 3)
    with pytest.raises(TypeError, match=r"AlignShiftConv.*n_folds"):
        build_conv3d(dict(type="AlignShiftConv", n_folds=4), 8, 4, 3)
    with pytest.raises(TypeError, match=r"A3DConv.*num_slices"):
        build_conv3d("A3DConv", 8, 4, 3)


def test_an_operator_shows_its_options():
    shown = repr(AlignShiftConv(8, 4, 3, padding=1, bias=False))
    assert shown == (
        "AlignShiftConv(8, 4, kernel_size=(3, 3), padding=(1, 1), bias=False, n_fold=8, "
        "ref_thickness=2.0, zero_padding=True)"
    )
