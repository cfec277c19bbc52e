"""Convolution along depth too, and the folding of depth into the batch that it rests on.

A 1 x K x K convolution over D slices is a 2D convolution over B*D images. In
`torch.channels_last_3d` memory folding depth into the batch is a view, so the operators speak
(B, C, D, H, W) to the outside and run 2D kernels inside; kernels that reach along depth do so in
`conv_depth`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def fold(x: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B*D, C, H, W), slices of a volume next to each other.

    A view when `x` lies in `torch.channels_last_3d` memory, a copy otherwise.
    """
    return x.transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, batch: int) -> Tensor:
    """(B*D, C, H, W) -> (B, C, D, H, W), the inverse of `fold`; always a view."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def conv_depth(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    sides: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    spacing: Tensor | None = None,
) -> Tensor:
    """3D convolution: with three strides `F.conv3d`, with two one that keeps the depth.

        out[:, :, d] = sum_j conv2d(x[:, :, d + j - (K - 1) // 2], weight[:, :, j]) + bias

    over the K depth taps whose slice exists. The latter runs on 2D kernels: one 2D convolution
    makes all taps' terms, which are then added, each moved by its offset.

    Args:
        x: (B, C, D, H, W).
        weight: (C', C / groups, K, kh, kw).
        stride, dilation: (height, width) or (depth, height, width).
        sides: zero padding left, right, top, bottom or left, right, top, bottom, front, back; a
            negative number crops.
        spacing: (B,), with two strides: how far apart the depth taps lie, 0 to 1 slices; None is 1.
            Between slices (the zeros beyond the ends included) x is interpolated linearly.

    Returns:
        (B, C', D, H', W') or (B, C', D', H', W').

    Raises:
        ValueError: spacing with three strides.
    """
    if len(stride) == 3:
        if spacing is not None:
            raise ValueError("taps can be spaced along depth only where depth is kept")
        padding = sides[4::-2]
        if padding != sides[5::-2] or min(padding) < 0:
            x, padding = F.pad(x, sides), 0
        return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    depth, taps = x.shape[2], weight.shape[2]
    centre = (taps - 1) // 2
    first, last = 0, taps
    if spacing is None:
        # A tap that reaches no slice at all is left out: with D = 1 only the centre is computed.
        first, last = max(0, centre - depth + 1), min(taps, centre + depth)
    taps, centre = last - first, centre - first
    # Output channels in the order (group, tap, channel), so that groups stay together.
    weight = weight[:, :, first:last].unflatten(0, (groups, -1)).movedim(3, 1).flatten(0, 2)
    if bias is not None:
        bias = F.pad(bias.view(groups, 1, -1), (0, 0, centre, taps - 1 - centre)).flatten()
    left, right, top, bottom = sides
    folded = fold(x)
    if left == right >= 0 and top == bottom >= 0:
        padding = (top, left)
    else:
        folded, padding = F.pad(folded, sides), 0
    y = unfold(F.conv2d(folded, weight, bias, stride, padding, dilation, groups), len(x))
    if taps == 1:
        return y
    terms = y.unflatten(1, (groups, taps, -1)).unbind(2)
    total = terms[centre].clone()
    for j, term in enumerate(terms):
        if (offset := j - centre) == 0:
            continue
        if spacing is None:
            add_moved_(total, term, offset)
            continue
        # Convolution is linear: the terms are interpolated, which have fewer channels than x.
        towards = 1 if offset > 0 else -1
        for step in range(0, offset + towards, towards):
            share = (1 - (spacing * offset - step).abs()).clamp(min=0)
            add_moved_(total, term, step, share.to(term.dtype).view(-1, *[1] * (term.ndim - 1)))
    # A copy of a single volume's channels has a batch stride that hides its memory format from
    # what comes next, torch.cat for one; going to images and back gives it the usual one.
    return unfold(fold(total.flatten(1, 2)), len(x))


def add_moved_(total: Tensor, term: Tensor, step: int, share: Tensor | None = None) -> None:
    """total[..., d, :, :] += share * term[..., d + step, :, :] for all d where that slice exists;
    without `share` it is 1."""
    depth = total.shape[-3]
    if abs(step) >= depth:
        return
    into = total.narrow(-3, max(0, -step), depth - abs(step))
    of = term.narrow(-3, max(0, step), depth - abs(step))
    if share is None:
        into.add_(of)
    else:
        into.addcmul_(of, share)
