"""DeepLabV3: torchvision's count of parameters; torchvision's weights under their names, and what
it computes with them against one written out; the network for volumes."""

import pytest
import torch
import torch.nn.functional as F

from deeplesion.errors import UserError
from mmdet_ext.checkpoint import CheckpointError, save_checkpoint_file
from mmdet_ext.convert import convert_to_3d
from mmdet_ext.models.deeplab import DeepLabV3
from mmdet_ext.models.segmentors import VolumeSegmentor

SMALL = dict(num_classes=3, depth=50, base_channels=4, channels=6, rates=(1, 2, 3))
BLOCKS = (3, 4, 6, 3)


@pytest.mark.parametrize("depth, published", [(50, 42_004_074), (101, 60_996_202)])
def test_parameters_are_as_many_as_torchvisions(depth, published):
    with torch.device("meta"):
        network = DeepLabV3(21, depth=depth)
    second_head = 1024 * 256 * 9 + 2 * 256 + 256 * 21 + 21  # ours has none
    assert sum(p.numel() for p in network.parameters()) + second_head == published


def torchvision_file(base=4, channels=6, classes=21):
    """Weights of DeepLabV3 on ResNet-50 with torchvision's names."""
    weights = {}

    def conv(name, before, after, kernel=1, bias=False):
        weights[f"{name}.weight"] = torch.randn(after, before, kernel, kernel) / kernel
        if bias:
            weights[f"{name}.bias"] = torch.randn(after)

    def norm(name, channels):
        weights[f"{name}.weight"] = torch.rand(channels) + 0.5
        weights[f"{name}.bias"] = 0.2 * torch.randn(channels)
        weights[f"{name}.running_mean"] = 0.1 * torch.randn(channels)
        weights[f"{name}.running_var"] = torch.rand(channels) + 2
        weights[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("backbone.conv1", 3, base, 7)
    norm("backbone.bn1", base)
    before = base
    for stage, blocks in enumerate(BLOCKS):
        inner = base * 2**stage
        for block in range(blocks):
            name = f"backbone.layer{stage + 1}.{block}"
            for i, (a, b, k) in enumerate(
                ((before, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1)), 1
            ):
                conv(f"{name}.conv{i}", a, b, k)
                norm(f"{name}.bn{i}", b)
            if block == 0:
                conv(f"{name}.downsample.0", before, 4 * inner)
                norm(f"{name}.downsample.1", 4 * inner)
            before = 4 * inner
    for branch, kernel in enumerate((1, 3, 3, 3)):
        conv(f"classifier.0.convs.{branch}.0", before, channels, kernel)
        norm(f"classifier.0.convs.{branch}.1", channels)
    conv("classifier.0.convs.4.1", before, channels)
    norm("classifier.0.convs.4.2", channels)
    conv("classifier.0.project.0", 5 * channels, channels)
    norm("classifier.0.project.1", channels)
    conv("classifier.1", channels, channels, 3)
    norm("classifier.2", channels)
    conv("classifier.4", channels, classes, bias=True)
    conv("aux_classifier.0", before // 2, before // 8, 3)
    norm("aux_classifier.1", before // 8)
    conv("aux_classifier.4", before // 8, classes, bias=True)
    return weights


def features(x, w):
    """What the last layer gets, as torchvision computes it."""

    def conv(x, name, stride=1, dilation=1):
        kernel = w[f"{name}.weight"]
        return F.conv2d(x, kernel, None, stride, dilation * (kernel.shape[-1] // 2), dilation)

    def norm(x, name):
        names = (f"{name}.{k}" for k in ("running_mean", "running_var", "weight", "bias"))
        mean, variance, scale, shift = (w[n].reshape(-1, 1, 1) for n in names)
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = norm(conv(x, "backbone.conv1", 2), "backbone.bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    # Of each stage: the stride and the dilation of its first block, the dilation of the others.
    plan = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4))
    for stage, (stride, first, others) in enumerate(plan, 1):
        for block in range(BLOCKS[stage - 1]):
            name = f"backbone.layer{stage}.{block}"
            step, dilation = (stride, first) if block == 0 else (1, others)
            y = norm(conv(x, f"{name}.conv1"), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2", step, dilation), f"{name}.bn2").relu()
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            if block == 0:
                x = norm(conv(x, f"{name}.downsample.0", step), f"{name}.downsample.1")
            x = (x + y).relu()
    head, maps = "classifier.0.convs", []
    for branch, rate in enumerate((1, *SMALL["rates"])):
        maps.append(norm(conv(x, f"{head}.{branch}.0", 1, rate), f"{head}.{branch}.1").relu())
    mean = norm(conv(x.mean((2, 3), keepdim=True), f"{head}.4.1"), f"{head}.4.2").relu()
    maps.append(mean.expand_as(maps[0]))
    x = conv(torch.cat(maps, 1), "classifier.0.project.0")
    x = norm(x, "classifier.0.project.1").relu()
    return norm(conv(x, "classifier.1"), "classifier.2").relu()


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(3)
    return torchvision_file()


@torch.no_grad()
def test_it_computes_what_torchvision_does_with_its_weights(weights):
    network = DeepLabV3(**SMALL).eval()
    head = {name: w.clone() for name, w in network.head.state_dict().items()}
    assert network.load_published(weights).endswith("10 not used")
    x = torch.randn(2, 3, 40, 56)
    got = []
    network.head.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    logits = network(x)
    expected = features(x, weights)
    assert expected.shape == (2, 6, 5, 7)
    torch.testing.assert_close(got[0], expected, rtol=1e-3, atol=1e-3 * expected.max().item())
    last = F.conv2d(expected, head["weight"], head["bias"])
    enlarged = F.interpolate(last, (40, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, enlarged, rtol=1e-3, atol=1e-3 * enlarged.abs().max().item())


@pytest.mark.parametrize("of", ["deeplab", "resnet"])
def test_the_encoder_alone(weights, of):
    network = DeepLabV3(**SMALL)
    before = {name: w.clone() for name, w in network.state_dict().items()}
    if of == "resnet":  # as torchvision publishes it by itself
        weights = {k.removeprefix("backbone."): w for k, w in weights.items() if "backbone" in k}
        weights = weights | {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}
        with pytest.raises(CheckpointError, match=r"model\.transfer=encoder"):
            network.load_published(weights)
    network.load_published(weights, encoder_only=True)
    for name, weight in network.state_dict().items():
        if name.startswith("encoder."):
            key = name.removeprefix("encoder.")
            torch.testing.assert_close(weight, weights.get(key, weights.get(f"backbone.{key}")))
        else:
            assert torch.equal(weight, before[name])


def test_other_files_are_refused(weights):
    network = DeepLabV3(**SMALL)
    without = {k: w for k, w in weights.items() if k != "classifier.1.weight"}
    for wrong, message in (
        (without, r"deeplabv3_resnet50_coco-cd0a2569\.pth.*missing conv\.weight"),
        (weights | {"classifier.9.weight": torch.zeros(1)}, r"unexpected classifier\.9\.weight"),
        (torchvision_file(channels=8), r"expected \(6, 64, 1, 1\)|expected \(6, 128, 1, 1\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            network.load_published(wrong)


@pytest.mark.parametrize("transfer, whole", [("network", True), ("encoder", False)])
def test_a_segmentor_of_volumes_starts_from_it(weights, transfer, whole, tmp_path):
    path = tmp_path / "deeplab.pth"
    save_checkpoint_file(weights, path)
    model = VolumeSegmentor(
        dict(type="DeepLabV3", **SMALL), dict(type="ACSConv"), pretrained=str(path),
        transfer=transfer,
    )  # fmt: skip
    model.init_weights()
    state = model.network.model.state_dict()
    assert torch.equal(state["encoder.layer4.0.conv2.weight"],
                       weights["backbone.layer4.0.conv2.weight"])  # fmt: skip
    for name, source in (("pyramid.convs.2.0", "classifier.0.convs.2.0"), ("conv", "classifier.1")):
        same = torch.equal(state[f"{name}.weight"], weights[f"{source}.weight"])
        assert same == whole


@pytest.mark.parametrize("operator", ["ACSConv", "SliceConv", "I3DConv"])
@torch.no_grad()
def test_it_segments_volumes(operator):
    network = DeepLabV3(**SMALL).eval()
    volumes = convert_to_3d(network, operator, in_channels=3, depth="isotropic")
    x = torch.randn(1, 1, 12, 24, 17)
    logits = volumes(x)
    assert logits.shape == (1, 3, 12, 24, 17)
    torch.testing.assert_close(logits, volumes(x.repeat(1, 3, 1, 1, 1)))


@torch.no_grad()
def test_training_on_a_single_volume_is_refused():
    network = convert_to_3d(DeepLabV3(**SMALL), "SliceConv", in_channels=3, depth="isotropic")
    with pytest.raises(UserError, match=r"two images.*batch_size.*drop_last=True"):
        network.train()(torch.randn(1, 1, 16, 16, 16))
    assert network(torch.randn(2, 1, 16, 16, 16)).shape == (2, 3, 16, 16, 16)


def test_options_are_checked():
    with pytest.raises(ValueError, match="num_classes"):
        DeepLabV3(1)
