"""The operators against plain loops written from the papers' formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mmdet_ext.ops import AlignShiftConv, SliceConv, build_conv3d, fold, unfold

DOUBLE = torch.float64


def volume(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def align_shift_loop(x, thickness, n_fold, reference, zero_padding):
    """Channel by channel and slice by slice, as Algorithm 1 of the paper states it."""
    out = x.clone()
    batch, channels, depth = x.shape[:3]
    moved = channels // n_fold
    for b in range(batch):
        alpha = min(max(reference / float(thickness[b]), 0.0), 1.0)
        for c in range(2 * moved):
            step = 1 if c < moved else -1
            for d in range(depth):
                if 0 <= d + step < depth:
                    neighbour = x[b, c, d + step]
                elif zero_padding:
                    neighbour = torch.zeros_like(x[b, c, d])
                else:
                    neighbour = x[b, c, d]
                out[b, c, d] = alpha * neighbour + (1 - alpha) * x[b, c, d]
    return out


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


@pytest.mark.parametrize(
    "stride, padding, dilation, groups", [(1, 1, 1, 1), (2, 0, 1, 2), (1, 2, 2, 4)]
)
def test_slice_conv_is_a_1_k_k_convolution(stride, padding, dilation, groups):
    conv = SliceConv(4, 8, 3, stride, padding, dilation, groups).double()
    x = volume(2, 4, 3, 9, 10)
    expected = F.conv3d(
        x, conv.weight.unsqueeze(2), conv.bias, (1, stride, stride), (0, padding, padding),
        (1, dilation, dilation), groups,
    )  # fmt: skip
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
@pytest.mark.parametrize("zero_padding", [True, False])
@pytest.mark.parametrize("channels, n_fold", [(16, 8), (11, 4), (3, 8)])
def test_alignshift_equals_the_loop(depth, zero_padding, channels, n_fold):
    conv = AlignShiftConv(
        channels, 5, 3, padding=1, n_fold=n_fold, ref_thickness=2.0, zero_padding=zero_padding
    ).double()
    x = volume(4, channels, depth, 6, 5).requires_grad_()
    thickness = torch.tensor([0.8, 2.0, 5.0, torch.inf], dtype=DOUBLE)
    expected_input = align_shift_loop(x, thickness, n_fold, 2.0, zero_padding)
    expected = F.conv3d(expected_input, conv.weight.unsqueeze(2), conv.bias, padding=(0, 1, 1))
    output = conv(x, thickness)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)

    probe = volume(*output.shape, seed=1)
    variables = [x, conv.weight, conv.bias]
    got = torch.autograd.grad((output * probe).sum(), variables)
    wanted = torch.autograd.grad((expected * probe).sum(), variables)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_alignshift_gradients_numerically():
    conv = AlignShiftConv(8, 3, 3, padding=1, n_fold=4).double()
    x = volume(2, 8, 3, 4, 4).requires_grad_()
    thickness = torch.tensor([1.0, 5.0], dtype=DOUBLE)

    def run(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x, thickness))

    assert torch.autograd.gradcheck(run, (x, conv.weight, conv.bias))


def test_infinite_thickness_is_no_fusion():
    conv = AlignShiftConv(16, 4, 3, padding=1).double()
    plain = SliceConv(16, 4, 3, padding=1).double()
    plain.load_state_dict(conv.state_dict())
    x = volume(2, 16, 5, 6, 6)
    infinite = torch.full((2,), torch.inf, dtype=DOUBLE)
    torch.testing.assert_close(conv(x, infinite), plain(x), rtol=0, atol=1e-12)


def test_volumes_of_a_batch_do_not_mix():
    conv = AlignShiftConv(16, 4, 1).double()
    x = volume(3, 16, 3, 4, 4)
    thickness = torch.tensor([1.0, 5.0, torch.inf], dtype=DOUBLE)
    together = conv(x, thickness)
    for b in range(3):
        torch.testing.assert_close(together[b], conv(x[b : b + 1], thickness[b : b + 1])[0])


def test_channels_beyond_two_folds_stay():
    conv = AlignShiftConv(16, 4, 1, n_fold=8).double()
    x = volume(1, 16, 3, 4, 4)
    fused = conv.fuse(x, torch.tensor([1.0], dtype=DOUBLE))
    assert torch.equal(fused[:, 4:], x[:, 4:])
    assert not torch.equal(fused[:, :4], x[:, :4])


def test_memory_format_and_layout_change_no_result():
    conv = AlignShiftConv(16, 4, 3, padding=1).double()
    x = volume(2, 16, 3, 6, 6)
    thickness = torch.tensor([2.0, 5.0], dtype=DOUBLE)
    expected = conv(x, thickness)
    channels_last = conv(x.contiguous(memory_format=torch.channels_last_3d), thickness)
    torch.testing.assert_close(channels_last, expected)
    assert channels_last.is_contiguous(memory_format=torch.channels_last_3d)
    strided = torch.empty(2, 16, 3, 6, 12, dtype=DOUBLE)[..., ::2].copy_(x)
    torch.testing.assert_close(conv(strided, thickness), expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_bad_thickness_is_refused(bad):
    conv = AlignShiftConv(8, 4, 1)
    with pytest.raises(ValueError, match="must be > 0 mm"):
        conv(torch.zeros(2, 8, 3, 4, 4), torch.tensor([2.0, bad]))


def test_compiled_operator_agrees_and_marks_bad_thickness():
    conv = AlignShiftConv(8, 4, 3, padding=1)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    x = volume(2, 8, 3, 4, 4, dtype=torch.float32)
    thickness = torch.tensor([2.0, 5.0])
    torch.testing.assert_close(compiled(x, thickness), conv(x, thickness))
    marked = compiled(x, torch.tensor([2.0, 0.0]))
    assert not marked[0].isnan().any() and marked[1].isnan().any()


def test_missing_or_misshapen_thickness_is_refused():
    conv = AlignShiftConv(8, 4, 1)
    with pytest.raises(ValueError, match="needs the slice thickness"):
        conv(torch.zeros(2, 8, 3, 4, 4))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        conv(torch.zeros(2, 8, 3, 4, 4), torch.tensor([2.0]))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kernel_size=(3, 5)), "equal pair"),
        (dict(kernel_size=3, stride=(1, 2)), "equal pair"),
        (dict(kernel_size=3, groups=3), "must divide"),
        (dict(kernel_size=3, n_fold=1), "n_fold"),
        (dict(kernel_size=3, ref_thickness=0.0), "ref_thickness"),
    ],
)
def test_what_an_operator_cannot_take_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        AlignShiftConv(8, 4, **options)


def test_build_by_name_and_by_dict():
    assert isinstance(build_conv3d("SliceConv", 4, 8, 3), SliceConv)
    config = dict(type="AlignShiftConv", n_fold=4)
    conv = build_conv3d(config, 8, 4, 3, padding=1, bias=False)
    assert (conv.n_fold, conv.padding, conv.bias) == (4, 1, None)
    assert config == dict(type="AlignShiftConv", n_fold=4), "the config must not be changed"


def test_unknown_operator_and_option_are_named():
    with pytest.raises(ValueError, match="did you mean AlignShiftConv"):
        build_conv3d(dict(type="AlignShift"), 8, 4, 3)
    with pytest.raises(TypeError, match=r"AlignShiftConv.*n_folds"):
        build_conv3d(dict(type="AlignShiftConv", n_folds=4), 8, 4, 3)


def test_initialised_as_conv2d():
    torch.manual_seed(0)
    conv = SliceConv(4, 8, 3)
    torch.manual_seed(0)
    reference = torch.nn.Conv2d(4, 8, 3)
    assert torch.equal(conv.weight, reference.weight)
    assert torch.equal(conv.bias, reference.bias)


def test_copies_and_state_dict_round_trip():
    conv = AlignShiftConv(16, 4, 3)
    other = AlignShiftConv(16, 4, 3)
    other.load_state_dict(conv.state_dict())
    x, thickness = volume(1, 16, 3, 5, 5, dtype=torch.float32), torch.tensor([5.0])
    assert torch.equal(conv(x, thickness), other(x, thickness))
    assert torch.equal(conv(x, thickness), copy.deepcopy(conv)(x, thickness))
