"""Operators as a user might write them, from docs/operators.md: for tests of the contract."""

import torch
import torch.nn.functional as F
from torch import nn

from mmdet_ext.ops import SliceConv, conv_depth, shift_depth


class SliceAttention(SliceConv):
    """Every slice looks at all others, weighted by how alike their means are."""

    def fuse(self, x, thickness):
        query = x.mean((3, 4)).transpose(1, 2)  # (B, D, C)
        weights = (query @ query.transpose(1, 2) / query.shape[2] ** 0.5).softmax(2)
        return x + torch.einsum("bkd,bcdhw->bckhw", weights, x)


class CentredConv(SliceConv):
    """A kernel of depth 3 whose weights sum to 0 in every channel: not linear in the weight."""

    def convolve(self, x, weight, bias):
        weight = weight - weight.mean((1, 2, 3), keepdim=True) + 0.1 * weight.abs()
        weight = torch.stack([0.5 * weight, weight, 0.5 * weight], 2)
        return conv_depth(x, weight, bias, self.stride, self.sides, self.dilation, self.groups)


class GatedConv(SliceConv):
    """The result is gated by its own mean over the slice: its convolution mixes pixels."""

    def convolve(self, x, weight, bias):
        y = super().convolve(x, weight, bias)
        return y * y.mean((3, 4), keepdim=True).sigmoid()


class NeighbourMean(SliceConv):
    """Each slice and the mean of its neighbours, by one learned number a channel."""

    pixelwise = True

    def __init__(self, *args, strength=0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.strength = nn.Parameter(torch.full((self.in_channels, 1, 1, 1), strength))

    def fuse(self, x, thickness):
        return x + self.strength * (shift_depth(x, -1) + shift_depth(x, 1)) / 2


class Blur(SliceConv):
    """Slices are smoothed in-plane ahead of the convolution."""

    def fuse(self, x, thickness):
        return F.avg_pool3d(x, (1, 3, 3), stride=1, padding=(0, 1, 1))


OPERATORS_OF_USERS = (SliceAttention, CentredConv, GatedConv, NeighbourMean, Blur)
