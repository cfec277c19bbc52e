"""Encoders of the ACS paper's networks for lung nodules: torchvision's ResNet-18, VGG-16 and
DenseNet-121 for images, with fewer strides, names of weights as in torchvision's files."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_ext.models.pretrained import densenet_name, load_published
from mmdet_ext.models.resnet import TorchvisionResNet

VGG_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions
DENSE_BLOCKS, GROWTH, BN_SIZE = (6, 12, 24, 16), 32, 4


class ResNet18Encoder(TorchvisionResNet):
    """ResNet-18 whose stem has stride 1 and no max-pooling, and of whose stages the second and the
    fourth have stride 2 (ACS, JBHI 2021, section IV-B; the stages' strides are its code's)."""

    channels = (64, 128, 512)

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__(18, in_channels=in_channels, strides=(1, 2, 1, 2), norm_eval=False)
        self.conv1.stride = (1, 1)
        del self.maxpool
        draw_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> maps of the stem, of stages 2 and 4, at strides 1, 2 and 4."""
        stem = self.relu(self.norm1(self.conv1(x)))
        middle = self.layer2(self.layer1(stem))
        return stem, middle, self.layer4(self.layer3(middle))


class VGG16Encoder(nn.Module):
    """VGG-16 with BatchNorm that pools only after its first and its third block."""

    channels = (64, 256, 512)
    published = "vgg16_bn-6c64b313.pth"

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends = []  # of the blocks, their pooling not included
        for block, (channels, convolutions) in enumerate(VGG_BLOCKS):
            for _ in range(convolutions):
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1)]
                layers += [nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
            self.ends.append(len(layers))
            # What does not pool keeps torchvision's numbers of the layers.
            layers.append(nn.MaxPool2d(2) if block in (0, 2) else nn.Identity())
        self.features = nn.Sequential(*layers)
        draw_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> the maps of blocks 1, 3 and 5, at strides 1, 2 and 4."""
        maps = []
        for number, layer in enumerate(self.features, 1):
            x = layer(x)
            if number in (self.ends[0], self.ends[2], self.ends[4]):
                maps.append(x)
        return tuple(maps)

    def load_imagenet(self, weights: dict[str, Tensor]) -> str:
        """Loads torchvision's file, its classifier left out. Returns a line that says so; raises
        CheckpointError for another file."""
        return load_published(self, weights, r"classifier\.", self.published)


class DenseLayer(nn.Module):
    """BN-ReLU-1x1-BN-ReLU-3x3; its output is appended to its input."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, BN_SIZE * GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BN_SIZE * GROWTH)
        self.conv2 = nn.Conv2d(BN_SIZE * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(new)))], dim=1)


class DenseNet121Encoder(nn.Module):
    """DenseNet-121 whose stem has stride 1 and no max-pooling, without the third transition's
    pooling and the last BatchNorm."""

    channels = (64, 256, 1024)
    published = "densenet121-a639ec97.pth"

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        channels = 64
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(in_channels, channels, 7, padding=3, bias=False),
                norm0=nn.BatchNorm2d(channels),
                relu0=nn.ReLU(),
            )
        )
        for block, layers in enumerate(DENSE_BLOCKS, 1):
            dense = OrderedDict(
                (f"denselayer{i + 1}", DenseLayer(channels + i * GROWTH)) for i in range(layers)
            )
            channels += layers * GROWTH
            self.features.add_module(f"denseblock{block}", nn.Sequential(dense))
            if block == len(DENSE_BLOCKS):
                break
            transition = OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(),
                conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
            )
            channels //= 2
            if block < 3:
                transition["pool"] = nn.AvgPool2d(2)
            self.features.add_module(f"transition{block}", nn.Sequential(transition))
        draw_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> the maps of the stem at stride 1, of the second transition and of the
        last block, after a ReLU, both at stride 4."""
        maps = []
        for name, layer in self.features.named_children():
            x = layer(x)
            if name in ("relu0", "transition2"):
                maps.append(x)
        return *maps, F.relu(x)

    def load_imagenet(self, weights: dict[str, Tensor]) -> str:
        """Loads torchvision's file, its last BatchNorm and its classifier left out. Returns a line
        that says so; raises CheckpointError for another file."""
        named = {densenet_name(key): weight for key, weight in weights.items()}
        return load_published(self, named, r"classifier\.|features\.norm5\.", self.published)


ENCODERS = dict(resnet18=ResNet18Encoder, vgg16=VGG16Encoder, densenet121=DenseNet121Encoder)


def draw_weights(network: nn.Module) -> None:
    """Random kernels as torchvision's ResNet and VGG begin with (He et al., ICCV 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
