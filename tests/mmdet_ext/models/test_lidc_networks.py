"""The networks for lung nodules: the published counts, what they compute against one written out,
their conversion, and the weights that they start from."""

import pytest
import torch
import torch.nn.functional as F

from mmdet_ext.checkpoint import CheckpointError, save_checkpoint_file
from mmdet_ext.convert import convert_to_3d
from mmdet_ext.models.lidc_networks import NoduleClassifier, NoduleFCN
from mmdet_ext.models.segmentors import VolumeSegmentor

# Parameters: FCN, its plain 3D kind, classifier.
COUNTS = {
    "resnet18": (12_389_442, 35_596_482, 11_177_538),
    "vgg16": (14_949_506, 44_388_866, 14_724_162),
    "densenet121": (7_309_250, 11_660_354, 6_953_858),
}
CUT = {
    "resnet18": ("fc.weight", "fc.bias"),
    "vgg16": ("classifier.0.weight", "classifier.6.bias"),
    "densenet121": ("features.norm5.weight", "features.norm5.running_var", "classifier.bias"),
}
backbones = pytest.mark.parametrize("backbone", COUNTS)


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.fixture(scope="module")
def networks():
    """The FCN of each backbone, with statistics of BatchNorm that change what it computes."""
    torch.manual_seed(0)
    made = {backbone: NoduleFCN(backbone).eval() for backbone in COUNTS}
    for network in made.values():
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return made


@backbones
def test_parameters_are_as_many_as_published(backbone, networks):
    with torch.device("meta"):
        classifier = NoduleClassifier(backbone)
    found = [count(networks[backbone]), count(classifier)]
    volumes = convert_to_3d(networks[backbone], "I3DConv", in_channels=3, depth="isotropic")
    assert (found[0], count(volumes), found[1]) == COUNTS[backbone]


def norm(x, w, name):
    names = (f"{name}.{k}" for k in ("running_mean", "running_var", "weight", "bias"))
    mean, variance, scale, shift = (w[n].reshape(-1, 1, 1) for n in names)
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def conv(x, w, name, stride=1):
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride, kernel.shape[-1] // 2)


def resnet18(x, w):
    x = maps = norm(conv(x, w, "conv1"), w, "bn1").relu()
    maps = [x]
    for stage, stride in ((1, 1), (2, 2), (3, 1), (4, 2)):
        for block in (0, 1):
            name, step = f"layer{stage}.{block}", stride if block == 0 else 1
            y = norm(conv(x, w, f"{name}.conv1", step), w, f"{name}.bn1").relu()
            y = norm(conv(y, w, f"{name}.conv2"), w, f"{name}.bn2")
            if f"{name}.downsample.0.weight" in w:
                x = norm(conv(x, w, f"{name}.downsample.0", step), w, f"{name}.downsample.1")
            x = (x + y).relu()
        maps.append(x)
    return maps[0], maps[2], maps[4]


def vgg16(x, w):
    # The numbers of torchvision's convolutions; each pooling counts as a layer there.
    blocks = ((0, 3), (7, 10), (14, 17, 20), (24, 27, 30), (34, 37, 40))
    maps = []
    for number, block in enumerate(blocks):
        for layer in block:
            x = norm(conv(x, w, f"features.{layer}"), w, f"features.{layer + 1}").relu()
        maps.append(x)
        x = F.max_pool2d(x, 2) if number in (0, 2) else x
    return maps[0], maps[2], maps[4]


def densenet121(x, w):
    x = stem = norm(conv(x, w, "features.conv0"), w, "features.norm0").relu()
    for block, layers in ((1, 6), (2, 12), (3, 24), (4, 16)):
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            y = conv(norm(x, w, f"{name}.norm1").relu(), w, f"{name}.conv1")
            y = conv(norm(y, w, f"{name}.norm2").relu(), w, f"{name}.conv2")
            x = torch.cat([x, y], 1)
        if block < 4:
            name = f"features.transition{block}"
            x = conv(norm(x, w, f"{name}.norm").relu(), w, f"{name}.conv")
            x = F.avg_pool2d(x, 2) if block < 3 else x
        if block == 2:
            middle = x
    return stem, middle, x.relu()


WRITTEN_OUT = dict(resnet18=resnet18, vgg16=vgg16, densenet121=densenet121)


@backbones
@torch.no_grad()
def test_the_encoder_computes_what_is_written_out(backbone, networks):
    x = torch.randn(2, 3, 12, 20)
    found = networks[backbone].encoder(x)
    expected = WRITTEN_OUT[backbone](x, networks[backbone].encoder.state_dict())
    assert [len(y[0]) for y in found] == list(networks[backbone].encoder.channels)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


@backbones
@torch.no_grad()
def test_the_decoder_computes_what_is_written_out(backbone, networks):
    network, x = networks[backbone], torch.randn(1, 3, 12, 8)
    w = network.state_dict()
    full, middle, last = network.encoder(x)

    def enlarged(x, to):
        times = to.shape[-1] // x.shape[-1]
        return x.repeat_interleave(times, 2).repeat_interleave(times, 3)

    y = conv(torch.cat([enlarged(last, middle), middle], 1), w, "merge_middle")
    y = conv(torch.cat([enlarged(y, full), full], 1), w, "merge_full")
    y = conv(norm(conv(y, w, "conv"), w, "norm").relu(), w, "head")
    torch.testing.assert_close(network(x), y, rtol=1e-3, atol=1e-3 * y.abs().max().item())


@backbones
@torch.no_grad()
def test_volumes_of_48_become_maps_of_48_24_and_12(backbone, networks):
    middle = 12 if backbone == "densenet121" else 24
    volume = torch.empty(1, 3, 48, 48, 48, device="meta")
    encoder = networks[backbone].encoder
    maps = convert_to_3d(encoder, "SliceConv", in_channels=3, depth="isotropic").to("meta")(volume)
    assert [y.shape[2:] for y in maps] == [(48,) * 3, (middle,) * 3, (12,) * 3]
    whole = convert_to_3d(networks[backbone], "SliceConv", in_channels=3, depth="isotropic")
    assert whole.to("meta")(volume[:, :1]).shape == (1, 2, 48, 48, 48)


@backbones
@pytest.mark.parametrize("operator", ["ACSConv", "SliceConv", "I3DConv"])
@torch.no_grad()
def test_conversion_keeps_weights_and_the_classifier_its_head(backbone, operator, networks):
    classifier = NoduleClassifier(backbone).eval()
    classifier.encoder = networks[backbone].encoder
    volumes = convert_to_3d(classifier, operator, in_channels=3, depth="isotropic")
    converted = volumes.model.state_dict()
    for name, weight in classifier.state_dict().items():
        own = converted[name]
        if own.ndim == 5:  # inflated
            own = own.sum(2)
        torch.testing.assert_close(own, weight)
    assert volumes(torch.randn(2, 1, 8, 8, 8)).shape == (2, 2)


@backbones
@torch.no_grad()
def test_an_image_of_one_channel_is_repeated(backbone, networks):
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(networks[backbone](x), networks[backbone](x.repeat(1, 3, 1, 1)))
    with torch.device("meta"):
        assert NoduleFCN(backbone, in_channels=1)(x.to("meta")).shape == (1, 2, 8, 8)


def published(network, backbone):
    """As torchvision's file has it: without counters of batches, with what is cut off here."""
    weights = {
        name: torch.full_like(w, 0.5)
        for name, w in network.encoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    if backbone == "densenet121":
        for name in [n for n in weights if "denselayer" in n]:
            old = name.replace("norm1", "norm.1").replace("norm2", "norm.2")
            weights[old.replace("conv1", "conv.1").replace("conv2", "conv.2")] = weights.pop(name)
    return weights | {name: torch.zeros(2) for name in CUT[backbone]}


@backbones
def test_a_segmentor_starts_from_torchvisions_file(backbone, networks, tmp_path):
    weights = published(networks[backbone], backbone)
    path = tmp_path / "published.pth"
    save_checkpoint_file(weights, path)
    network = dict(type="NoduleFCN", backbone=backbone)
    fusion = dict(type="ACSConv")
    model = VolumeSegmentor(network, fusion, pretrained=str(path))
    model.init_weights()
    state = model.network.model.state_dict()
    for name, weight in state.items():
        halved = bool((weight == 0.5).all())
        assert halved == (name.startswith("encoder.") and "num_batches" not in name), name


@backbones
def test_other_files_are_refused_whole(backbone, networks):
    network = NoduleFCN(backbone)
    before = {name: w.clone() for name, w in network.state_dict().items()}
    weights = published(network, backbone)
    first = next(iter(weights))
    for wrong, message in (
        ({n: w for n, w in weights.items() if n != first}, f"missing {first}"),
        (weights | {"other": torch.zeros(1)}, "unexpected other"),
        (weights | {first: torch.zeros(3, 3)}, rf"{first} is the shape \(3, 3\)"),
        (weights | {first: "text"}, f"{first} is no tensor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            network.load_published(wrong)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, before[name])


def test_options_are_checked():
    with pytest.raises(ValueError, match="backbone must be one of"):
        NoduleFCN("resnet50")
    with pytest.raises(ValueError, match="num_classes"):
        NoduleClassifier(num_classes=1)


@pytest.mark.parametrize("transfer", ["network", "encoder"])
def test_of_our_own_training_all_or_the_encoder_is_transferred(transfer, tmp_path):
    source = VolumeSegmentor(dict(type="NoduleFCN", num_classes=4))
    with torch.no_grad():
        for weight in source.parameters():
            weight.fill_(0.5)
    path = tmp_path / "2d.pth"
    save_checkpoint_file(dict(state_dict=source.state_dict()), path)
    model = VolumeSegmentor(
        dict(type="NoduleFCN"), dict(type="SliceConv"), pretrained=str(path), transfer=transfer
    )
    model.init_weights()
    for name, weight in model.network.model.named_parameters():
        taken = name.startswith("encoder.") or (transfer == "network" and "head" not in name)
        assert bool((weight == 0.5).all()) == taken, name


def test_what_to_transfer_is_checked():
    with pytest.raises(ValueError, match="transfer must be"):
        VolumeSegmentor(dict(type="NoduleFCN"), transfer="backbone")
    with pytest.raises(ValueError, match="ShapesUNet has no `encoder`"):
        VolumeSegmentor(dict(type="ShapesUNet", num_classes=2), transfer="encoder")
