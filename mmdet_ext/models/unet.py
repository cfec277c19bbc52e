"""The small 2D U-Net of the ACS paper's proof of concept (JBHI 2021, section IV-A)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShapesUNet(nn.Module):
    """Two levels down, two up; only the inner one has a skip connection, from the pooled map.

    `convert_to_3d(network, 'ACSConv', depth='isotropic')` makes it the paper's 3D one. For features
    of an untrained network set `head = nn.Identity()` and `inner_mode = 'nearest'`.

    Args:
        num_classes: background included.
        in_channels: of the image.

    Attributes:
        head: 1 x 1 convolution of the 32 features of every pixel.
        inner_mode: how the inner map is enlarged, as `F.interpolate` has it.
    """

    def __init__(self, num_classes: int, in_channels: int = 1) -> None:
        super().__init__()
        self.down1 = double_conv(in_channels, 64, 64)
        self.down2 = double_conv(64, 128, 128)
        self.up = double_conv(128 + 64, 64, 32)
        self.head = nn.Conv2d(32, num_classes, 1)
        self.inner_mode = "bilinear"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), sides divisible by 4 -> logits (B, num_classes, H, W)."""
        half = F.max_pool2d(self.down1(x), 2)
        quarter = F.max_pool2d(self.down2(half), 2)
        y = F.interpolate(quarter, scale_factor=2, mode=self.inner_mode)
        y = self.up(torch.cat([y, half], dim=1))
        return self.head(F.interpolate(y, scale_factor=2, mode="bilinear"))


def double_conv(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, middle, 3, padding=1), nn.BatchNorm2d(middle), nn.ReLU(True),
        nn.Conv2d(middle, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(True),
    )  # fmt: skip


@torch.no_grad()
def kaiming_uniform(network: nn.Module) -> None:
    """Draws all convolutions' weights anew, kaiming uniform by fan-in for ReLU: how the paper's 2D
    and plain 3D networks start. Biases and norms stay."""
    for parameter in network.parameters():
        if parameter.ndim > 2:
            nn.init.kaiming_uniform_(parameter, mode="fan_in", nonlinearity="relu")
