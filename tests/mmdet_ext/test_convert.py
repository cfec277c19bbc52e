"""convert_to_3d: what a converted network computes, what it keeps, and what is refused."""

import collections
import copy
import importlib
import io
import pickle
import subprocess
import sys
import threading
import warnings
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves, tree_map, tree_structure
from torch.utils.checkpoint import checkpoint

from mmdet_ext.convert import convert_to_3d
from mmdet_ext.ops import OPERATORS, AlignShiftConv, SliceConv, TSMConv, fold
from mmdet_ext.slice_network import map_tensors

from .networks_2d import NETWORKS, ResNet, ResNetFPN

DOUBLE = torch.float64
FUSING = sorted(set(OPERATORS) - {"SliceConv"})


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mm(*values, dtype=DOUBLE):
    return torch.tensor(values, dtype=dtype)


def network_2d(kind, **options):
    """In eval mode and float64, BatchNorm not the identity."""
    torch.manual_seed(0)
    network = (NETWORKS[kind] if isinstance(kind, str) else kind)(**options).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
            ):  # fmt: skip
                nn.init.uniform_(values, low, high)
    return network


def size(kind):
    return (16, 16) if kind == "VGG" else (16, 24)


def options(operator, depth):
    return {"num_slices": depth} if "A3D" in operator else {}


def slice_of(output, b, d):
    """The output that belongs to slice d of volume b, as a batch of one image."""
    return tree_map(lambda y: y[b : b + 1, :, d], output)


def assert_slicewise(network, model, volume, thickness=None):
    """Every slice comes out as the 2D `model` answers it alone."""
    tolerance = 1e-10 if volume.dtype == torch.float64 else 1e-5
    with torch.no_grad():
        output = network(volume, thickness)
        for b, d in product(range(volume.shape[0]), range(volume.shape[2])):
            expected = model(volume[b : b + 1, :, d])
            torch.testing.assert_close(slice_of(output, b, d), expected, rtol=0, atol=tolerance)


def operators_of(network):
    return {n: m for n, m in network.model.named_modules() if isinstance(m, SliceConv)}


# What a converted network computes


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_fusion_every_slice_is_answered_as_in_2d(kind):
    model = network_2d(kind)
    network = convert_to_3d(model, "SliceConv", in_channels=3)
    assert not any(isinstance(module, nn.Conv2d) for module in network.modules())
    assert_slicewise(network, model, randn(2, 3, 3, *size(kind)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_alignshift_at_infinite_thickness_is_the_2d_network(kind):
    model = network_2d(kind)
    network = convert_to_3d(model, "AlignShiftConv", in_channels=3, skip_first_conv=False)
    volume = randn(2, 3, 3, *size(kind))
    assert_slicewise(network, model, volume, mm(torch.inf, torch.inf))
    with pytest.raises(AssertionError):
        assert_slicewise(network, model, volume, mm(torch.inf, 2.0))


@pytest.mark.parametrize("operator", FUSING)
@pytest.mark.parametrize("kind", NETWORKS)
def test_runs_forward_and_backward(kind, operator):
    model = network_2d(kind).float().train()
    network = convert_to_3d(model, operator, **options(operator, 3))
    volume = randn(2, 1, 3, *size(kind), dtype=torch.float32)
    output = network(volume, mm(1.0, 5.0))
    tree_map(lambda y: (y.shape[0] == 2 and y.shape[2] == 3) or pytest.fail(str(y.shape)), output)
    loss = 0
    for y in tree_leaves(output):
        loss = loss + (y * randn(*y.shape, dtype=torch.float32)).sum()
    loss.backward()
    for name, parameter in network.named_parameters():
        if "fc" in name and kind == "ResNetFPN":
            continue  # the classifier that the pyramid leaves out
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A convolution ahead of a GroupNorm or BatchNorm shifts nothing: its bias has none.
        assert parameter.grad.any() or name.endswith("bias"), name


def reach(model):
    """How many slices away a border may be felt, in slices: every convolution but the first adds
    half its kernel (I3D), a shift one."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(max(1, conv.kernel_size[0] // 2) for conv in convs[1:])


@pytest.mark.parametrize(
    "operator", ["TSMConv", "AlignShiftConv", "I3DConv", "P3DConv", "A3DConv", "AlignA3DConv"]
)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_volume_of_equal_slices_is_answered_as_one_image(kind, operator):
    model = network_2d(kind)
    depth = 2 * reach(model) + 1
    image = randn(1, 3, 16, 16)
    volume = image.unsqueeze(2).expand(-1, -1, depth, -1, -1)
    network = convert_to_3d(model, operator, in_channels=3, **options(operator, depth))
    for name, parameter in network.named_parameters():
        if name.endswith("fusion_weight"):
            parameter.data.copy_(torch.eye(depth)[:, :, None])
    with torch.no_grad():
        output, expected = network(volume, mm(4.0)), model(image)
    inside = range(depth) if operator in ("P3DConv", "A3DConv", "AlignA3DConv") else [depth // 2]
    for d in inside:
        torch.testing.assert_close(slice_of(output, 0, d), expected, rtol=0, atol=1e-10)
    if len(inside) == 1:
        with pytest.raises(AssertionError):  # the border is felt at the border
            torch.testing.assert_close(slice_of(output, 0, 0), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_neighbours_are_seen_where_the_operator_fuses(operator):
    network = convert_to_3d(network_2d("DenseNet"), operator, **options(operator, 5))
    for name, parameter in network.named_parameters():
        if name.endswith(("depth_weight", "fusion_weight")):
            nn.init.normal_(parameter, std=0.3)
    volume = randn(1, 1, 5, 16, 16)
    moved = volume.clone()
    moved[:, :, 2] += randn(16, 16, seed=1)
    with torch.no_grad():
        difference = network(moved, mm(2.0)) - network(volume, mm(2.0))
    changed = difference.abs().amax((0, 1, 3, 4)) > 1e-9
    if operator == "SliceConv":
        assert changed.tolist() == [False, False, True, False, False]
    else:
        assert changed[1:4].all()


def test_equals_the_operators_put_together_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, groups=2),
    ).double()  # fmt: skip
    first, norm, _, second, _, third = model
    network = convert_to_3d(model, conv=dict(type="AlignShiftConv", n_fold=4), stem="sum")
    stem = SliceConv(1, 8, 3, 2, 1).double()
    stem.load_state_dict({"weight": first.weight.sum(1, keepdim=True), "bias": first.bias})
    align1 = AlignShiftConv(8, 8, 1, bias=False, n_fold=4).double()
    align1.load_state_dict(second.state_dict())
    align2 = AlignShiftConv(8, 6, 3, padding=1, groups=2, n_fold=4).double()
    align2.load_state_dict(third.state_dict())

    volume, thickness = randn(2, 1, 4, 10, 12), mm(1.0, 5.0)
    x = stem(volume)
    mean, variance = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4), unbiased=False)
    shape = (1, 8, 1, 1, 1)
    x = (x - mean.view(shape)) / (variance.view(shape) + norm.eps).sqrt()
    expected = align2(align1(x.relu(), thickness).relu(), thickness)
    torch.testing.assert_close(network(volume, thickness), expected, rtol=0, atol=1e-10)


def test_every_operator_is_given_the_volumes_and_their_thickness():
    network = convert_to_3d(network_2d("DeepLabV3Plus"))
    seen = {}

    def record(module, args):
        seen[module] = args

    for operator in operators_of(network).values():
        operator.register_forward_pre_hook(record)
    thickness = mm(1.0, 5.0)
    network(randn(2, 1, 3, 16, 16), thickness)
    assert len(seen) == len(operators_of(network)) > 5
    for x, given_thickness in seen.values():
        assert x.ndim == 5 and (x.shape[0], x.shape[2]) == (2, 3)
        assert given_thickness is thickness


@pytest.mark.parametrize("kind", ["UNet", "ResNetFPN"])
def test_volumes_of_a_batch_do_not_mix(kind):
    network = convert_to_3d(network_2d(kind))
    volume, thickness = randn(3, 1, 4, 16, 16), mm(1.0, 5.0, torch.inf)
    together = network(volume, thickness)
    for b in range(3):
        alone = network(volume[b : b + 1], thickness[b : b + 1])
        torch.testing.assert_close(tree_map(lambda y, b=b: y[b : b + 1], together), alone)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    kernel=pairs, stride=pairs, dilation=pairs, padding=pairs | st.sampled_from(["same", "valid"]),
    groups=st.integers(1, 3), bias=st.booleans(), batch=st.integers(1, 3), depth=st.integers(1, 3),
)  # fmt: skip
def test_any_convolution_is_kept(kernel, stride, dilation, padding, groups, bias, batch, depth):
    if padding == "same":
        stride = 1
    conv = nn.Conv2d(
        2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias, dtype=DOUBLE
    )
    # The model may be a convolution itself.
    network = convert_to_3d(conv, "SliceConv", in_channels=2 * groups)
    assert_slicewise(network, conv, randn(batch, 2 * groups, depth, 8, 9))


# What goes in and out


class Answer(collections.namedtuple("Answer", "logits extra")):
    pass


class ManyOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.table = nn.Parameter(torch.zeros(8, 2))

    def forward(self, x):
        y = self.conv(input=x)
        answer = Answer([y, None, "text"], {"score": y.mean((1, 2, 3)), "loss": y.sum()})
        tokens = y.flatten(2).transpose(1, 2)
        return collections.OrderedDict(
            answer=answer, tokens=tokens, table=self.table, pooled=y.mean((2, 3))
        )


def test_outputs_of_all_kinds_get_their_depth_back():
    model = ManyOutputs().double()
    volume = randn(2, 1, 3, 4, 5)
    images = fold(volume)
    output = convert_to_3d(model, "SliceConv")(volume)
    expected = model(images)
    assert type(output) is collections.OrderedDict and type(output["answer"]) is Answer
    logits, nothing, text = output["answer"].logits
    assert (nothing, text) == (None, "text")
    y = expected["answer"].logits[0]
    for b, d in product(range(2), range(3)):
        n = 3 * b + d
        assert torch.equal(logits[b, :, d], y[n])
        assert torch.equal(output["tokens"][b, :, d], expected["tokens"][n])  # (B, HW, D, C)
        assert torch.equal(output["pooled"][b, :, d], expected["pooled"][n])
        assert output["answer"].extra["score"][b, d] == expected["answer"].extra["score"][n]
    assert output["answer"].extra["loss"].ndim == 0
    assert output["table"].shape == (8, 2)


class Neck(nn.Module):
    """Takes several maps in whatever it is told to."""

    def __init__(self, take):
        super().__init__()
        self.take = take
        self.convs = nn.ModuleList([nn.Conv2d(c, 4, 1) for c in (8, 16)])

    def forward(self, maps):
        return [conv(x) for conv, x in zip(self.convs, self.take(maps))]


@pytest.mark.parametrize(
    "give, take",
    [(tuple, list), (list, list), (lambda maps: {"a": maps[0], "b": maps[1]}, dict.values)],
)
def test_several_volumes_go_in(give, take):
    model = Neck(take).double()
    network = convert_to_3d(model, "SliceConv", in_channels=8)
    maps = [randn(2, 8, 3, 4, 6), randn(2, 16, 3, 2, 3)]
    output = network(give(maps))
    for conv, x, y in zip(model.convs, maps, output):
        for d in range(3):
            torch.testing.assert_close(y[:, :, d], conv(x[:, :, d]))


leaves = st.sampled_from([torch.zeros(2), torch.ones(()), None, 1, "x"])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.tuples(inner, inner).map(lambda pair: Answer(*pair))
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_map_tensors_keeps_the_structure(tree):
    mapped = map_tensors(lambda x: x + 1, tree)
    assert tree_structure(mapped) == tree_structure(tree)
    for before, after in zip(tree_leaves(tree), tree_leaves(mapped)):
        if isinstance(before, torch.Tensor):
            assert torch.equal(after, before + 1)
        else:
            assert after is before


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 1, 16, 16), r"\(B, C, D, H, W\) volume, got \(2, 1, 16, 16\); one image"),
        ((16, 16), r"\(B, C, D, H, W\) volume, got \(16, 16\)$"),
    ],
)
def test_what_is_not_a_volume_is_refused(shape, message):
    network = convert_to_3d(network_2d("ResNet"))
    for volume in (torch.zeros(shape), [torch.zeros(2, 1, 3, 16, 16), torch.zeros(shape)]):
        with pytest.raises(ValueError, match=message):
            network(volume, mm(1.0, 2.0))


def test_volumes_of_unequal_depth_and_none_at_all_are_refused():
    network = convert_to_3d(Neck(list), "SliceConv", in_channels=8)
    with pytest.raises(ValueError, match=r"equal in B and D, got \(2, 8, 3.*\(2, 16, 4"):
        network([torch.zeros(2, 8, 3, 4, 4), torch.zeros(2, 16, 4, 4, 4)])
    with pytest.raises(ValueError, match="got NoneType"):
        network(None)


def test_thickness_is_checked():
    network = convert_to_3d(network_2d("ResNet"))
    volume = randn(2, 1, 3, 16, 16)
    for wrong in (mm(1.0), mm(1.0, 2.0, 3.0), mm(1.0, 2.0).view(2, 1), 5.0):
        with pytest.raises(ValueError, match=r"thickness must be a tensor of shape \(2,\)"):
            network(volume, wrong)
    with pytest.raises(ValueError, match="AlignShiftConv needs the slice thickness"):
        network(volume)
    with pytest.raises(ValueError, match="must be > 0 mm"):
        network(volume, mm(1.0, 0.0))


class Regrouping(nn.Module):
    def __init__(self, regroup):
        super().__init__()
        self.regroup = regroup
        self.inner = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)})

    def forward(self, x):
        return self.inner["conv"](self.regroup(x))


@pytest.mark.parametrize(
    "regroup", [lambda x: torch.cat([x, x.flip(-1)]), lambda x: x[:1], lambda x: x[:, 0]]
)
def test_a_network_that_regroups_its_images_is_refused(regroup):
    network = convert_to_3d(Regrouping(regroup), "SliceConv")
    with pytest.raises(ValueError, match=r"inner\.conv: expected the 2 x 3 slices"):
        network(torch.zeros(2, 1, 3, 4, 4))


# What is kept


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_weights_are_kept(operator):
    model = network_2d("ResNetFPN").to(torch.bfloat16)
    model.backbone.bn1.train()
    model.backbone.layer1.requires_grad_(False)
    network = convert_to_3d(model, operator, in_channels=3, **options(operator, 3))
    assert not network.training
    assert {n: m.training for n, m in model.named_modules()} == {
        n: m.training for n, m in network.model.named_modules()
    }
    state, converted = model.state_dict(), network.model.state_dict()
    assert list(state) == [key for key in converted if key in state]
    own = {key.rpartition(".")[0] for key in converted if key not in state}
    assert own <= {n for n, m in network.model.named_modules() if isinstance(m, SliceConv)}
    for key, value in converted.items():
        # A module in float64 or on a GPU is to have no parameter left behind.
        assert value.dtype == torch.int64 or value.dtype == torch.bfloat16, key
        if operator == "I3DConv" and value.ndim == 5:
            assert torch.equal(value, state[key][:, :, None].expand_as(value) / value.shape[2])
        elif key in state:
            assert torch.equal(value, state[key]), key
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in network.model.named_parameters():
        assert parameter.requires_grad == grads.get(name, True), name


@pytest.mark.parametrize("operator", ["AlignShiftConv", "I3DConv", "P3DConv"])
def test_the_device_is_kept(operator):
    with torch.device("meta"):
        model = ResNet()
    network = convert_to_3d(model, operator)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert network(
        torch.empty(2, 1, 3, 32, 32, device="meta"), torch.empty(2, device="meta")
    ).is_meta


def test_attributes_of_the_convolutions_stay():
    model = network_2d("DeepLabV3Plus")
    model.aspp[1].remark = ["mine"]
    model.aspp[1].register_buffer("mask", torch.ones(2), persistent=False)
    network = convert_to_3d(model, in_channels=3)
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        operator = network.model.get_submodule(name)
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "dilation",
                          "padding", "groups", "padding_mode", "transposed"):  # fmt: skip
            assert getattr(operator, attribute) == getattr(conv, attribute), attribute
    copied = network.model.aspp[1]
    assert copied.remark == ["mine"] and copied.remark is not model.aspp[1].remark
    assert torch.equal(copied.mask, torch.ones(2)) and copied.mask is not model.aspp[1].mask
    assert list(copied.state_dict()) == ["weight", "bias"]


def test_the_given_network_stays_as_it_is():
    model = network_2d("ResNetFPN").train()
    before = copy.deepcopy(model.state_dict())
    identities = [id(m) for m in model.modules()] + [id(p) for p in model.parameters()]
    conv2d, config = dict(vars(nn.Conv2d)), dict(type="AlignShiftConv", n_fold=4)
    operators = dict(OPERATORS)
    network = convert_to_3d(model, config)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(randn(2, 1, 3, 16, 16), mm(1.0, 2.0))["maps"][0].sum().backward()
    optimizer.step()

    assert dict(vars(nn.Conv2d)) == conv2d and operators == OPERATORS
    assert config == dict(type="AlignShiftConv", n_fold=4)
    assert [id(m) for m in model.modules()] + [id(p) for p in model.parameters()] == identities
    assert type(model) is ResNetFPN and type(model.backbone.conv1) is nn.Conv2d
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not any(v for k, v in vars(module).items() if k.endswith("_hooks"))


class Tied(nn.Module):
    """One convolution in three places, one of them no module's; one weight in two convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.ModuleList([self.shared])
        self.plain_list = [self.shared]
        self.twin = nn.Conv2d(8, 8, 3, padding=1)
        self.twin.weight = self.shared.weight
        self.weights = [self.shared.weight]

    def forward(self, x):
        x = self.again[0](self.shared(self.stem(x)))
        return self.twin(self.plain_list[0](x))


@pytest.mark.parametrize("operator", ["SliceConv", "AlignShiftConv", "I3DConv"])
def test_shared_modules_and_weights_stay_shared(operator):
    model = network_2d(Tied)
    network = convert_to_3d(model, operator, in_channels=3)
    tied = network.model
    assert tied.shared is tied.again[0] is tied.plain_list[0] and tied.shared is not model.shared
    assert type(tied.shared) is OPERATORS[operator]
    assert tied.twin.weight is tied.shared.weight is tied.weights[0]
    assert tied.twin.bias is not tied.shared.bias
    assert len(list(network.parameters())) == len(list(model.parameters()))
    if operator == "SliceConv":
        assert_slicewise(network, model, randn(2, 3, 3, 6, 6))
    else:
        network(randn(2, 3, 3, 6, 6), mm(1.0, 2.0))


def test_a_weight_that_would_be_torn_apart_is_refused():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)
    )
    model[3].weight = model[2].weight
    convert_to_3d(model, "TSMConv", n_fold=2)
    with pytest.raises(ValueError, match=r"^3\.weight: shared with"):
        convert_to_3d(model, "I3DConv")
    model[1].weight = model[0].weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"^1\.weight: shared with"):
        convert_to_3d(model, "TSMConv", n_fold=2)


def test_the_weights_own_sizes_count():
    # A usual way to make a network take grey images; the attribute stays 3.
    conv = nn.Conv2d(3, 4, 3, padding=1)
    conv.weight = nn.Parameter(conv.weight.sum(1, keepdim=True))
    network = convert_to_3d(conv, "SliceConv")
    assert torch.equal(network.model.weight, conv.weight)
    assert_slicewise(network, conv, randn(1, 1, 2, 5, 5, dtype=torch.float32))


# Calls: apart in copies, in threads, in backward passes


def test_two_converted_networks_never_meet():
    class Outer(nn.Module):
        """A converted network, run in the middle of another one's forward."""

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(8, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.between = lambda: None

        def forward(self, x):
            x = self.first(x)
            self.between()
            return self.second(x)

    outer = convert_to_3d(network_2d(Outer), in_channels=8, skip_first_conv=False)
    other, same = convert_to_3d(network_2d("UNet")), outer
    volume, thickness = randn(2, 8, 3, 6, 6), mm(1.0, 5.0)
    expected = outer(volume, thickness)
    outer.model.between = lambda: other(randn(1, 1, 5, 16, 16), mm(3.0))
    assert torch.equal(outer(volume, thickness), expected)

    def itself():
        same.model.between = lambda: None
        same(randn(1, 8, 2, 6, 6), mm(9.0))

    outer.model.between = itself
    assert torch.equal(outer(volume, thickness), expected)


def test_one_network_in_two_threads():
    class Waiting(nn.Module):
        """Waits between its convolutions until the other thread is there too."""

        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
            self.wait = lambda: None

        def forward(self, x):
            for conv in self.convs:
                x = conv(x)
                self.wait()
            return x

    network = convert_to_3d(network_2d(Waiting), in_channels=8, skip_first_conv=False)
    inputs = [(randn(2, 8, 3, 6, 6), mm(1.0, 5.0)), (randn(3, 8, 2, 6, 6), mm(9.0, 2.0, 3.0))]
    expected = [network(*x) for x in inputs]
    network.model.wait = threading.Barrier(2, timeout=20).wait
    outputs = [None, None]

    def run(i):
        outputs[i] = network(*inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, z) for y, z in zip(outputs, expected))


def in_this_thread(function):
    function()


def in_another_thread(function):
    """As on a GPU, whose backward pass is computed in a thread of its own."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize("operator", ["AlignShiftConv", "I3DConv"])
@pytest.mark.parametrize("run", [in_this_thread, in_another_thread])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_in_the_network(use_reentrant, run, operator):
    """Two forward passes of other sizes and thickness, then one backward pass."""

    def gradients(use_reentrant):
        model = network_2d("ResNetFPN")
        model.backbone.use_reentrant = use_reentrant
        network = convert_to_3d(model, operator)
        first = network(randn(2, 1, 3, 16, 16), mm(1.0, 5.0))
        second = network(randn(3, 1, 2, 32, 16, seed=1), mm(9.0, 2.0, 3.0))
        with torch.no_grad():
            network(randn(1, 1, 6, 16, 16), mm(7.0))
        # The second pass through one map alone.
        loss = sum(y.square().sum() for y in first["maps"]) + second["maps"][1].square().sum()
        run(loss.backward)
        # The next pass is not taken for the one just gone back through.
        again = network(randn(3, 1, 2, 32, 16, seed=1), mm(9.0, 2.0, 3.0))
        torch.testing.assert_close(again, second, rtol=0, atol=0)
        return {name: p.grad for name, p in network.named_parameters()}

    expected = gradients(None)
    torch.testing.assert_close(gradients(use_reentrant), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_and_changes_in_place(use_reentrant):
    """Of what a checkpointed convolution gave, in the network, and of the network's output."""

    class Net(nn.Module):
        def __init__(self, use_reentrant):
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 1)
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
            self.use_reentrant = use_reentrant

        def forward(self, x):
            x = self.stem(x)
            if self.use_reentrant is None:
                x = self.body(x)
            else:
                x = checkpoint(self.body, x, use_reentrant=self.use_reentrant)
            return x.mul_(3.0)[:, :6]

    def gradients(use_reentrant):
        network = convert_to_3d(network_2d(Net, use_reentrant=use_reentrant))
        outputs = [
            network(randn(2, 1, 3, 5, 5), mm(1.0, 5.0)),
            network(randn(1, 1, 4, 5, 5), mm(3.0)),
        ]
        for output in outputs:
            output.mul_(2.0)
        sum(output.square().sum() for output in outputs).backward()
        return [p.grad for p in network.parameters()]

    torch.testing.assert_close(gradients(use_reentrant), gradients(None), rtol=0, atol=1e-9)


def test_an_operator_alone_says_where_it_belongs():
    network = convert_to_3d(network_2d("ResNet"))
    operator = network.model.layer1[0].conv1
    volume, thickness = randn(2, 1, 3, 16, 16), mm(1.0, 5.0)
    images = randn(6, 8, 8, 8)
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv1: .* within that network's forward"):
        operator(images)
    network(volume, thickness).sum().backward()
    with pytest.raises(RuntimeError, match="within that network's forward"):
        operator(images)
    with pytest.raises(ValueError, match="must be > 0 mm"):
        network(volume, mm(1.0, 0.0))
    with pytest.raises(RuntimeError, match="within that network's forward"):
        operator(images)


def by_torch(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network)), by_torch],
    ids=["deepcopy", "pickle", "torch"],
)
def test_copies_are_the_same_and_apart(duplicate):
    model = network_2d("ResNetFPN")
    model.backbone.use_reentrant = False
    network = convert_to_3d(model)
    volume, thickness = randn(2, 1, 3, 16, 16), mm(1.0, 5.0)
    expected = network(volume, thickness)
    # With a call not gone yet, and one whose backward pass has begun.
    expected["maps"][0].sum().backward(retain_graph=True)
    twin = duplicate(network)
    torch.testing.assert_close(twin(volume, thickness), expected, rtol=0, atol=0)
    assert twin.calls is not network.calls
    for operator in operators_of(twin).values():
        (hook,) = operator._forward_pre_hooks.values()
        assert hook.args[0] is twin.calls
    nn.init.zeros_(twin.model.output[0].weight)
    torch.testing.assert_close(network(volume, thickness), expected, rtol=0, atol=0)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_state_dict_round_trip(operator):
    model = network_2d("DeepLabV3Plus")
    network = convert_to_3d(model, operator, **options(operator, 3))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    again = convert_to_3d(model, operator, **options(operator, 3))
    again.load_state_dict(network.state_dict())
    volume = randn(2, 1, 3, 16, 16)
    assert torch.equal(again(volume, mm(1.0, 2.0)), network(volume, mm(1.0, 2.0)))


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["AlignShiftConv", "I3DConv"])
def test_compiled_equals_eager(operator):
    network = convert_to_3d(network_2d("ResNetFPN"), operator)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for volume, thickness in (
        (randn(2, 1, 3, 16, 16), mm(1.0, 5.0)),
        (randn(3, 1, 2, 16, 16), mm(9.0, 2.0, torch.inf)),
    ):
        results = []
        for run in (network, compiled):
            network.zero_grad()
            output = run(volume, thickness)
            sum(y.square().sum() for y in output["maps"]).backward()
            results.append((output, {n: p.grad for n, p in network.named_parameters()}))
        torch.testing.assert_close(*results, rtol=0, atol=1e-9)


DISTRIBUTED = """
import os
import sys
import torch
from torch import nn
from mmdet_ext.convert import convert_to_3d

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(True), nn.Conv2d(8, 4, 3))
network = convert_to_3d(model.double())
parallel = nn.parallel.DistributedDataParallel(network)
volume, thickness = torch.randn(2, 1, 3, 8, 8).double(), torch.tensor([1.0, 5.0]).double()
parallel(volume[[rank]], thickness[[rank]]).square().sum().backward()
gradients = [p.grad.clone() for p in network.parameters()]
network.zero_grad()
(network(volume, thickness).square().sum() / 2).backward()
for got, expected in zip(gradients, network.parameters(), strict=True):
    torch.testing.assert_close(got, expected.grad)
# At once: gloo's threads now and then abort a process that takes itself down in order.
os._exit(0)
"""


def test_two_processes_give_the_gradients_of_one(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors


# The first convolution and the options


@pytest.mark.parametrize(
    "stem, expected",
    [("middle", lambda w: w[:, [1]]), ("sum", lambda w: w[:, [0]] + w[:, [1]] + w[:, [2]])],
)
@pytest.mark.parametrize("operator", ["AlignShiftConv", "I3DConv"])
@pytest.mark.parametrize("skip", [True, False])
def test_stem_of_a_grey_volume(stem, expected, operator, skip):
    model = network_2d("ResNet")
    network = convert_to_3d(model, operator, stem=stem, skip_first_conv=skip)
    conv1 = network.model.conv1
    weight = expected(model.conv1.weight)
    if conv1.weight.ndim == 5:
        weight = weight[:, :, None].expand(-1, -1, 7, -1, -1) / 7
    torch.testing.assert_close(conv1.weight, weight, rtol=0, atol=1e-15)
    assert conv1.in_channels == 1 and conv1.weight.requires_grad and conv1.weight.is_leaf
    model.conv1.requires_grad_(False)
    assert not convert_to_3d(model, operator, stem=stem).model.conv1.weight.requires_grad


def test_a_stem_of_the_volumes_channels_is_kept():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    network = convert_to_3d(conv, "SliceConv", in_channels=4, stem="sum")
    assert torch.equal(network.model.weight, conv.weight)


@pytest.mark.parametrize(
    "conv, options, message",
    [
        (nn.Conv2d(3, 4, 1), dict(in_channels=2), "takes 3 channels"),
        (nn.Conv2d(1, 4, 1), dict(in_channels=3), "takes 1 channels"),
        (nn.Conv2d(3, 3, 1, groups=3), dict(in_channels=1), r"in 3 group\(s\)"),
        # A network's later part: taking the middle of its channels can hardly be meant.
        (nn.Conv2d(64, 4, 1), dict(in_channels=1), "in_channels=64 keeps them"),
        (nn.Conv2d(3, 4, 1), dict(stem="mean"), "stem must be 'middle' or 'sum'"),
    ],
)
def test_a_stem_that_does_not_fit_is_refused(conv, options, message):
    with pytest.raises(ValueError, match=message) as error:
        convert_to_3d(nn.Sequential(nn.ReLU(), conv), "TSMConv", **options)
    assert "stem must" in message or str(error.value).startswith("1: ")
    if conv.in_channels == 64:
        summed = convert_to_3d(conv, "SliceConv", stem="sum").model.weight
        torch.testing.assert_close(summed, conv.weight.sum(1, keepdim=True))


def test_the_first_convolution_alone_does_not_fuse():
    model = network_2d("ResNet")
    for skip, first in ((True, SliceConv), (False, TSMConv)):
        network = convert_to_3d(model, "TSMConv", in_channels=3, skip_first_conv=skip, n_fold=3)
        kinds = [type(operator) for operator in operators_of(network).values()]
        assert kinds == [first] + [TSMConv] * 5


def test_options_reach_the_operator():
    for network in (
        convert_to_3d(network_2d("ResNet"), n_fold=4, ref_thickness=3.0),
        convert_to_3d(
            network_2d("ResNet"), dict(type="AlignShiftConv", n_fold=4), ref_thickness=3.0
        ),
    ):
        _, *operators = operators_of(network).values()
        assert {(op.n_fold, op.ref_thickness) for op in operators} == {(4, 3.0)}


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 1), nn.Linear(2, 2)])
def test_wrong_options_are_refused_even_where_none_would_take_them(model):
    for arguments, message in (
        (dict(conv="TSMConv", ref_thickness=2.0), "TSMConv.*ref_thickness"),
        (dict(n_folds=4), "AlignShiftConv.*n_folds"),
        (dict(stride=2), "AlignShiftConv.*stride"),
        (dict(conv="A3DConv"), "A3DConv.*num_slices"),
        (dict(conv=dict(type="TSMConv", n_fold=4), n_fold=8), "n_fold"),
    ):
        with pytest.raises(TypeError, match=message):
            convert_to_3d(model, **arguments)
    with pytest.raises(ValueError, match="did you mean AlignShiftConv"):
        convert_to_3d(model, "AlignShift")
    with pytest.raises(ValueError, match="n_fold must be an int, at least 2"):
        convert_to_3d(model, n_fold=1)


# What is refused at conversion


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x - x.mean())


class OwnKernel(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


class OnlyNamed(nn.Conv2d):
    """A subclass that computes what nn.Conv2d does."""


def patched():
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda x: x
    return conv


def with_hook():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


def pruned():
    return prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (lambda: OwnForward(4, 4, 3), "OwnForward has a forward of its own"),
        (lambda: OwnKernel(4, 4, 3), "OwnKernel has a forward of its own"),
        (patched, "Conv2d has a forward of its own"),
        (lambda: nn.LazyConv2d(4, 3), "no weight yet"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "is computed"),
        (lambda: torch.nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), "is computed"),
        (pruned, "is computed"),
        (with_hook, "hooks of this Conv2d would be lost"),
        (lambda: nn.Conv3d(4, 4, 3), "Conv3d would mix the slices"),
        (lambda: nn.ConvTranspose3d(4, 4, 3), "ConvTranspose3d would mix"),
        (lambda: nn.BatchNorm3d(4), "BatchNorm3d would mix"),
        (lambda: nn.AdaptiveAvgPool3d(1), "AdaptiveAvgPool3d would mix"),
        (lambda: convert_to_3d(nn.Conv2d(3, 4, 3), "SliceConv"), "Network3D is 3D already"),
        (lambda: SliceConv(4, 4, 3), "SliceConv is 3D already"),
    ],
)
def test_modules_that_cannot_be_converted_are_named(make, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleDict({"inner": make()}))
    with pytest.raises(ValueError, match=rf"^1\.inner: .*{message}"):
        convert_to_3d(model)
    with pytest.raises(ValueError, match=f"^the model itself: .*{message}"):
        convert_to_3d(make(), in_channels=4)


@pytest.mark.parametrize(
    "operator", ["I3DConv", "P3DConv", "ACSConv", "AlignACSConv", "MeanACSConv", "SoftACSConv"]
)
def test_operators_own_refusals_name_the_module(operator):
    model = nn.Sequential(
        nn.Conv2d(3, 4, (1, 3)), nn.ModuleDict({"inner": nn.Conv2d(4, 4, (1, 3))})
    )
    with pytest.raises(ValueError, match=rf"^1\.inner: {operator} needs a square kernel"):
        convert_to_3d(model, operator)


def test_groups_that_acs_refuses():
    with pytest.raises(ValueError, match=r"^1: .*depthwise"):
        convert_to_3d(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), "ACSConv")


def test_subclasses_and_lazy_layers_that_are_plain_by_now_are_taken():
    model = nn.Sequential(OnlyNamed(3, 4, 3), nn.LazyConv2d(4, 3))
    model(torch.zeros(1, 3, 8, 8))
    model[1] = torch.nn.utils.parametrizations.weight_norm(model[1])
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    network = convert_to_3d(model, "TSMConv", n_fold=2)
    assert [type(module) for module in network.model] == [SliceConv, TSMConv]


@pytest.mark.parametrize(
    "model, options",
    [
        (nn.Linear(2, 2), {}),
        (nn.Conv2d(3, 4, 3), {}),
        # Of one channel none is shifted.
        (nn.Conv2d(3, 4, 3), dict(skip_first_conv=False)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), dict(conv="TSMConv")),
    ],
)
def test_a_network_without_fusion_is_warned_of(model, options):
    with pytest.warns(UserWarning, match="sees another slice") as caught:
        convert_to_3d(model, **options)
    assert caught[0].filename == __file__


def test_no_warning_where_there_is_fusion_or_none_is_wanted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_3d(network_2d("ResNet"))
        convert_to_3d(nn.Conv2d(3, 4, 3), "SliceConv")
        convert_to_3d(nn.Conv2d(3, 4, 3), "P3DConv", skip_first_conv=False)


# Networks of others


def mmdet_resnet_fpn():
    from mmdet.models.backbones import ResNet
    from mmdet.models.necks import FPN

    backbone = ResNet(18, base_channels=8, norm_eval=False)
    return nn.Sequential(backbone, FPN([8, 16, 32, 64], 16, num_outs=5)), 32


def mmdet_ssd_vgg():
    from mmdet.models.backbones import SSDVGG

    return SSDVGG(11, out_indices=(1, 4), out_feature_indices=(5, 22)), 32


def mmdet_swin():
    from mmdet.models.backbones import SwinTransformer

    return SwinTransformer(
        pretrain_img_size=32, embed_dims=16, depths=(2, 2), num_heads=(2, 2), window_size=4,
        strides=(4, 2), out_indices=(0, 1),
    ), 32  # fmt: skip


@pytest.mark.parametrize("make", [mmdet_resnet_fpn, mmdet_ssd_vgg, mmdet_swin])
def test_networks_of_mmdet(make):
    model, pixels = make()
    check_conversion(model, pixels)


def import_or_skip(package):
    try:
        return importlib.import_module(package)
    except Exception as error:  # torchvision of another torch: RuntimeError
        pytest.skip(f"{package} cannot be imported: {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {}),
        ("densenet121", {}),
        ("mobilenet_v3_small", {}),
        ("swin_t", {}),
        ("deeplabv3_mobilenet_v3_large", dict(weights_backbone=None)),
    ],
)
def test_networks_of_torchvision(name, options):
    models = import_or_skip("torchvision.models")
    check_conversion(models.get_model(name, weights=None, **options), 64)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "hrnet_w18_small"])
def test_networks_of_timm(name):
    timm = import_or_skip("timm")
    check_conversion(timm.create_model(name, features_only=True), 64)


def check_conversion(model, pixels):
    """Without fusion slice by slice as in 2D; with fusion the neighbours count."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.double().eval()  # mmdet's return nothing
    volume = randn(1, 3, 3, pixels, pixels)
    network = convert_to_3d(model, "SliceConv", in_channels=3)
    assert_slicewise(network, model, volume)
    moved = volume.clone()
    moved[:, :, 1] += randn(pixels, pixels, seed=1)
    # One part in three of an RGB stem is shifted; a transformer has no other convolution.
    network = convert_to_3d(model, in_channels=3, skip_first_conv=False, n_fold=3)
    with torch.no_grad():
        for thickness, seen in ((mm(2.0), True), (mm(torch.inf), False)):
            outputs = network(volume, thickness), network(moved, thickness)
            for y, z in zip(*map(tree_leaves, outputs)):
                assert (y[:, :, 1] - z[:, :, 1]).abs().max() > 1e-11
                assert ((y[:, :, 0] - z[:, :, 0]).abs().max() > 1e-11) == seen
