"""TorchvisionResNet against ResNet-50 written out with torchvision's names; files that do not fit
are refused."""

import re

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import nn
from torch.testing import assert_close

from deeplesion.errors import MissingDataError
from mmdet_ext.checkpoint import CheckpointError
from mmdet_ext.config.experiment import config_folder
from mmdet_ext.models.resnet import PUBLISHED, TorchvisionResNet

DEFORMABLE = dict(dcn=dict(type="DCN", deform_groups=1), stage_with_dcn=(False, True, True, True))


WIDTH = 8  # an eighth of the published network's


class Bottleneck(nn.Module):
    """He et al., "Deep Residual Learning", Fig. 5, with the stride on the 3 x 3 convolution."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if channels != 4 * width or stride != 1:
            projection = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet50(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        channels = WIDTH
        for i, blocks in enumerate((3, 4, 6, 3)):
            width, layers = WIDTH * 2**i, []
            for j in range(blocks):
                layers.append(Bottleneck(channels, width, 2 if i and not j else 1))
                channels = 4 * width
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, 10)

    def maps(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
            yield x


@pytest.fixture(scope="module")
def twin():
    torch.manual_seed(0)
    model = ResNet50().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, 0, 0.1)
    return model


@pytest.fixture(scope="module")
def file(twin, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(twin.state_dict(), path)
    return path


def network(depth, **options):
    return TorchvisionResNet(depth, base_channels=WIDTH, **options)


def pretrained(path, depth=50, **options):
    model = network(depth, init_cfg=dict(type="Pretrained", checkpoint=str(path)), **options)
    model.init_weights()
    model.eval()  # mmdet's returns nothing
    return model


@pytest.mark.parametrize("options", [{}, DEFORMABLE], ids=["plain", "deformable"])
def test_it_computes_what_torchvisions_network_does(twin, file, options):
    """With offsets of zero a deformable convolution is a plain one."""
    model = pretrained(file, **options)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = model(x)
        for found, y in zip(maps, twin.maps(x), strict=True):
            assert_close(found, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_the_line_in_the_log_says_what_was_loaded(twin):
    weights = twin.state_dict()
    report = network(50).load_imagenet(weights)
    assert report == "318 tensors loaded, 2 not used"
    report = network(50, **DEFORMABLE).load_imagenet(weights)
    # Weight and bias of the offsets of 13 convolutions.
    assert report.endswith(", 26 keep their initial values")
    old = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    assert network(50).load_imagenet(old).startswith("265 tensors loaded")


def test_weights_that_do_not_fit_are_refused(twin):
    weights = twin.state_dict()
    with pytest.raises(CheckpointError, match=r"resnet101-63.*missing layer3.6.conv1.weight"):
        network(101).load_imagenet(weights)
    with pytest.raises(CheckpointError, match=r"the shape \(8, 3, 7, 7\), expected \(8, 1"):
        network(50, in_channels=1).load_imagenet(weights)
    with pytest.raises(CheckpointError, match=r"resnet50-0676ba61.pth.*unexpected head.weight\)"):
        network(50).load_imagenet({**weights, "head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"conv1.weight is no tensor"):
        network(50).load_imagenet({**weights, "conv1.weight": "text"})


def test_a_file_that_is_missing_or_holds_code_is_refused(tmp_path):
    with pytest.raises(
        MissingDataError, match=r"torchvision's resnet50-0676ba61.pth.*init_cfg=None"
    ):
        pretrained(tmp_path / "none.pth")
    torch.save(ResNet50(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="is refused"):
        pretrained(tmp_path / "model.pth")


def test_another_initialisation_is_refused():
    with pytest.raises(ValueError, match="init_cfg=dict"):
        TorchvisionResNet(18, init_cfg=dict(type="Kaiming", layer="Conv2d"))


def test_from_random_weights_deformable_convolutions_begin_as_plain_ones():
    model = TorchvisionResNet(50, base_channels=4, **DEFORMABLE)
    model.init_weights()
    offsets = [p for n, p in model.named_parameters() if "conv_offset" in n]
    assert len(offsets) == 26 and not any(p.any() for p in offsets)
    assert model.conv1.weight.std() > 0 and model.layer2[0].conv2.weight.std() > 0


@pytest.mark.parametrize("images", [1, 33])
def test_any_number_of_images_goes_through_deformable_convolutions(images):
    """mmcv's kernel wants a multiple of 32 above that."""
    torch.manual_seed(0)
    two = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,))
    deformable = dict(dcn=DEFORMABLE["dcn"], stage_with_dcn=(False, True))
    model = network(50, frozen_stages=-1, **two, **deformable)
    model.eval()
    for convolution in (m for m in model.modules() if hasattr(m, "conv_offset")):
        nn.init.normal_(convolution.conv_offset.weight, 0, 0.05)
    x = torch.randn(images, 3, 32, 32)
    (maps,) = model(x)
    maps.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        one = torch.cat([model(image[None])[0] for image in x])
    assert_close(maps.detach(), one, rtol=1e-4, atol=1e-4)


def test_configs_name_twin_files():
    found = {}
    for path in sorted(config_folder().rglob("*.py")):
        for name in re.findall(r"/(resnet\d+-\w+\.pth)", path.read_text()):
            found[int(re.search(r"\d+", name)[0])] = name
    assert found == {depth: PUBLISHED[depth] for depth in (50, 101, 152)}
    assert MODELS.get("TorchvisionResNet") is TorchvisionResNet
