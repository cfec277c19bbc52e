"""Small plain 2D networks of the families that people convert, for the tests of convert_to_3d.

Each takes (N, 3, H, W), sides of 16 to 32 px, and is written as its family usually is: functional
code, inplace activations, modules in lists, permutes, interpolation.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class BasicBlock(nn.Module):
    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Classifier. `use_reentrant` of activation checkpointing; None does not checkpoint."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2))
        self.fc = nn.Linear(16, 5)
        self.use_reentrant = use_reentrant

    def stage(self, layer, x):
        if self.use_reentrant is None:
            return layer(x)
        return checkpoint(layer, x, use_reentrant=self.use_reentrant)

    def features(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.stage(self.layer1, x)
        return x, self.stage(self.layer2, x)

    def forward(self, x):
        x = self.features(x)[-1]
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class DenseNet(nn.Module):
    """Feature map: BN-ReLU-conv, concatenation, average pooling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.layers = nn.ModuleList()
        for i in range(3):
            self.layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(8 + 8 * i),
                    nn.ReLU(),
                    nn.Conv2d(8 + 8 * i, 16, 1, bias=False),
                    nn.BatchNorm2d(16),
                    nn.ReLU(),
                    nn.Conv2d(16, 8, 3, padding="same", bias=False),
                )
            )
        self.transition = nn.Conv2d(32, 8, 1, bias=False)

    def forward(self, x):
        features = [F.max_pool2d(self.stem(x), 2)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return F.avg_pool2d(self.transition(torch.cat(features, 1)), 2)


class VGG(nn.Module):
    """Classifier on a flattened map of fixed size: 16 x 16 images."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (8, 8, "pool", 16, "pool"):
            if width == "pool":
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(16 * 4 * 4, 12), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(12, 4)
        )

    def forward(self, x):
        return self.classifier(self.features(x).view(len(x), -1))


class UNet(nn.Module):
    """Segmentation map of the input's size, up by ConvTranspose2d."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([self.block(3, 8), self.block(8, 16)])
        self.bottom = self.block(16, 16)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1)]
        )
        self.merge = nn.ModuleList([self.block(32, 8), self.block(16, 8)])
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def block(channels, width):
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.LeakyReLU(0.1, True),
        )

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips)):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.head(x)


class ResNetFPN(nn.Module):
    """Feature pyramid: a dict of maps, coarse ones added to fine ones."""

    def __init__(self):
        super().__init__()
        self.backbone = ResNet()
        self.lateral = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)])
        self.output = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])

    def forward(self, x):
        fine, coarse = (conv(y) for conv, y in zip(self.lateral, self.backbone.features(x)))
        fine = fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        maps = [conv(y) for conv, y in zip(self.output, (fine, coarse))]
        return {"maps": tuple(maps), "pool": F.max_pool2d(maps[-1], 1, stride=2)}


class DeepLabV3Plus(nn.Module):
    """Segmentation map: dilated convolutions, ASPP with an image-pooling branch, a decoder."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.high = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(16), nn.SiLU()
        )
        self.aspp = nn.ModuleList([nn.Conv2d(16, 8, 1)])
        self.aspp.extend(nn.Conv2d(16, 8, 3, padding=d, dilation=d) for d in (2, 4))
        self.pooled = nn.Conv2d(16, 8, 1)
        self.project = nn.Conv2d(32, 8, 1)
        self.reduce = nn.Conv2d(8, 8, 1)
        # Depthwise, then pointwise.
        self.decoder = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 2, 1)
        )

    def forward(self, x):
        low = self.low(x)
        high = self.high(low)
        branches = [torch.relu(conv(high)) for conv in self.aspp]
        pooled = self.pooled(high.mean(dim=(2, 3), keepdim=True))
        branches.append(pooled.expand(-1, -1, *high.shape[-2:]))
        y = torch.cat([self.project(torch.cat(branches, dim=1)), self.reduce(low)], dim=1)
        y = self.decoder(y)
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pwconv1 = nn.Linear(channels, 2 * channels)
        self.pwconv2 = nn.Linear(2 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Classifier: even kernels, depthwise 7 x 7, LayerNorm in channels-last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.block1 = ConvNeXtBlock(8)
        self.norm = nn.LayerNorm(8)
        self.downsample = nn.Conv2d(8, 16, 2, 2)
        self.block2 = ConvNeXtBlock(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.block1(self.stem(x))
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.block2(self.downsample(x))
        return self.head(x.mean([-2, -1]))


NETWORKS = {
    network.__name__: network
    for network in (ResNet, DenseNet, VGG, UNet, ResNetFPN, DeepLabV3Plus, ConvNeXt)
}
