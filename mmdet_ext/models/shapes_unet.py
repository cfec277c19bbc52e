"""ShapesUNet: the U-Net of the ACS paper's proof of concept, for images; `convert_to_3d` makes the
networks for volumes of it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class ShapesUNet(nn.Module):
    """U-Net of two levels (ACS, JBHI 2021, section IV-A; the layers are those of its code).

        1 -> 64 -> 64, pooled -> 128 -> 128, pooled, upsampled and concatenated with the pooled
        64 -> 64 -> 32, upsampled, 1 x 1 -> classes

    Each arrow is a 3 x 3 convolution with bias, BatchNorm and ReLU. 389,286 parameters for 6
    classes.

    Args:
        num_classes: the background included.
        inner_mode: of the first upsampling. The mAUC of features is taken with 'nearest', training
            with 'bilinear' (trilinear of volumes); the last one is always bilinear.

    Attributes:
        head: the 1 x 1 convolution; all else may be transferred to other classes.
    """

    def __init__(self, num_classes: int, inner_mode: str = "bilinear") -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if inner_mode not in ("bilinear", "nearest"):
            raise ValueError(f"inner_mode must be 'bilinear' or 'nearest', got {inner_mode!r}")
        self.encoder1 = convolutions(1, 64, 64)
        self.encoder2 = convolutions(64, 128, 128)
        self.pool = nn.MaxPool2d(2)
        self.inner_up = nn.Upsample(scale_factor=2, mode=inner_mode)
        self.decoder = convolutions(64 + 128, 64, 32)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Conv2d(32, num_classes, 1)

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        """(B, 1, H, W), H and W multiples of 4 -> logits (B, num_classes, H, W), or the 32 channels
        (B, 32, H, W) that they are made of."""
        pooled = self.pool(self.encoder1(x))
        inner = self.inner_up(self.pool(self.encoder2(pooled)))
        last = self.up(self.decoder(torch.cat([pooled, inner], dim=1)))
        return last if features else self.head(last)


def convolutions(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)
