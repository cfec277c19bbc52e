"""3 x 3 convolutions with few multiplications, for wide maps at inference on a CPU: Winograd's
F(4 x 4, 3 x 3) makes 16 values of 36 products where the plain sum takes 144."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 4  # outputs along each axis; a tile reads two more on a side
# Tiles of a pass: each reads all of the kernel, and what a pass holds should stay in the cache.
TILES = 256
# A narrower layer gains less by the products than the transforms take.
LEAST_CHANNELS = 256
# Kernel along one axis -> its 6 values (Lavin and Gray, CVPR 2016, section 4.3).
KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class InferenceConv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, with `conv3x3` in its place where that is faster: at inference on a CPU,
    of a wide layer and a map of many tiles."""

    def forward(self, input: Tensor) -> Tensor:
        if self.is_faster(input):
            return conv3x3(input, self.weight, self.bias)
        return super().forward(input)

    def is_faster(self, input: Tensor) -> bool:
        return (
            can_replace(self)
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and input.device.type == self.weight.device.type == "cpu"
            and input.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and input.ndim == 4
            and input.shape[2] * input.shape[3] >= TILES * TILE**2
        )


def can_replace(conv: nn.Conv2d) -> bool:
    """Whether a layer is one that `conv3x3` computes, and wide enough to gain by it."""
    return (
        conv.kernel_size == (3, 3)
        and conv.padding == conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
    )


def use_inference_conv(owner: nn.Module, name: str) -> None:
    """Gives a module an `InferenceConv2d` for its plain `Conv2d` of a name, with its parameters.

    Weights, their names and, to rounding, results stay the same.
    """
    conv = getattr(owner, name, None)
    # Only torch's own: what derives from it may compute something else.
    if type(conv) is nn.Conv2d and can_replace(conv):
        with torch.device("meta"):
            faster = InferenceConv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
        faster.weight, faster.bias = conv.weight, conv.bias
        setattr(owner, name, faster.train(conv.training))


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution of stride 1 with one pixel of zeros around the map.

    Along each axis six neighbouring inputs and a transformed kernel make four outputs; each of the
    36 combinations is a matrix product over channels.

    Args:
        x: (B, C, H, W) float32, fastest in `torch.channels_last` memory.
        weight: (C', C, 3, 3); bias: (C',).

    Returns:
        (B, C', H, W) in channels-last memory, equal to the plain sum to about three times its
        rounding.
    """
    batch, _, height, width = x.shape
    down, across = -(-height // TILE), -(-width // TILE)
    kernels = transformed_kernel(weight)
    beyond = (1, TILE * across - width + 1, 1, TILE * down - height + 1)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *beyond))
    out = x.new_empty(batch, down * TILE, across * TILE, len(weight))
    step = max(1, TILES // across)
    for image, result in zip(padded, out):
        for first in range(0, down, step):
            rows = min(step, down - first)
            part = image[TILE * first : TILE * (first + rows) + 2]
            products = torch.bmm(transformed_tiles(part, rows, across), kernels)
            tiles = products.view(6, 6, rows, across, -1)
            into = result[TILE * first : TILE * (first + rows)]
            outputs_of(tiles, into.view(rows, TILE, across, TILE, -1))
    if bias is not None:
        out += bias
    return out[:, :height, :width].permute(0, 3, 1, 2)


def transformed_kernel(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (36, C, C')."""
    g = weight.new_tensor(KERNEL)
    taps = weight.permute(2, 3, 1, 0).flatten(2).flatten(0, 1)  # (9, C C')
    return (torch.kron(g, g) @ taps).view(36, weight.shape[1], weight.shape[0])


def transformed_tiles(x: Tensor, down: int, across: int) -> Tensor:
    """(4 down + 2, 4 across + 2, C) of a padded map -> (36, down * across, C)."""
    _, width, channels = x.shape
    along_y = x.new_empty(6, down, width, channels)
    sixth([x[i::TILE][:down] for i in range(6)], along_y)
    tiles = x.new_empty(6, 6, down, across, channels)
    sixth([along_y[:, :, j::TILE][:, :, :across] for j in range(6)], tiles.transpose(0, 1))
    return tiles.view(36, down * across, channels)


def sixth(d: Sequence[Tensor], out: Tensor) -> None:
    """The transform of six neighbours along one axis, each combination into its place of `out`."""
    a, b = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    torch.add(a, b, out=out[1])
    torch.sub(a, b, out=out[2])
    torch.sub(d[4], d[2], out=a)
    torch.sub(d[3], d[1], out=b)
    torch.add(a, b, alpha=2, out=out[3])
    torch.sub(a, b, alpha=2, out=out[4])
    for first in (0, 1):
        into = out[5 * first]
        torch.add(d[first + 4], d[first], alpha=4, out=into)
        into.sub_(d[first + 2], alpha=5)


def outputs_of(tiles: Tensor, out: Tensor) -> None:
    """(6, 6, down, across, C') -> into (down, 4, across, 4, C')."""
    along_y = tiles.new_empty(TILE, *tiles.shape[1:])
    fourth(tiles, along_y)
    fourth(along_y.transpose(0, 1), out.permute(3, 1, 0, 2, 4))


def fourth(m: Tensor, out: Tensor) -> None:
    """Four outputs along the first axis of six transformed values."""
    plus, minus = m[1] + m[2], m[1] - m[2]
    further, between = m[3] + m[4], m[3] - m[4]
    torch.add(m[0], plus, out=out[0])
    out[0].add_(further)
    torch.add(minus, between, alpha=2, out=out[1])
    torch.add(plus, further, alpha=4, out=out[2])
    torch.add(minus, between, alpha=8, out=out[3])
    out[3].add_(m[5])
