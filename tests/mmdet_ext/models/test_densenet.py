"""The backbone against a plain 2D DenseNet, checkpointing, and the loading of ImageNet weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from benchmarks import plain
from benchmarks.twins import TWINS, config
from mmdet_ext.checkpoint import CheckpointError
from mmdet_ext.models import inference
from mmdet_ext.models.densenet import TruncatedDenseNet3D
from mmdet_ext.models.neck import KeySliceFPN
from mmdet_ext.models.pretrained import fetch_weights
from mmdet_ext.ops import OPERATORS, SliceConv

from ..ops.users_operators import OPERATORS_OF_USERS

SMALL = dict(growth=4, bn_size=2, block_config=(2, 3, 2), stem_channels=8)
ALIGN = dict(type="AlignShiftConv", n_fold=4)
every_operator = pytest.mark.parametrize(
    "fusion", [config(name, 3, twin.variants[0]) for name, twin in TWINS.items()], ids=list(TWINS)
)


def images(batch=2, depth=3, size=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, depth, size, size, generator=generator, dtype=dtype)


def densenet_2d(backbone, x):
    """One slice (N, 1, H, W) through the same weights, written out with 2D functions."""
    weights = backbone.state_dict()

    def norm_relu(x, name):
        statistics = (weights[f"{name}.{key}"] for key in ("running_mean", "running_var"))
        return F.relu(
            F.batch_norm(x, *statistics, weights[f"{name}.weight"], weights[f"{name}.bias"])
        )

    x = F.conv2d(x, weights["conv0.weight"], stride=2, padding=3)
    x = F.max_pool2d(norm_relu(x, "norm0"), 3, 2, 1)
    outputs = []
    for block in (1, 2, 3):
        if block > 1:
            name = f"transition{block - 1}"
            x = F.conv2d(norm_relu(x, f"{name}.norm"), weights[f"{name}.conv.weight"])
            x = F.avg_pool2d(x, 2)
        layer = 1
        while (name := f"denseblock{block}.denselayer{layer}") + ".norm1.weight" in weights:
            y = F.conv2d(norm_relu(x, f"{name}.norm1"), weights[f"{name}.conv1.weight"])
            y = F.conv2d(norm_relu(y, f"{name}.norm2"), weights[f"{name}.conv2.weight"], padding=1)
            x = torch.cat([x, y], 1)
            layer += 1
        outputs.append(x)
    return outputs


def randomise_norms(module):
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm3d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def test_without_fusion_every_slice_is_the_2d_network():
    backbone = TruncatedDenseNet3D(dict(type="SliceConv"), **SMALL).double().eval()
    randomise_norms(backbone)
    x = images()
    for d in range(3):
        for got, expected in zip(backbone(x), densenet_2d(backbone, x[:, :, d])):
            torch.testing.assert_close(got[:, :, d], expected)


@pytest.mark.parametrize("slices", [1, 3, 4])
def test_slices_as_channels_is_the_2d_network_on_many_channels(slices):
    backbone = TruncatedDenseNet3D(
        dict(type="SliceConv"), in_channels=slices, slices_as_channels=True, **SMALL
    )
    backbone = backbone.double().eval()
    randomise_norms(backbone)
    x = images(2, slices)
    for got, expected in zip(backbone(x), densenet_2d(backbone, x[:, 0])):
        assert got.shape[2] == 1
        torch.testing.assert_close(got[:, :, 0], expected)


@every_operator
def test_inference_and_training_equal_the_papers_way(fusion):
    backbone = TruncatedDenseNet3D(fusion, **SMALL).double()
    neck = KeySliceFPN(backbone.out_channels, num_slices=3, out_channels=6).double()
    randomise_norms(backbone)
    volumes, thickness = images(), torch.tensor([1.0, 5.0], dtype=torch.float64)
    parameters = [*backbone.parameters(), *neck.parameters()]
    for training in (True, False):
        backbone.train(training)
        expected = plain.network(copy.deepcopy(backbone), neck, volumes, thickness)
        with torch.no_grad():
            torch.testing.assert_close(
                neck(copy.deepcopy(backbone).maps(volumes, thickness))[0], expected
            )
        got = neck(copy.deepcopy(backbone)(volumes, thickness))[0]
        torch.testing.assert_close(got, expected)

        expected = plain.network(backbone, neck, volumes, thickness)
        wanted = torch.autograd.grad(expected.square().sum(), parameters)
        got = neck(backbone(volumes, thickness))[0]
        for a, b in zip(torch.autograd.grad(got.square().sum(), parameters), wanted):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("operator", OPERATORS_OF_USERS)
def test_operators_of_users_are_computed_alike_in_training_eval_and_inference(
    operator, monkeypatch
):
    """Strips, folded norms and work in place are for those that say they can take it."""
    monkeypatch.setitem(OPERATORS, operator.__name__, operator)
    monkeypatch.setattr(inference, "STRIP_BYTES", 4000)
    backbone = TruncatedDenseNet3D(dict(type=operator.__name__), **SMALL).double()
    randomise_norms(backbone)
    volumes, thickness = images(size=64), torch.tensor([1.0, 5.0], dtype=torch.float64)

    def plain_maps(backbone):
        """Layer by layer, through `forward` of the operators and the norms as they are."""
        x = backbone.root(volumes)
        for i in (1, 2, 3):
            if i > 1:
                transition = getattr(backbone, f"transition{i - 1}")
                x = F.avg_pool3d(transition.conv(F.relu(transition.norm(x))), (1, 2, 2))
            for layer in getattr(backbone, f"denseblock{i}").children():
                y = layer.conv1(F.relu(layer.norm1(x)), thickness)
                y = layer.conv2(F.relu(layer.norm2(y)), thickness)
                x = torch.cat([x, y], 1)
            yield x

    for training in (True, False):
        backbone.train(training)
        expected = list(plain_maps(copy.deepcopy(backbone)))
        for a, b in zip(copy.deepcopy(backbone)(volumes, thickness), expected):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            for a, b in zip(copy.deepcopy(backbone)(volumes, thickness), expected):
                torch.testing.assert_close(a, b)


def test_hooks_on_operators_see_what_they_see_in_training():
    """An operator with hooks is called as a whole, and its norm stays apart."""
    backbone = TruncatedDenseNet3D(ALIGN, **SMALL).double().eval()
    randomise_norms(backbone)
    volumes, thickness = images(), torch.tensor([1.0, 5.0], dtype=torch.float64)
    seen = []
    for name, module in backbone.named_modules():
        if name.endswith(("conv1", "conv2")):
            module.register_forward_hook(lambda module, x, y: seen.append(y.detach().clone()))
    maps = backbone(volumes, thickness)
    with_graph, seen[:] = list(seen), []
    with torch.no_grad():
        for a, b in zip(backbone(volumes, thickness), maps):
            torch.testing.assert_close(a, b)
    assert len(seen) == len(with_graph) == 14
    for a, b in zip(seen, with_graph):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_pruned_operators_compute_their_weight_at_inference_too():
    """Pruning does it in a hook, as old spectral norm does."""
    backbone = TruncatedDenseNet3D(ALIGN, **SMALL).double().eval()
    randomise_norms(backbone)
    volumes, thickness = images(), torch.tensor([1.0, 5.0], dtype=torch.float64)
    for name in ("conv1", "conv2"):
        conv = getattr(backbone.denseblock2.denselayer2, name)
        prune.l1_unstructured(conv, "weight", amount=0.5)
        conv.weight_orig.mul_(2)  # as a training step would change it
    inferred = backbone(volumes, thickness)
    with torch.enable_grad():
        expected = backbone(volumes, thickness)
    for a, b in zip(inferred, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_graph", [True, False])
def test_hooks_on_any_part_see_whole_maps_in_eval_mode(with_graph, monkeypatch):
    """Each once, what they see in a network whose norms are not folded and maps not cut."""
    monkeypatch.setattr(inference, "STRIP_BYTES", 4000)
    backbone = TruncatedDenseNet3D(ALIGN, **SMALL).double().eval()
    randomise_norms(backbone)
    volumes, thickness = images(size=64), torch.tensor([1.0, 5.0], dtype=torch.float64)
    expected = backbone(volumes, thickness)
    seen = {}

    def look(name):
        def hook(module, inputs, output):
            assert name not in seen, f"{name} is called twice"
            seen[name] = output.detach().clone()

        return hook

    parts = [(name, module) for name, module in backbone.named_modules() if name]
    for name, module in parts:
        module.register_forward_hook(look(name))
    with torch.set_grad_enabled(with_graph):
        for a, b in zip(backbone(volumes, thickness), expected):
            torch.testing.assert_close(a, b)
    assert seen.keys() == {name for name, _ in parts}
    stem = F.conv2d(volumes[:, :, 1], backbone.conv0.weight, stride=2, padding=3)
    torch.testing.assert_close(seen["conv0"][:, :, 1], stem)
    norm = backbone.transition1.norm
    x = seen["denseblock1"] - norm.running_mean.view(-1, 1, 1, 1)
    x = x / (norm.running_var + norm.eps).sqrt().view(-1, 1, 1, 1)
    x = x * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["transition1.norm"], x)


@torch.no_grad()
def test_pruned_norms_compute_their_weight_in_eval_mode_too():
    backbone = TruncatedDenseNet3D(ALIGN, **SMALL).double().eval()
    randomise_norms(backbone)
    volumes, thickness = images(), torch.tensor([1.0, 5.0], dtype=torch.float64)
    as_trained = copy.deepcopy(backbone)
    for path in ("norm0", "denseblock2.denselayer2.norm1", "transition1.norm"):
        norm = backbone.get_submodule(path)
        prune.random_unstructured(norm, "weight", amount=0.5)
        norm.weight_orig.mul_(2)  # as a training step would change it
        as_trained.get_submodule(path).weight.copy_(norm.weight_orig * norm.weight_mask)
    for a, b in zip(backbone(volumes, thickness), as_trained(volumes, thickness)):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_norms_in_training_mode_see_whole_maps_also_in_a_network_in_eval_mode(monkeypatch):
    """As when their statistics are calibrated on a few batches."""
    monkeypatch.setattr(inference, "STRIP_BYTES", 4000)
    backbone = TruncatedDenseNet3D(ALIGN, **SMALL).double().eval()
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.train()
    other = copy.deepcopy(backbone)
    volumes, thickness = images(size=64), torch.tensor([1.0, 5.0], dtype=torch.float64)
    inferred = backbone(volumes, thickness)
    with torch.enable_grad():
        expected = other(volumes, thickness)
    for a, b in zip([*inferred, *backbone.buffers()], [*expected, *other.buffers()]):
        torch.testing.assert_close(a, b)


def test_an_operator_may_need_its_output_for_its_gradient(monkeypatch):
    class Squashed(SliceConv):
        def convolve(self, x, weight, bias):
            return super().convolve(x, weight, bias).sigmoid()

        linear = True  # a lie that only `check_operator` finds; the backward pass is sound

    monkeypatch.setitem(OPERATORS, "Squashed", Squashed)
    backbone = TruncatedDenseNet3D(dict(type="Squashed"), **SMALL).eval()
    backbone(images(dtype=torch.float32))[-1].sum().backward()


@pytest.mark.parametrize("fusion", [ALIGN, dict(type="A3DConv", num_slices=3)])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_strips_of_any_height_change_no_result(fusion, size, monkeypatch):
    backbone = TruncatedDenseNet3D(fusion, **SMALL).double().eval()
    randomise_norms(backbone)
    volumes, thickness = images(size=size), torch.tensor([1.0, 5.0], dtype=torch.float64)
    with torch.no_grad():
        expected = backbone(volumes, thickness)
        for rows_or_so in (1, 3, 5):
            monkeypatch.setattr(inference, "STRIP_BYTES", rows_or_so * 8 * 8 * 3 * size // 4 * 2)
            for a, b in zip(backbone(volumes, thickness), expected):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [37, 50, 52, 74, 76, 148])
def test_sizes_that_training_takes_are_inferred(size, monkeypatch):
    """A strip of one row is not pooled by itself: transitions of 9, 13, 19 and 37 rows."""
    monkeypatch.setattr(inference, "STRIP_BYTES", 4000)
    backbone = TruncatedDenseNet3D(dict(type="SliceConv"), **SMALL).double().eval()
    randomise_norms(backbone)
    x = images(1, 2, size)
    with torch.no_grad():
        for got, expected in zip(backbone(x), densenet_2d(backbone, x[:, :, 1])):
            torch.testing.assert_close(got[:, :, 1], expected)


def test_pieces_are_of_the_asked_length_and_only_at_inference_on_a_cpu():
    seen = []

    def halve(x):
        seen.append(x.shape[3])
        return F.avg_pool2d(x[:, :, 0], 2).unsqueeze(2)

    x, module = torch.randn(1, 4, 1, 10, 6), nn.Identity().eval()
    with torch.no_grad():
        got = inference.in_pieces(module, halve, x, dim=3, length=4)
        assert seen == [4, 4, 2]
        torch.testing.assert_close(got, halve(x))
        seen.clear()
        for size, lengths in ((9, [4, 5]), (5, [5]), (11, [4, 4, 3])):
            got = inference.in_pieces(module, halve, x[:, :, :, :1].expand(1, 4, 1, size, 6), 3, 4)
            assert seen == lengths and got.shape[3] == size // 2
            seen.clear()
        inference.in_pieces(module.train(), halve, x, dim=3, length=4)
        module.eval()
    inference.in_pieces(module, halve, x, dim=3, length=4)
    assert seen == [10, 10]


def test_imagenet_weights_load_beside_whatever_an_operator_holds(monkeypatch):
    """Modules and parameters of its own, whatever their names."""

    class Own(SliceConv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.rate = nn.Parameter(torch.ones(1))
            self.norm = nn.BatchNorm3d(self.in_channels)
            self.conv1 = SliceConv(self.in_channels, self.in_channels, 1)

    monkeypatch.setitem(OPERATORS, "Own", Own)
    backbone = TruncatedDenseNet3D(dict(type="Own"))
    weights = imagenet_file(".")
    report = backbone.load_imagenet(weights)
    assert "84 rate" in report
    expected = weights["features.denseblock1.denselayer1.conv.1.weight"]
    assert torch.equal(backbone.denseblock1.denselayer1.conv1.weight, expected)


def test_norms_of_the_batch_are_counted_without_a_graph_too():
    one = TruncatedDenseNet3D(ALIGN, **SMALL)
    other = copy.deepcopy(one)
    volumes, thickness = images(dtype=torch.float32), torch.tensor([1.0, 5.0])
    one(volumes, thickness)
    with torch.no_grad():
        other(volumes, thickness)
    for a, b in zip(one.buffers(), other.buffers()):
        torch.testing.assert_close(a, b)


def test_shapes_and_strides_of_densenet121():
    backbone = TruncatedDenseNet3D(ALIGN).eval()
    assert backbone.out_channels == [256, 512, 1024]
    with torch.no_grad():
        outputs = backbone(images(1, 3, 64, torch.float32), torch.tensor([2.0]))
    assert [tuple(y.shape) for y in outputs] == [
        (1, 256, 3, 16, 16),
        (1, 512, 3, 8, 8),
        (1, 1024, 3, 4, 4),
    ]


def test_slices_reach_their_neighbours_only_with_fusion():
    x = images(1, 5)
    changed = x.clone()
    changed[:, :, 3] += 1
    thickness = torch.tensor([2.0], dtype=torch.float64)
    for fusion, expected in ((dict(type="SliceConv"), False), (ALIGN, True)):
        backbone = TruncatedDenseNet3D(fusion, **SMALL).double().eval()
        before, after = backbone(x, thickness)[-1], backbone(changed, thickness)[-1]
        assert (not torch.equal(before[:, :, 2], after[:, :, 2])) is expected


def test_gradients_numerically():
    torch.manual_seed(0)
    backbone = TruncatedDenseNet3D(
        dict(type="AlignShiftConv", n_fold=2),
        growth=2, bn_size=1, block_config=(1, 1), stem_channels=4,
    ).double()  # fmt: skip
    x = images(1, 2, 16).requires_grad_()
    thickness = torch.tensor([3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: backbone(x, thickness), x, fast_mode=True)


@every_operator
def test_checkpointing_changes_neither_outputs_nor_gradients_nor_statistics(fusion):
    plain = TruncatedDenseNet3D(fusion, **SMALL).double()
    saving = TruncatedDenseNet3D(fusion, with_cp=True, **SMALL).double()
    saving.load_state_dict(plain.state_dict())
    thickness = torch.tensor([1.0, 5.0], dtype=torch.float64)
    results = []
    for backbone in (plain, saving):
        backbone.train()
        outputs = backbone(images(), thickness)
        sum((y**2).mean() for y in outputs).backward()
        results.append(outputs)
    for a, b in zip(*results):
        assert torch.equal(a, b)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):
        assert torch.equal(a, b), f"{name} was counted twice"


def test_compiled_with_checkpointing_equals_eager():
    """As `tools/train.py --compile` has it: gradients, and statistics that count a batch once."""
    options = {**SMALL, "block_config": (2, 1)}
    eager = TruncatedDenseNet3D(ALIGN, with_cp=True, **options).double().train()
    compiled = copy.deepcopy(eager)
    # Without the decompositions, which the default backend has as well, torch 2.13 takes the
    # memory format of BatchNorm's output for another one.
    compiled.compile(dynamic=False, backend="aot_eager_decomp_partition")
    thickness = torch.tensor([1.0, 5.0], dtype=torch.float64)
    for backbone in (eager, compiled):
        sum((y**2).mean() for y in backbone(images(), thickness)).backward()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(eager.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(a, b, msg=name)


def imagenet_file(spelling, seed=0):
    """A state dict with the keys and shapes of torchvision's DenseNet-121, values random."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def norm(name, channels):
        for key in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{name}.{key}"] = torch.rand(channels, generator=generator)

    def conv(name, *shape):
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator)

    conv("features.conv0", 64, 3, 7, 7)
    norm("features.norm0", 64)
    channels = 64
    for block, layers in enumerate((6, 12, 24, 16), start=1):
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            norm(f"{name}.norm{spelling}1", channels)
            conv(f"{name}.conv{spelling}1", 128, channels, 1, 1)
            norm(f"{name}.norm{spelling}2", 128)
            conv(f"{name}.conv{spelling}2", 32, 128, 3, 3)
            channels += 32
        if block < 4:
            norm(f"features.transition{block}.norm", channels)
            conv(f"features.transition{block}.conv", channels // 2, channels, 1, 1)
            channels //= 2
    norm("features.norm5", channels)
    weights["classifier.weight"] = torch.randn(1000, channels, generator=generator)
    weights["classifier.bias"] = torch.randn(1000, generator=generator)
    return weights


@pytest.mark.parametrize("spelling", [".", ""])
def test_imagenet_weights_load_in_both_spellings(spelling, tmp_path):
    weights = imagenet_file(spelling)
    torch.save(weights, tmp_path / "densenet121.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "densenet121.pth"))
    backbone = TruncatedDenseNet3D(ALIGN, init_cfg=init_cfg)
    backbone.init_weights()
    name = f"features.denseblock3.denselayer24.conv{spelling}2.weight"
    assert torch.equal(backbone.denseblock3.denselayer24.conv2.weight, weights[name])
    assert torch.equal(
        backbone.transition2.norm.running_var, weights["features.transition2.norm.running_var"]
    )
    assert torch.equal(backbone.conv0.weight, weights["features.conv0.weight"][:, 1:2])


@every_operator
def test_imagenet_weights_load_into_every_operator(fusion):
    """Its own parameters keep their values and are counted in the report."""
    weights = imagenet_file(".")
    backbone = TruncatedDenseNet3D(fusion)
    own = {
        f"{path}.{name}": parameter.clone()
        for path, module in backbone.named_modules()
        if isinstance(module, SliceConv)
        for name, parameter in module.named_parameters()
        if name != "weight"
    }
    report = backbone.load_imagenet(weights)
    state = backbone.state_dict()
    for key in ("conv1", "conv2"):
        loaded = state[f"denseblock2.denselayer3.{key}.weight"]
        expected = weights[f"features.denseblock2.denselayer3.{key[:-1]}.{key[-1]}.weight"]
        if fusion["type"] == "I3DConv":
            size = expected.shape[-1]
            assert loaded.shape[2] == size
            expected = expected.unsqueeze(2).expand_as(loaded) / size
        torch.testing.assert_close(loaded, expected)
    assert all(torch.equal(state[k], v) for k, v in own.items())
    assert f"{len(own)} keep their initial values" in report
    convolutions = 2 * (6 + 12 + 24)
    kept = {
        "A3DConv": f"({convolutions} fusion_weight)",
        "AlignA3DConv": f"({convolutions} fusion_weight)",
        "P3DConv": f"({convolutions} depth_weight)",
        "SoftACSConv": f"({convolutions // 2} view_weight)",
    }
    assert kept.get(fusion["type"], "") in report


@pytest.mark.parametrize(
    "slices, colours",
    [(1, "g"), (2, "rg"), (3, "rgb"), (4, "gbrg"), (7, "gbrgbrg"), (9, 3 * "rgb")],
)
def test_stem_tile_repeats_the_colours_about_their_middle(slices, colours):
    weights = imagenet_file("")
    backbone = TruncatedDenseNet3D(
        dict(type="SliceConv"), in_channels=slices, slices_as_channels=True, stem="tile"
    )
    backbone.load_imagenet(weights)
    stem = weights["features.conv0.weight"]
    expected = torch.stack([stem[:, "rgb".index(c)] for c in colours], dim=1)
    assert torch.equal(backbone.conv0.weight, expected)


def test_stem_sum_adds_the_three_colours():
    weights = imagenet_file("")
    backbone = TruncatedDenseNet3D(ALIGN, stem="sum")
    backbone.load_imagenet(weights)
    torch.testing.assert_close(backbone.conv0.weight[:, 0], weights["features.conv0.weight"].sum(1))


def test_report_accounts_for_every_tensor():
    weights = imagenet_file(".")
    report = TruncatedDenseNet3D(ALIGN).load_imagenet(weights)
    cut = sum("denseblock4" in k or "transition3" in k or "norm5" in k for k in weights) + 2
    assert f"{len(weights) - cut} tensors loaded" in report
    assert f"{cut} not used" in report
    assert "0 keep their initial values" in report


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("features.denseblock1.denselayer1.conv1.weight"), "missing denseblock1"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda w: w.update({"features.norm0.weight": torch.zeros(32)}),
            r"norm0.weight has shape \(32,\), expected \(64,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    weights = imagenet_file("")
    change(weights)
    backbone = TruncatedDenseNet3D(ALIGN)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        backbone.load_imagenet(weights)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="init_cfg=None"):
        fetch_weights(str(tmp_path / "none.pth"))


def test_a_file_is_found_in_ones_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    assert fetch_weights("~/w.pth") == {"a": torch.ones(1)}


def test_no_network_says_which_file_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "http://127.0.0.1:9/densenet121-a639ec97.pth"  # the discard port: nobody answers
    with pytest.raises(ConnectionError, match=r"densenet121-a639ec97.pth.*init_cfg=None"):
        fetch_weights(url)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="stem"):
        TruncatedDenseNet3D(ALIGN, stem="first")
    with pytest.raises(ValueError, match="init_cfg"):
        TruncatedDenseNet3D(ALIGN, init_cfg=dict(type="Xavier"), **SMALL)
    with pytest.raises(ValueError, match=r"\(B, 1, D, H, W\)"):
        TruncatedDenseNet3D(ALIGN, **SMALL)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"no convolution sees another slice .*n_fold"):
        TruncatedDenseNet3D(dict(type="TSMConv", n_fold=1000), **SMALL)
    with pytest.raises(ValueError, match=r"fusion\.depth='isotropic': the maps keep their depth"):
        TruncatedDenseNet3D(dict(type="ACSConv", depth="isotropic"), **SMALL)
    options = dict(in_channels=3, slices_as_channels=True, **SMALL)
    with pytest.raises(ValueError, match=r"fusion\.type=TSMConv .* must be SliceConv"):
        TruncatedDenseNet3D(dict(type="TSMConv"), **options)
    flat = TruncatedDenseNet3D(dict(type="SliceConv"), **options)
    with pytest.raises(ValueError, match=r"\(B, 1, 3, H, W\), got \(1, 1, 7, 32, 32\)"):
        flat(torch.zeros(1, 1, 7, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 1, 3, H, W\), got \(1, 3, 1, 32, 32\)"):
        flat(torch.zeros(1, 3, 1, 32, 32))
