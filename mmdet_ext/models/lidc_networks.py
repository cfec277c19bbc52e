"""The ACS paper's networks for lung nodules (JBHI 2021, section IV-B and supplement), for images;
`convert_to_3d(depth='isotropic')` makes those for volumes of 48 voxels a side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from mmdet_ext.models.encoders_2d import ENCODERS, draw_weights

# Channels after the first and the second merging of maps, and before the head.
DECODERS = dict(resnet18=(512, 512, 128), vgg16=(256, 64, 16), densenet121=(256, 64, 16))


class NoduleNetwork(nn.Module):
    """An encoder of torchvision's and what is built on it."""

    def __init__(self, backbone: str, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if backbone not in ENCODERS:
            raise ValueError(f"backbone must be one of {', '.join(ENCODERS)}, got {backbone!r}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.in_channels = in_channels
        self.encoder = ENCODERS[backbone](in_channels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[1] == 1 < self.in_channels:
            x = torch.cat([x] * self.in_channels, dim=1)
        return self.encoder(x)

    def load_published(self, weights: Mapping[str, Tensor], encoder_only: bool = True) -> str:
        """Loads torchvision's ImageNet weights into the encoder; the file has no others.

        Returns a line that says what was loaded. Raises CheckpointError for another file.
        """
        return self.encoder.load_imagenet(dict(weights))


@MODELS.register_module()
class NoduleFCN(NoduleNetwork):
    """Segments: an encoder, whose last map is enlarged twice and merged with finer ones.

        last, upsampled and concatenated with the middle one, 1 x 1
        upsampled and concatenated with the full one, 1 x 1
        3 x 3, BatchNorm, ReLU, 1 x 1 -> classes

    Upsampling is nearest, and only the last convolution has a bias.

    Args:
        backbone: 'resnet18', 'vgg16' (with BatchNorm) or 'densenet121'.
        num_classes: the background included.
        in_channels: of the stem. An image of one channel is repeated, as the paper does.

    Attributes:
        head: the last convolution; all else may be transferred to other classes.
    """

    def __init__(
        self, backbone: str = "resnet18", num_classes: int = 2, in_channels: int = 3
    ) -> None:
        super().__init__(backbone, num_classes, in_channels)
        full, middle, last = self.encoder.channels
        first, second, inner = DECODERS[backbone]
        self.merge_middle = nn.Conv2d(last + middle, first, 1, bias=False)
        self.merge_full = nn.Conv2d(first + full, second, 1, bias=False)
        self.conv = nn.Conv2d(second, inner, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.head = nn.Conv2d(inner, num_classes, 1)
        for part in (self.merge_middle, self.merge_full, self.conv, self.head):
            draw_weights(part)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or C, H, W) -> logits (B, num_classes, H, W)."""
        full, middle, last = self.encode(x)
        x = self.merge_middle(torch.cat([F.interpolate(last, middle.shape[2:]), middle], dim=1))
        x = self.merge_full(torch.cat([F.interpolate(x, full.shape[2:]), full], dim=1))
        return self.head(F.relu(self.norm(self.conv(x))))


@MODELS.register_module()
class NoduleClassifier(NoduleNetwork):
    """Classifies: the mean of the encoder's last map, and a linear layer `head`.

    Args: as of `NoduleFCN`.
    """

    def __init__(
        self, backbone: str = "resnet18", num_classes: int = 2, in_channels: int = 3
    ) -> None:
        super().__init__(backbone, num_classes, in_channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(self.encoder.channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or C, H, W) -> logits (B, num_classes)."""
        return self.head(self.pool(self.encode(x)[-1]).flatten(1))
