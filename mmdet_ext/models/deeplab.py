"""DeepLabV3: torchvision's segmentation network for images, on mmdet's ResNet; `convert_to_3d`
makes the ACS paper's network for livers of it (JBHI 2021, section IV-C)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.registry import MODELS
from torch import Tensor, nn

from deeplesion.errors import UserError
from mmdet_ext.checkpoint import CheckpointError
from mmdet_ext.models.encoders_2d import draw_weights
from mmdet_ext.models.pretrained import load_published
from mmdet_ext.models.resnet import PUBLISHED, TorchvisionResNet

DEEPLABS = {
    50: "deeplabv3_resnet50_coco-cd0a2569.pth",
    101: "deeplabv3_resnet101_coco-586e9e4e.pth",
}
# Of torchvision's file -> here. Its last layer, for other classes, and its second head are left.
NAMES = {
    r"backbone\.": "encoder.",
    r"classifier\.0\.": "pyramid.",
    r"classifier\.1\.": "conv.",
    r"classifier\.2\.": "norm.",
}
ONE_IMAGE = (
    "DeepLabV3 learns from two images at least at once, on each process: raise "
    "train_dataloader.batch_size, and set train_dataloader.drop_last=True, so that the last batch "
    "of an epoch is no smaller"
)
LEFT = r"classifier\.4\.|aux_classifier\."


@MODELS.register_module()
class DeepLabV3(nn.Module):
    """DeepLabV3 (Chen et al., arXiv:1706.05587), layer by layer torchvision's, without its second
    head: a ResNet whose last two stages are dilated instead of strided, a pyramid of dilated
    convolutions, 3 x 3, BatchNorm, ReLU, 1 x 1 -> classes.

    (The paper names DeepLabv3+, but torchvision, from where its weights come, has none.)

    Args:
        num_classes: the background included.
        depth, base_channels: of the ResNet.
        channels: of the pyramid.
        rates: dilations of the pyramid.
        dropout: after the pyramid.
        in_channels: of the stem. An image of one channel is repeated.

    Attributes:
        encoder: the ResNet. head: the last convolution.

    Raises:
        ValueError: fewer classes than 2.
        UserError: in training, a batch of one: the pyramid normalises means over whole images.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 101,
        base_channels: int = 64,
        channels: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        dropout: float = 0.5,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.in_channels, self.depth = in_channels, depth
        self.encoder = dilated_resnet(depth, base_channels, in_channels)
        last = 8 * base_channels * self.encoder.block.expansion
        self.pyramid = Pyramid(last, channels, rates, dropout)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Conv2d(channels, num_classes, 1)
        draw_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or C, H, W) -> logits (B, num_classes, H, W)."""
        size = x.shape[2:]
        if x.shape[1] == 1 < self.in_channels:
            x = torch.cat([x] * self.in_channels, dim=1)
        x = self.pyramid(self.encoder(x)[-1])
        x = self.head(F.relu(self.norm(self.conv(x))))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def load_published(self, weights: Mapping[str, Tensor], encoder_only: bool = False) -> str:
        """Loads torchvision's DeepLabV3, trained on MS-COCO: all but the last layer, or its ResNet
        alone, which may also come from a file of a ResNet.

        Returns a line that says what was loaded. Raises CheckpointError for another file.
        """
        whole = DEEPLABS.get(self.depth, f"DeepLabV3 of a ResNet-{self.depth}")
        if not any(name.startswith("backbone.") for name in weights):
            if not encoder_only:
                raise CheckpointError(
                    f"this is no DeepLabV3. Give torchvision's {whole}, or, of a ResNet alone, set "
                    "model.transfer=encoder"
                )
            return load_published(self.encoder, weights, r"fc\.", PUBLISHED[self.depth])
        if encoder_only:
            of_resnet = {name.removeprefix("backbone."): w for name, w in weights.items()}
            left = r"classifier\.|aux_classifier\."
            return load_published(self.encoder, of_resnet, left, whole)
        named = {}
        for name, weight in weights.items():
            for pattern, own in NAMES.items():
                name = re.sub(f"^{pattern}", own, name)
            named[name] = weight
        head = {f"head.{name}": w for name, w in self.head.state_dict().items()}  # its own
        return load_published(self, named | head, LEFT, whole)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: 1 x 1, dilated 3 x 3 and the image's mean, concatenated."""

    def __init__(
        self, in_channels: int, channels: int, rates: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        dilated = [convolution(in_channels, channels, 3, rate) for rate in rates]
        mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), *convolution(in_channels, channels))
        self.convs = nn.ModuleList([convolution(in_channels, channels), *dilated, mean])
        self.project = convolution(len(self.convs) * channels, channels)
        self.project.append(nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.convs[-1][2]
        if self.training and len(x) < 2 and not isinstance(norm, nn.SyncBatchNorm):
            raise UserError(ONE_IMAGE)
        *maps, mean = (branch(x) for branch in self.convs)
        mean = F.interpolate(mean, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*maps, mean], dim=1))


def convolution(before: int, after: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(before, after, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def dilated_resnet(depth: int, base_channels: int, in_channels: int) -> TorchvisionResNet:
    """A ResNet of stride 8, its last stages dilated by 2 and 4; the first block of each by half as
    much, as torchvision has it (mmdet's is dilated like the others)."""
    encoder = TorchvisionResNet(
        depth, in_channels=in_channels, base_channels=base_channels, strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4), out_indices=(3,), norm_eval=False,
    )  # fmt: skip
    for stage, dilation in ((encoder.layer3, 1), (encoder.layer4, 2)):
        block = stage[0]
        conv = block.conv2 if isinstance(block, Bottleneck) else block.conv1
        conv.dilation = conv.padding = (dilation, dilation)
    return encoder
