"""convert_to_3d(depth='isotropic'): networks that act along all three axes."""

import copy
import importlib
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mmdet_ext.convert import convert_to_3d
from mmdet_ext.isotropic import RUNNING, IsotropicNetwork
from mmdet_ext.ops import ACSConv, SliceConv, register_operator, shift_depth
from mmdet_ext.ops.registry import OPERATORS

from .networks_2d import NETWORKS, ResNet
from .ops.users_operators import NeighbourMean

DOUBLE = torch.float64
ISOTROPIC = ("ACSConv", "MeanACSConv", "SoftACSConv", "I3DConv", "SliceConv", "P3DConv", "TSMConv")
# A head on a flattened map of fixed size has no place for depth.
KINDS = sorted(set(NETWORKS) - {"VGG"})


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network_2d(kind, **options):
    """In eval mode and float64, BatchNorm not the identity."""
    torch.manual_seed(0)
    network = (NETWORKS[kind] if isinstance(kind, str) else kind)(**options).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def isotropic(model, conv="ACSConv", in_channels=3, **options):
    torch.manual_seed(0)  # weights that an operator draws are those of every other conversion
    return convert_to_3d(model, conv, in_channels, depth="isotropic", **options)


def assert_same(got, expected, tolerance=1e-9):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def size_3d(model, inflated=(nn.Conv2d, nn.ConvTranspose2d)):
    """Parameters of a plain 3D network: K times those of every K x K kernel."""
    times = {
        id(m.weight): m.kernel_size[0] for m in model.modules() if isinstance(m, inflated)
    }  # fmt: skip
    return sum(p.numel() * times.get(id(p), 1) for p in model.parameters())


def size(model):
    return sum(p.numel() for p in model.parameters())


# What a converted network computes


@pytest.mark.parametrize("conv", ISOTROPIC)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_forward_and_backward_with_shapes_as_in_2d(kind, conv):
    model = network_2d(kind).float().train()
    network = isotropic(model, conv)
    images, volumes = (
        randn(2, 3, *shape, dtype=torch.float32) for shape in ((16, 24), (24, 16, 24))
    )
    output, flat = network(volumes), model(images)
    for y, z in zip(tree_leaves(output), tree_leaves(flat)):
        # The volume is as deep as it is wide.
        assert y.shape == (*z.shape[:2], *z.shape[3:], *z.shape[2:])
    sum((y * randn(*y.shape, dtype=torch.float32)).sum() for y in tree_leaves(output)).backward()
    for name, parameter in network.named_parameters():
        if "fc" in name and kind == "ResNetFPN":
            continue  # the classifier that the pyramid leaves out
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_plain_3d_is_as_large_as_it_should_be_and_acs_as_in_2d(kind):
    model = network_2d(kind)
    assert size(isotropic(model, "I3DConv")) == size_3d(model)
    for conv in ("ACSConv", "MeanACSConv", "SliceConv"):
        assert size(isotropic(model, conv)) == size_3d(model, nn.ConvTranspose2d)


@pytest.mark.parametrize("kind", ["ResNet", "DenseNet", "ResNetFPN", "DeepLabV3Plus", "ConvNeXt"])
@torch.no_grad()
def test_equal_slices_are_answered_by_25d_as_the_image(kind):
    """1 x K x K kernels and 3D pooling: nothing changes along depth."""
    model = network_2d(kind)
    image = randn(2, 3, 16, 24)
    output = isotropic(model, "SliceConv")(image[:, :, None].expand(-1, -1, 20, -1, -1))
    for y, z in zip(tree_leaves(output), tree_leaves(model(image))):
        assert_same(y, z if z.ndim == 2 else z[:, :, None].expand_as(y))


@pytest.mark.parametrize("kind", ["DenseNet", "UNet"])
@torch.no_grad()
def test_equal_slices_are_answered_by_plain_3d_as_the_image_away_from_the_ends(kind):
    model = network_2d(kind)
    for norm in [m for m in model.modules() if isinstance(m, nn.GroupNorm)]:
        norm.forward = nn.Identity().forward  # it sees the ends from everywhere
    image = randn(1, 3, 8, 8)
    output = isotropic(model, "I3DConv")(image[:, :, None].expand(-1, -1, 64, -1, -1))
    expected = model(image)
    middle = output.shape[2] // 2
    assert_same(output[:, :, middle], expected)
    with pytest.raises(AssertionError):
        assert_same(output[:, :, 0], expected)


@pytest.mark.parametrize("axes", list(itertools.permutations((2, 3, 4)))[1:])
@torch.no_grad()
def test_axes_permuted_with_the_kernels_permuted(axes):
    order = (0, 1, *axes)
    network = isotropic(network_2d("DenseNet"), "I3DConv")
    turned = copy.deepcopy(network)
    for parameter in network.parameters():
        if parameter.ndim == 5:
            nn.init.normal_(parameter, std=0.3)
    for a, b in zip(turned.parameters(), network.parameters()):
        a.copy_(b.permute(order) if b.ndim == 5 else b)
    x = randn(1, 3, 8, 12, 16)
    assert_same(turned(x.permute(order)), network(x).permute(order))


def test_equals_the_same_network_written_in_3d():
    """I3D: every layer's own 3D kind, with the weights of the 2D one inflated."""
    flat = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.InstanceNorm2d(8),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Dropout2d(), nn.GroupNorm(2, 8),
        nn.ConvTranspose2d(8, 6, 2, 2), nn.AvgPool2d(2), nn.Conv2d(6, 6, 3, groups=3),
        nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(6, 2),
    ).double()  # fmt: skip
    solid = nn.Sequential(
        nn.Conv3d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm3d(8), nn.ReLU(True),
        nn.MaxPool3d(3, 2, 1), nn.Conv3d(8, 8, 3, padding=2, dilation=2), nn.InstanceNorm3d(8),
        nn.Upsample(scale_factor=2, mode="trilinear"), nn.Dropout3d(), nn.GroupNorm(2, 8),
        nn.ConvTranspose3d(8, 6, 2, 2), nn.AvgPool3d(2), nn.Conv3d(6, 6, 3, groups=3),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2),
    ).double()  # fmt: skip
    with torch.no_grad():
        for a, b in zip(solid.parameters(), flat.parameters()):
            share = 1 if isinstance(flat[9], nn.ConvTranspose2d) and b is flat[9].weight else 3
            a.copy_(b[:, :, None].expand_as(a) / share if a.ndim == 5 else b)
    network = isotropic(flat, "I3DConv")
    assert [type(m) for m in network.model if not isinstance(m, SliceConv)] == [
        type(m) for m in solid if not isinstance(m, nn.Conv3d)
    ]
    x = randn(2, 3, 12, 20, 16)
    for train in (False, True):
        torch.manual_seed(1)
        got = network.train(train)(x)
        torch.manual_seed(1)
        assert_same(got, solid.train(train)(x))
    assert_same(network.model[1].running_var, solid[1].running_var)


# Each module of two axes, and the one of three that it is to become.
MODULES = {
    "lp": (nn.LPPool2d(2, 2), nn.LPPool3d(2, 2)),
    "average, own divisor": (
        nn.AvgPool2d(2, divisor_override=3), nn.AvgPool3d(2, divisor_override=6)
    ),
    "adaptive max": (nn.AdaptiveMaxPool2d((2, 2)), nn.AdaptiveMaxPool3d(2)),
    "adaptive, as large": (nn.AdaptiveAvgPool2d((None, None)), nn.Identity()),
    "zeros": (nn.ZeroPad2d(1), nn.ZeroPad3d(1)),
    "constant": (nn.ConstantPad2d((1, 2, 1, 2), 3.0), nn.ConstantPad3d((1, 2, 1, 2, 1, 2), 3.0)),
    "reflection": (nn.ReflectionPad2d(2), nn.ReflectionPad3d(2)),
    "replication": (nn.ReplicationPad2d(2), nn.ReplicationPad3d(2)),
    "circular": (nn.CircularPad2d(2), nn.CircularPad3d(2)),
    "nearest": (nn.UpsamplingNearest2d(scale_factor=2), nn.Upsample(scale_factor=2)),
    "bilinear": (
        nn.UpsamplingBilinear2d(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True),
    ),
    "softmax": (nn.Softmax2d(), nn.Softmax(1)),
    "softmax, negative axis": (nn.Softmax(dim=-3), nn.Softmax(1)),
    "gated": (nn.GLU(dim=-3), nn.GLU(1)),
    "response": (nn.LocalResponseNorm(3), nn.LocalResponseNorm(3)),
    "flatten": (nn.Flatten(2, 3), nn.Flatten(2)),
    "instance": (
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_becomes_its_3d_kind(kind):
    flat, solid = MODULES[kind]
    x = randn(2, 4, 6, 8, 10, dtype=torch.float32)
    assert_same(isotropic(flat)(x), solid(x), 1e-6)
    unpool = isotropic(nn.MaxUnpool2d(2))
    assert_same(
        unpool(*F.max_pool3d(x, 2, return_indices=True)),
        F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2),
    )


UPSAMPLE = {
    "pair": nn.Upsample(size=(8, 8)),
    "number": nn.Upsample(size=8, mode="bilinear"),
    "nearest": nn.UpsamplingNearest2d(size=8),
    "bilinear": nn.UpsamplingBilinear2d(size=(8, 8)),
}


@pytest.mark.parametrize("kind", UPSAMPLE)
def test_a_fixed_size_to_upsample_to_is_taken_of_a_cube_and_of_a_map_met_before(kind):
    flat = UPSAMPLE[kind]
    options = dict(mode=flat.mode.replace("bilinear", "trilinear"))
    options |= dict(align_corners=flat.align_corners)
    cube, volume = randn(1, 3, 4, 4, 4), randn(1, 3, 6, 8, 8)
    assert_same(isotropic(flat)(cube), F.interpolate(cube, (8, 8, 8), **options))
    pooled = isotropic(nn.Sequential(nn.MaxPool2d(2), flat))
    expected = F.interpolate(F.max_pool3d(volume, 2), (6, 8, 8), **options)
    assert_same(pooled(volume), expected)
    with pytest.raises(ValueError, match=r"^1: interpolate to size=.*nothing says how deep"):
        pooled(randn(1, 3, 6, 10, 10))


@pytest.mark.parametrize("conv", ISOTROPIC)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_convolutions_that_do_not_pad_with_zeros(conv, mode):
    padded = nn.Conv2d(3, 6, 3, 2, 1, padding_mode=mode).double()
    network = isotropic(padded, conv)
    bare = nn.Conv2d(3, 6, 3, 2).double()
    bare.load_state_dict(padded.state_dict())
    x = randn(1, 3, 5, 6, 7)
    assert_same(network(x), isotropic(bare, conv)(F.pad(x, (1,) * 6, mode)))


class Standardised(nn.Conv2d):
    """A convolution with code of its own, as weight standardisation has it."""

    def forward(self, x):
        weight = self.weight - self.weight.flatten(1).mean(1).view(
            -1, *[1] * (self.weight.ndim - 1)
        )
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class NextSlice(SliceConv):
    """An operator of one's own, from README.md."""

    def fuse(self, x, thickness):
        return (x + shift_depth(x, 1)) / 2


@pytest.fixture
def next_slice():
    register_operator(NextSlice)
    yield
    del OPERATORS["NextSlice"]


WITHOUT_MORE_PARAMETERS = ("ACSConv", "MeanACSConv", "SliceConv", "TSMConv", "NextSlice")


@pytest.mark.usefixtures("next_slice")
@pytest.mark.parametrize("conv", [*WITHOUT_MORE_PARAMETERS, "I3DConv"])
def test_convolutions_with_code_of_their_own(conv):
    own = Standardised(8, 6, 3, 2, 1).double()
    plain = nn.Conv2d(8, 6, 3, 2, 1).double()
    plain.weight.data.copy_(own.weight - own.weight.mean((1, 2, 3), keepdim=True))
    plain.bias.data.copy_(own.bias)
    x = randn(1, 8, 5, 6, 7)
    network = isotropic(own, conv, 8)
    assert_same(network(x), isotropic(plain, conv, 8)(x))
    network(x).sum().backward()
    assert network.model.weight.grad is not None


@pytest.mark.usefixtures("next_slice")
@pytest.mark.parametrize("conv", WITHOUT_MORE_PARAMETERS)
def test_a_functional_convolution_of_a_batch_and_of_one_sample(conv):
    plain = nn.Conv2d(8, 6, 3, padding=1).double()
    x = randn(2, 8, 5, 6, 7)
    expected = isotropic(plain, conv, 8)(x)
    for code in (
        lambda x: F.conv2d(x, plain.weight, plain.bias, padding=1),
        lambda x: torch.stack([F.conv2d(y, plain.weight, plain.bias, padding=1) for y in x]),
    ):
        # The weights are the closure's, not those of a module.
        assert_same(isotropic(Code(code), conv)(x), expected)


def test_weights_that_are_computed():
    conv = nn.Conv2d(3, 6, 3, 2, 1).double()
    expected = isotropic(conv)
    normed = torch.nn.utils.parametrizations.weight_norm(copy.deepcopy(conv))
    x = randn(1, 3, 5, 6, 7)
    assert_same(isotropic(nn.Sequential(normed))(x), expected(x))
    with pytest.raises(ValueError, match=r"^0: its own code computes a kernel"):
        isotropic(nn.Sequential(normed), "I3DConv")


@pytest.mark.parametrize("conv", ["ACSConv", "I3DConv", "TSMConv"])
def test_a_first_convolution_that_stays_is_not_skipped_silently(conv):
    own = Standardised(8, 6, 3)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3))
    for stem, why in ((own, "a forward of its own"), (normed, "is computed")):
        model = nn.Sequential(stem, nn.Conv2d(6, 8, 3))
        with pytest.raises(ValueError, match=f"^0: skip_first_conv=True does not reach .*{why}"):
            isotropic(model, conv, 8, skip_first_conv=True)
        isotropic(model, "SliceConv", 8, skip_first_conv=True)  # which fuses nowhere
    second = isotropic(nn.Sequential(nn.Conv2d(8, 8, 3), own), conv, 8, skip_first_conv=True)
    assert type(second.model[0]) is SliceConv


# What is kept


def test_the_given_network_stays_and_its_keys_and_weights_are_kept():
    model = network_2d("ResNetFPN")
    model.backbone.layer1.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    for conv in ("ACSConv", "I3DConv"):
        network = isotropic(model, conv)
        state = network.model.state_dict()
        assert list(state) == list(before) and not network.training
        for key, value in state.items():
            flat = before[key]
            if value.ndim == 5:
                flat = flat[:, :, None].expand_as(value) / value.shape[2]
            assert torch.equal(value, flat), key
        grads = {name: p.requires_grad for name, p in model.named_parameters()}
        assert {n: p.requires_grad for n, p in network.model.named_parameters()} == grads
        sum(y.sum() for y in network(randn(1, 3, 16, 16, 16))["maps"]).backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        assert not any(v for k, v in vars(module).items() if k.endswith("_hooks"))
        assert "3d" not in type(module).__name__.lower()
    assert all(p.grad is None for p in model.parameters())


def test_shared_transposed_convolutions_and_weights_stay_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2)
            self.again, self.twin = self.up, nn.ConvTranspose2d(4, 4, 2, 2)
            self.twin.weight = self.up.weight

        def forward(self, x):
            return self.twin(self.again(self.up(self.first(x))))

    network = isotropic(Tied())
    model = network.model
    assert model.up is model.again and model.twin.weight is model.up.weight
    assert network(randn(1, 3, 2, 2, 2, dtype=torch.float32)).shape == (1, 4, 16, 16, 16)


@pytest.mark.parametrize("stem", ["middle", "sum"])
def test_a_grey_stem_and_the_first_convolution(stem):
    model = network_2d("ResNet")
    network = isotropic(model, in_channels=1, stem=stem)
    weight = model.conv1.weight
    expected = weight[:, 1:2] if stem == "middle" else weight.sum(1, True)
    assert torch.equal(network.model.conv1.weight, expected)
    assert type(network.model.conv1) is ACSConv
    skipping = isotropic(model, in_channels=1, skip_first_conv=True)
    assert type(skipping.model.conv1) is SliceConv


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_are_the_same_and_apart(duplicate):
    network = isotropic(network_2d("ResNetFPN"))
    x = randn(1, 3, 16, 16, 16)
    expected = network(x)
    twin = duplicate(network)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    nn.init.zeros_(twin.model.output[0].weight)
    torch.testing.assert_close(network(x), expected, rtol=0, atol=0)


# Calls: nested, in threads, in backward passes, after errors


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_runs_functional_code_again(use_reentrant):
    class Pooling(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x):
            gate = torch.sigmoid(self.conv(x).mean((2, 3))).view(*x.shape[:2], 1, 1)
            return F.interpolate(F.max_pool2d(x * gate, 2), size=x.shape[-2:], mode="bilinear")

    def gradients(use_reentrant):
        model = network_2d(ResNet, use_reentrant=use_reentrant)
        model.layer1.append(Pooling(8).double())
        torch.manual_seed(1)
        nn.init.normal_(model.layer1[-1].conv.weight)
        nn.init.zeros_(model.layer1[-1].conv.bias)
        network = isotropic(model)
        network(randn(2, 3, 16, 24, 16)).square().sum().backward()
        assert RUNNING.functions is None
        assert F.max_pool2d(randn(1, 2, 4, 4), 2).shape == (1, 2, 2, 2)
        return [p.grad for p in network.parameters()]

    torch.testing.assert_close(gradients(use_reentrant), gradients(None), rtol=0, atol=1e-9)


class LastGate(nn.Module):
    """(N, H, W, C) maps: what axis 3 is, the network's code before it says."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x) * x.mean(3, keepdim=True)


class Smooth(nn.Module):
    """(N, H, W) maps, which have as many axes in a volume as images have."""

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return F.avg_pool2d(x.abs() ** self.power, 3, 1, 1)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.gate, self.smooth, self.use_reentrant = LastGate(), Smooth(), use_reentrant

    def run(self, module, x):
        if self.use_reentrant is None:
            return module(x)
        return checkpoint(module, x, use_reentrant=self.use_reentrant)

    def forward(self, x):
        y = self.run(self.gate, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y * self.run(self.smooth, y.mean(1))[:, None]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_code_that_runs_again_knows_the_maps_that_it_was_given(use_reentrant):
    def gradients(use_reentrant):
        network = isotropic(network_2d(Checkpointed, use_reentrant=use_reentrant))
        network(randn(1, 3, 9, 10, 11).requires_grad_())  # the last maps are those that count
        network(randn(2, 3, 5, 6, 7).requires_grad_()).square().sum().backward()
        return [p.grad for p in network.parameters()]

    torch.testing.assert_close(gradients(use_reentrant), gradients(None), rtol=0, atol=1e-9)


def test_networks_within_networks_and_in_threads():
    model = network_2d("DeepLabV3Plus")
    network, other = isotropic(model), isotropic(network_2d("UNet"), "I3DConv")
    x, y = randn(1, 3, 16, 16, 24), randn(1, 3, 8, 8, 8)
    expected = network(x), other(y)
    network.model.high.register_forward_hook(lambda *_: assert_same(other(y), expected[1]))
    assert_same(network(x), expected[0])
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: network(x)})) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(results[0], expected[0])
    assert_same(results[1], expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ResNet", "UNet"])
def test_compiled_equals_eager(kind):
    network = isotropic(network_2d(kind))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = randn(1, 3, 16, 16, 24)
    assert_same(compiled(x), network(x))


def test_an_operator_of_ones_own_runs_as_it_is_written():
    """Its own calls, a (C, 1, 1, 1) factor here, are for volumes."""
    register_operator(NeighbourMean)
    try:
        network = isotropic(nn.Conv2d(3, 4, 3, 2, 1).double(), "NeighbourMean")
        nn.init.normal_(network.model.strength)
        x = randn(3, 3, 5, 6, 7)
        assert_same(network(x), network.model(x, None))
    finally:
        del OPERATORS["NeighbourMean"]


class Autoencoder(nn.Module):
    """Goes back to the size that it was given, odd or even, as SegNet and older U-Nets do."""

    def __init__(self, axes):
        super().__init__()
        three = axes == 3
        self.conv = (nn.Conv3d if three else nn.Conv2d)(3, 4, 3, stride=2, padding=1)
        self.pool = (nn.MaxPool3d if three else nn.MaxPool2d)(2, return_indices=True)
        self.unpool = (nn.MaxUnpool3d if three else nn.MaxUnpool2d)(2)
        transposed = nn.ConvTranspose3d if three else nn.ConvTranspose2d
        self.up = transposed(4, 2, 3, stride=2, padding=1)

    def forward(self, x):
        y = self.conv(x)
        z = self.unpool(*self.pool(y), output_size=y.size())
        return self.up(z, output_size=x.shape[2:]) + self.up(z, x.size())


@pytest.mark.parametrize("size", [(9, 14, 11), (12, 9, 16)])
def test_modules_that_are_told_the_size_to_return_to(size):
    flat, solid = Autoencoder(2).double(), Autoencoder(3).double()
    network = isotropic(flat, "I3DConv")
    solid.load_state_dict(network.model.state_dict())
    x = randn(2, 3, *size)
    got = network(x)
    assert got.shape == (2, 2, *size)
    assert_same(got, solid(x))


class GlobalContext(nn.Module):
    """A pooled vector goes through convolutions (GCNet; squeeze and excitation likewise)."""

    def __init__(self):
        super().__init__()
        self.mask, self.add = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        weights = self.mask(x).view(b, 1, h * w).softmax(-1)
        context = (x.view(b, c, h * w) * weights).sum(-1)
        return x + self.add(context.view(b, c, 1, 1))


def test_a_pooled_vector_goes_through_convolutions():
    flat = GlobalContext().double()
    x = randn(2, 3, 4, 5, 6)
    mask, add = (m.weight[:, :, 0, 0] for m in (flat.mask, flat.add))
    weights = (torch.einsum("oc,ncdhw->nodhw", mask, x).flatten(2)).softmax(2)
    context = torch.einsum("oc,nc->no", add, (x.flatten(2) * weights).sum(2)) + flat.add.bias
    assert_same(isotropic(flat)(x), x + context[..., None, None, None])


# What is refused, by the module's name


class Code(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: x.mean(2), "mean over axes"),
        (lambda x: F.pixel_shuffle(x, 2), "pixel_shuffle has no counterpart"),
        (lambda x: F.max_pool2d(x, (1, 2)), "along height"),
    ],
)
def test_code_without_counterpart_names_the_module(function, message):
    network = isotropic(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ModuleDict({"a": Code(function)})["a"])
    )
    with pytest.raises(ValueError, match=rf"^1: .*{message}"):
        network(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(RuntimeError, match="3D or 4D"):
        F.max_pool2d(torch.zeros(1, 3, 4, 4, 4), 2)  # it is over


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4)])
def test_modules_of_the_last_axis_are_refused_where_it_is_the_width(module):
    network = isotropic(nn.Sequential(nn.Conv2d(3, 4, 1), module))
    with pytest.raises(ValueError, match=r"^1: .* acts on the last axes of a map"):
        network(torch.zeros(1, 3, 4, 4, 4))


def test_other_errors_carry_a_note_with_the_modules_name():
    network = isotropic(NETWORKS["VGG"]())
    with pytest.raises(RuntimeError) as caught:
        network(torch.zeros(1, 3, 16, 16, 16))
    assert "In classifier.0 of a network converted to 3D" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Conv2d(4, 4, (1, 3)), "needs a square kernel"),
        (nn.Conv2d(4, 4, 3, padding=(0, 1)), "padding is 0 along height and 1 along width"),
        (nn.Conv2d(4, 4, 3, stride=(1, 2)), "stride is 1 along height"),
        (nn.Conv2d(4, 4, 3, groups=2), "ACSConv splits channels"),
        (nn.MaxPool2d((1, 2)), "kernel_size is 1 along height"),
        (nn.ZeroPad2d((1, 0, 2, 0)), "padding"),
        (nn.ConvTranspose2d(4, 4, (1, 2)), "kernel of 1 x 2"),
        (nn.ConvTranspose2d(4, 4, 2, (1, 2)), "stride is 1 along height"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "bicubic"),
        (nn.PixelShuffle(2), "PixelShuffle rearranges"),
        (nn.Unfold(2), "Unfold rearranges"),
        (nn.LayerNorm((4, 8, 8)), "as large as the image"),
        (nn.LazyBatchNorm2d(), "no sizes yet"),
        (nn.LazyConv2d(4, 3), "no weight yet"),
        (nn.Conv3d(4, 4, 3), "Conv3d would mix the slices"),
        (isotropic(nn.Conv2d(3, 4, 3)), "IsotropicNetwork is 3D already"),
    ],
)
def test_modules_without_counterpart_are_named(module, message):
    with pytest.raises(ValueError, match=rf"^1\.a: .*{message}"):
        isotropic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleDict({"a": module})))


def test_options_are_refused():
    for options, message in (
        (dict(depth="all"), "depth must be 'keep' or 'isotropic'"),
        (dict(depth="isotropic"), "AlignShiftConv works between slices of one stack"),
        (dict(conv="A3DConv", num_slices=3, depth="isotropic"), "A3DConv works between slices"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_to_3d(network_2d("ResNet"), **options)


# Networks of others


def check_network(model, shape=(32, 32, 32), in_channels=3, plain=None):
    """Sizes, maps as in 2D, and in each kind that every input voxel's slice counts."""
    model.eval()  # mmdet's return nothing
    # Of a volume as deep as it is wide, an image is what a side of it is.
    flat = tree_leaves(model(torch.zeros(1, in_channels, *shape[1:])))
    for conv in ("ACSConv", "I3DConv", "SliceConv"):
        network = isotropic(model, conv, in_channels)
        assert isinstance(network, IsotropicNetwork)
        kinds = (nn.Conv2d, nn.ConvTranspose2d) if conv == "I3DConv" else nn.ConvTranspose2d
        assert size(network) == size_3d(model, kinds)
        with torch.no_grad():
            output = tree_leaves(network(randn(1, in_channels, *shape, dtype=torch.float32)))
        for y, z in zip(output, flat):
            assert y.shape == (*z.shape[:2], *z.shape[3:], *z.shape[2:])
        if conv == "I3DConv" and plain is not None:
            assert size(network) == plain


def test_mmdets_resnet():
    from mmdet.models.backbones import ResNet

    check_network(ResNet(18), plain=33_203_904)
    dilated = ResNet(
        50, base_channels=8, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), deep_stem=True,
        avg_down=True,
    )  # fmt: skip
    check_network(dilated)


def import_or_skip(module, why):
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision of another torch: RuntimeError
        pytest.skip(f"{why}: {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "net, options",
    [
        ("UNet", dict(channels=(4, 8, 16), strides=(2, 2), num_res_units=1)),
        ("BasicUNet", dict(features=(4, 4, 8, 8, 8, 4))),
        ("SegResNet", dict(init_filters=8)),
        ("DenseNet", dict(init_features=8, growth_rate=4, block_config=(2, 2))),
    ],
)
def test_monais_networks_equal_their_own_3d_kind(net, options):
    nets = import_or_skip("monai.networks.nets", "needs monai, the extra [volumes]")
    options = dict(in_channels=1, out_channels=2, **options)
    flat, solid = (getattr(nets, net)(spatial_dims=n, **options).eval() for n in (2, 3))
    network = isotropic(flat, "I3DConv", 1)
    solid.load_state_dict(network.model.state_dict())
    assert size(network) == size(solid)
    x = randn(1, 1, 32, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(network(x), solid(x), rtol=1e-4, atol=1e-5)
    check_network(flat, in_channels=1)


def test_mmsegmentations_deeplab_and_unet():
    import_or_skip("mmseg.models", "needs onedl-mmsegmentation, docs/operators.md")
    from mmseg.models.backbones import ResNetV1c, UNet
    from mmseg.models.backbones.unet import DeconvModule, InterpConv
    from mmseg.models.decode_heads import DepthwiseSeparableASPPHead

    norm = dict(norm_cfg=dict(type="BN"))
    head = DepthwiseSeparableASPPHead(
        in_channels=128, in_index=3, channels=8, dilations=(1, 2, 4), c1_in_channels=16,
        c1_channels=4, num_classes=3, **norm,
    )  # fmt: skip
    backbone = ResNetV1c(
        depth=18, base_channels=16, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4),
        contract_dilation=True, **norm,
    )  # fmt: skip
    check_network(nn.Sequential(backbone, head))
    for upsample in (InterpConv, DeconvModule):
        check_network(
            UNet(
                3, 4, 3, (1, 1, 1), (1, 1, 1), (1, 1), (True, True), (1, 1, 1), (1, 1),
                upsample_cfg=dict(type=upsample), act_cfg=dict(type="ReLU"), **norm,
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {}),
        ("shufflenet_v2_x0_5", {}),
        ("convnext_tiny", {}),
        ("deeplabv3_mobilenet_v3_large", dict(weights_backbone=None)),
    ],
)
def test_torchvisions_networks(name, options):
    models = import_or_skip("torchvision.models", "torchvision")
    plain = 33_716_904 if name == "resnet18" else None
    check_network(models.get_model(name, weights=None, **options), plain=plain)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0"])
def test_timms_networks(name):
    timm = import_or_skip("timm", "timm")
    check_network(timm.create_model(name, num_classes=2))
