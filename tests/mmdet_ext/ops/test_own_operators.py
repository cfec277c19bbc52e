"""Operators that a user might write: in the backbone they compute what they say, or are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from benchmarks import plain, twins
from mmdet_ext.convert import convert_to_3d
from mmdet_ext.models import inference
from mmdet_ext.models.densenet import TruncatedDenseNet3D
from mmdet_ext.models.neck import KeySliceFPN
from mmdet_ext.ops import (
    OPERATORS,
    A3DConv,
    AlignShiftConv,
    P3DConv,
    SliceConv,
    TSMConv,
    build_conv3d,
    check_operator,
    check_thickness,
    register_operator,
    shift_depth,
)


class SliceAttention(SliceConv):
    """Every slice takes from all by what the whole slices hold; thickness damps it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.query = nn.Linear(self.in_channels, self.in_channels)
        self.strength = nn.Parameter(torch.tensor(0.5))

    def fuse(self, x, thickness):
        thickness = check_thickness(thickness, len(x), "SliceAttention").to(x.dtype)
        means = x.mean((3, 4)).mT  # (B, D, C)
        shares = (self.query(means) @ means.mT).softmax(-1).to(x.dtype)
        seen = torch.einsum("bde,bcehw->bcdhw", shares, x)
        return x + (self.strength / thickness).to(x.dtype).view(-1, 1, 1, 1, 1) * seen


def attention_twin(conv, x, thickness):
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for d in range(x.shape[2]):
            query = conv.query(x[b, :, d].mean((1, 2)))
            scores = torch.stack([query @ x[b, :, e].mean((1, 2)) for e in range(x.shape[2])])
            seen = sum(share * x[b, :, e] for e, share in enumerate(scores.softmax(0)))
            out[b, :, d] = x[b, :, d] + conv.strength / thickness[b] * seen
    return twins.conv3d(conv, out, conv.weight.unsqueeze(2))


class StandardisedConv(SliceConv):
    """Weight standardisation: no norm can go into the kernel."""

    def convolve(self, x, weight, bias):
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return super().convolve(x, (weight - mean) / (std + 0.1), bias)


def standardised_twin(conv, x, thickness):
    kernels = [(kernel - kernel.mean()) / (kernel.std() + 0.1) for kernel in conv.weight]
    return twins.conv3d(conv, x, torch.stack(kernels).unsqueeze(2))


class GatedConv(SliceConv):
    """The output, times a gate of its mean over the slice: `convolve` is neither linear nor
    pixel-wise, with 1 x 1 kernels either."""

    def convolve(self, x, weight, bias):
        y = super().convolve(x, weight, bias)
        return y * y.mean((3, 4), keepdim=True).sigmoid()


def gated_twin(conv, x, thickness):
    y = twins.conv3d(conv, x, conv.weight.unsqueeze(2))
    return y * torch.sigmoid(y.mean((3, 4), keepdim=True))


class NeighbourMeanConv(SliceConv):
    """Pixel-wise, with a parameter whose name begins as those of a norm do, in place too."""

    pixelwise = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.running_mix = nn.Parameter(torch.full((self.in_channels, 1, 1, 1), 0.3))

    def fuse(self, x, thickness):
        return x + self.running_mix * (shift_depth(x, -1) + shift_depth(x, 1)) / 2

    def fuse_(self, x, thickness):
        return x.copy_(self.fuse(x, thickness))


def neighbour_twin(conv, x, thickness):
    mixed = x.clone()
    mixed[:, :, 1:] += conv.running_mix * x[:, :, :-1] / 2
    mixed[:, :, :-1] += conv.running_mix * x[:, :, 1:] / 2
    return twins.conv3d(conv, mixed, conv.weight.unsqueeze(2))


class CentredShift(TSMConv):
    """Pools in `fuse`, and inherits from an operator that is pixel-wise and works in place."""

    def fuse(self, x, thickness):
        return super().fuse(x - x.mean((3, 4), keepdim=True), thickness)


def centred_twin(conv, x, thickness):
    return twins.tsm(conv, x - x.mean((3, 4), keepdim=True), thickness)


class NormedConv(SliceConv):
    """A norm inside `fuse`, counted once under checkpointing, too."""

    pixelwise = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm3d(self.in_channels)

    def fuse(self, x, thickness):
        return x + self.norm(x).roll(1, dims=2)


def normed_twin(conv, x, thickness):
    return twins.conv3d(conv, x + conv.norm(x).roll(1, 2), conv.weight.unsqueeze(2))


OWN = {
    SliceAttention: attention_twin,
    StandardisedConv: standardised_twin,
    GatedConv: gated_twin,
    NeighbourMeanConv: neighbour_twin,
    CentredShift: centred_twin,
    NormedConv: normed_twin,
}
own_operator = pytest.mark.parametrize("operator", OWN)
SMALL = dict(growth=4, bn_size=2, block_config=(2, 2), stem_channels=16)
DOUBLE = torch.float64
THICKNESS = torch.tensor([1.0, 5.0], dtype=DOUBLE)


@pytest.fixture
def networks(monkeypatch):
    """Makes a backbone of an operator and its neck, and has maps run in strips of two rows where
    they may."""
    monkeypatch.setattr(inference, "STRIP_BYTES", 1)

    def build(operator, **options):
        monkeypatch.setitem(OPERATORS, operator.__name__, operator)
        monkeypatch.setitem(twins.TWINS, operator.__name__, twins.Twin(OWN.get(operator), ({},)))
        torch.manual_seed(0)
        backbone = TruncatedDenseNet3D(dict(type=operator.__name__), **SMALL, **options).double()
        with torch.no_grad():
            for module in backbone.modules():
                if isinstance(module, nn.BatchNorm3d):
                    for tensor in (module.weight, module.running_var):
                        tensor.uniform_(0.5, 1.5)
                    for tensor in (module.bias, module.running_mean):
                        tensor.normal_()
        return backbone, KeySliceFPN(backbone.out_channels, num_slices=3, out_channels=6).double()

    return build


def volumes():
    return torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


@own_operator
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_in_the_backbone_it_computes_what_its_twin_does(operator, training, networks):
    backbone, neck = networks(operator)
    backbone.train(training)
    parameters = [*backbone.parameters(), *neck.parameters()]
    x = volumes()
    expected = plain.network(copy.deepcopy(backbone), neck, x, THICKNESS)
    with torch.no_grad():
        inferred = neck(copy.deepcopy(backbone).maps(x, THICKNESS))[0]
    torch.testing.assert_close(inferred, expected)
    got = neck(copy.deepcopy(backbone)(x, THICKNESS))[0]
    torch.testing.assert_close(got, expected)

    wanted = plain.network(backbone, neck, x, THICKNESS).square().sum()
    wanted = torch.autograd.grad(wanted, parameters)
    found = torch.autograd.grad(neck(backbone(x, THICKNESS))[0].square().sum(), parameters)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item() + 1e-9)


@own_operator
def test_checkpointing_changes_neither_gradients_nor_statistics(operator, networks):
    results = []
    for with_cp in (False, True):
        backbone, _ = networks(operator, with_cp=with_cp)
        sum(y.square().mean() for y in backbone(volumes(), THICKNESS)).backward()
        results.append([*(p.grad for p in backbone.parameters()), *backbone.buffers()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@own_operator
def test_mixed_precision_at_inference_is_near(operator, networks):
    backbone, _ = networks(operator)
    backbone = backbone.float().eval()
    x, thickness = volumes().float(), THICKNESS.float()
    with torch.no_grad():
        expected = backbone(x, thickness)
        with torch.autocast("cpu", torch.bfloat16):
            got = backbone(x, thickness)
    for a, b in zip(got, expected):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.1 * b.norm()


@own_operator
def test_in_a_converted_network_it_computes_what_its_twin_does(operator, networks):
    networks(operator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()).double()
    network = convert_to_3d(net, operator.__name__, in_channels=4, skip_first_conv=False).eval()
    x = torch.randn(2, 4, 3, 5, 6, dtype=DOUBLE)
    expected = OWN[operator](network.model[0], x, THICKNESS)
    with torch.no_grad():
        torch.testing.assert_close(
            network(x, THICKNESS), F.relu(expected / (1 + net[1].eps) ** 0.5)
        )


@own_operator
def test_it_keeps_its_promises(operator):
    check_operator(operator)


def test_strips_run_only_where_a_class_says_that_they_may(networks):
    rows = {}
    for operator in (SliceAttention, NeighbourMeanConv):
        backbone, _ = networks(operator)
        heights = rows[operator] = set()
        original = operator.fuse

        def fuse(self, x, thickness, original=original, heights=heights):
            heights.add(x.shape[3])
            return original(self, x, thickness)

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(operator, "fuse", fuse)
            backbone.eval()(volumes(), THICKNESS)
    assert rows == {SliceAttention: {8, 4}, NeighbourMeanConv: {2}}


@torch.no_grad()
def test_a_norm_that_looks_at_the_batch_sees_whole_maps(networks):
    """Also where the backbone itself is in eval mode, as when statistics are calibrated."""
    backbone, _ = networks(NeighbourMeanConv)
    backbone.eval()
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.train()
    other = copy.deepcopy(backbone)
    got = backbone(volumes(), THICKNESS)
    with torch.enable_grad():
        expected = other(volumes(), THICKNESS)
    for a, b in zip([*got, *backbone.buffers()], [*expected, *other.buffers()]):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_hooks_of_an_operator_are_called_at_inference(networks):
    """Pruning computes the weight in one, for example."""
    backbone, _ = networks(NeighbourMeanConv)
    backbone.eval()
    layer = backbone.denseblock2.denselayer2
    for conv in (layer.conv1, layer.conv2):
        prune.l1_unstructured(conv, "weight", amount=0.5)
        conv.weight_orig.mul_(2)  # as a training step would change it
    got = backbone(volumes(), THICKNESS)
    with torch.enable_grad():
        expected = backbone(volumes(), THICKNESS)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


# --- What a class says of its methods holds for these alone ---


def test_promises_hold_until_what_they_are_about_is_overridden():
    def says(operator):
        return operator.pixelwise, operator.linear, operator.fuse_ is not SliceConv.fuse_

    assert {k: says(v) for k, v in OPERATORS.items()} == {
        "SliceConv": (True, True, False),
        "A3DConv": (True, True, False),
        "ACSConv": (True, True, False),
        "AlignShiftConv": (True, True, True),
        "I3DConv": (True, True, False),
        "MeanACSConv": (True, True, False),
        "P3DConv": (True, False, False),
        "SoftACSConv": (True, True, False),
        "TSMConv": (True, True, True),
    }
    assert says(SliceAttention) == (False, True, False)
    assert says(CentredShift) == (False, True, False)
    assert says(GatedConv) == says(StandardisedConv) == (False, False, False)
    assert says(NeighbourMeanConv) == (True, True, True)

    class Both(AlignShiftConv):
        pixelwise = linear = True

        def convolve(self, x, weight, bias):
            return super().convolve(x, weight, bias)

    class Unchanged(Both):
        zero_padding = False

    class Overriding(Unchanged):
        def convolve(self, x, weight, bias):
            return super().convolve(x, weight, bias)

    assert says(Both) == says(Unchanged) == (True, True, True)
    assert says(Overriding) == (False, False, True)

    class Pooling:
        def fuse(self, x, thickness):
            return x.mean((3, 4), keepdim=True).expand_as(x)

    class Mixed(Pooling, TSMConv):
        pass

    class AlsoMixed(Pooling, TSMConv):
        pixelwise = True

    assert says(Mixed) == (False, True, False)
    assert says(AlsoMixed) == (True, True, False)


def test_what_would_not_be_called_is_refused():
    with pytest.raises(TypeError, match="Own: override fuse or convolve, not forward"):

        class Own(SliceConv):
            def forward(self, x, thickness=None):
                return x

    class Mixin:
        def forward(self, x, thickness=None):
            return x

    with pytest.raises(TypeError, match="Mixed: override fuse or convolve, not forward"):

        class Mixed(Mixin, SliceConv):
            pass

    with pytest.raises(TypeError, match=r"InPlace: .*training calls fuse: define both"):

        class InPlace(TSMConv):
            def fuse_(self, x, thickness):
                return x.mul_(2)


def test_a_learned_alpha_is_refused():
    class Learned(AlignShiftConv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.log_reference = nn.Parameter(torch.tensor(0.5))

        def alpha(self, thickness, batch):
            return (self.log_reference.exp() / thickness).clamp(max=1)

    conv = Learned(8, 4, 1)
    with pytest.raises(TypeError, match="Learned: alpha gets no gradient"):
        conv(torch.zeros(2, 8, 3, 4, 4), torch.tensor([1.0, 5.0]))


def test_a_name_registers_once():
    assert register_operator(TSMConv) is TSMConv
    other = type("TSMConv", (SliceConv,), {})
    with pytest.raises(ValueError, match=r"an operator TSMConv already, in mmdet_ext\.ops\.tsm"):
        register_operator(other)
    assert OPERATORS["TSMConv"] is TSMConv
    with pytest.raises(TypeError, match="Linear: an operator derives from"):
        register_operator(nn.Linear)


# --- check_operator finds what is broken ---


class Pixelwise(SliceAttention):
    pixelwise = True


class Linear(StandardisedConv):
    linear = True


class OwnWeight(SliceConv):
    linear = True

    def convolve(self, x, weight, bias):
        return super().convolve(x, self.weight, self.bias)


class MixedOutputs(P3DConv):
    linear = True


class OtherInPlace(SliceConv):
    def fuse(self, x, thickness):
        return x + shift_depth(x, 1)

    def fuse_(self, x, thickness):
        return x.mul_(2)


class Overwriting(SliceConv):
    def fuse(self, x, thickness):
        return x.mul_(2)


class Cropping(SliceConv):
    def fuse(self, x, thickness):
        return x[:, :, 1:]


class TwoSlices(SliceConv):
    def fuse(self, x, thickness):
        return x + x[:, :, 1:2]


class Batch(SliceConv):
    def fuse(self, x, thickness):
        return x - x.mean(0, keepdim=True)


class AnyThickness(SliceConv):
    def fuse(self, x, thickness):
        return x + shift_depth(x, 1) / thickness.to(x.dtype).view(-1, 1, 1, 1, 1)


class AtInfinity(SliceConv):
    def fuse(self, x, thickness):
        thickness = check_thickness(thickness, len(x), "AtInfinity")
        return x + shift_depth(x, 1) * (1 + 1 / thickness).to(x.dtype).view(-1, 1, 1, 1, 1)


class Unused(SliceConv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unused = nn.Parameter(torch.zeros(3))


class Detached(SliceConv):
    def fuse(self, x, thickness):
        return x + shift_depth(x, 1).detach()


class Counting(SliceConv):
    calls = 0

    def fuse(self, x, thickness):
        self.calls += self.training
        return x * (1 + self.calls)


class Viewing(SliceConv):
    def fuse(self, x, thickness):
        return x.view(-1).view(x.shape)


class Double(SliceConv):
    def fuse(self, x, thickness):
        return x + shift_depth(x, 1) * torch.full((self.in_channels, 1, 1, 1), 0.1).double()


class OtherWeight(SliceConv):
    def weight_shape(self):
        return (*super().weight_shape(), 1)

    def load_weight2d(self, weight):
        self.weight.data.copy_(weight.unsqueeze(-1))

    def convolve(self, x, weight, bias):
        return super().convolve(x, weight.squeeze(-1), bias)


@pytest.mark.parametrize(
    "operator, broken",
    [
        (Pixelwise, "on strips of rows"),
        (Linear, "times a scale plus a shift"),
        (OwnWeight, "times a scale plus a shift"),
        (MixedOutputs, "times a scale plus a shift"),
        (OtherInPlace, "fuse leaves its input as it is"),
        (Overwriting, "fuse leaves its input as it is"),
        (Cropping, "the output is"),
        (TwoSlices, "the output is"),
        (Batch, "do not mix"),
        (AnyThickness, "or one that is missing"),
        (AtInfinity, "at infinity no slice sees another"),
        (Unused, "every parameter gets a gradient"),
        (Detached, "gradients are the numerical ones"),
        (Counting, "activation checkpointing"),
        (Viewing, "memory format"),
        (Double, "mixed precision"),
        (OtherWeight, "2D convolution loads"),
    ],
)
def test_check_operator_names_the_broken_promise(operator, broken):
    with pytest.raises(AssertionError, match=f"{operator.__name__} breaks a promise: .*{broken}"):
        check_operator(operator)


def test_check_operator_leaves_random_numbers_as_they_were_and_options_to_the_operator():
    state = torch.get_rng_state()
    check_operator(A3DConv, num_slices=7)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match="n_folds"):
        check_operator(TSMConv, n_folds=3)
    with pytest.raises(ValueError, match="n_fold must be"):
        check_operator(TSMConv, n_fold=1)


def test_build_conv3d_builds_ones_own(monkeypatch):
    monkeypatch.setitem(OPERATORS, "GatedConv", GatedConv)
    assert type(build_conv3d("GatedConv", 4, 8, 3)) is GatedConv
