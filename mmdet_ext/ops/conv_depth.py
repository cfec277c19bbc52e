"""3D convolution on 2D kernels, and the folding of depth into the batch that it rests on.

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
) -> Tensor:
    """3D convolution on 2D kernels.

        out[:, :, d] = sum_j conv2d(x[:, :, s * d + r * j - front], weight[:, :, j]) + bias

    over the K depth taps whose slice exists; s, r and front are stride, dilation and zero padding
    along depth. With geometry in-plane alone the depth is kept: s = r = 1, front = (K - 1) // 2.

    One 2D convolution makes the terms of all taps that look at the same slices (every s-th one;
    with s = 1 these are all taps), which are then added, each moved by its offset.

    Args:
        x: (B, C, D, H, W).
        weight: (C', C / groups, K, kh, kw).
        stride, dilation: (height, width) or (depth, height, width).
        sides: zero padding left, right, top, bottom and, with a stride along depth, front and
            back; a negative number crops.

    Returns:
        (B, C', D', H', W').

    Raises:
        ValueError: the kernel is deeper than the volume with its padding.
    """
    batch, depth, taps = len(x), x.shape[2], weight.shape[2]
    if len(stride) == 2:
        step, rate, front, length = 1, 1, (taps - 1) // 2, depth
    else:
        (step, *stride), (rate, *dilation) = stride, dilation
        *sides, front, back = sides
        length = (depth + front + back - rate * (taps - 1) - 1) // step + 1
        if length < 1:
            raise ValueError(
                f"a kernel of {taps} taps along depth, dilation {rate}, is larger than {depth} "
                f"slices with {front} and {back} of padding"
            )
    # Through tap j, out[d] sees the slice step * (d + lead) + phase. A tap that reaches no slice at
    # all is left out: with D = 1 and depth kept only the centre is computed.
    phases: dict[int, list[tuple[int, int]]] = {}
    for j in range(taps):
        lead, phase = divmod(rate * j - front, step)
        if -length < lead < (depth - phase + step - 1) // step:
            phases.setdefault(phase, []).append((j, lead))
    if not phases:  # all of the result lies in the padding
        phases[0] = [(0, -length)]

    left, right, top, bottom = sides
    same = left == right >= 0 and top == bottom >= 0
    terms: list[tuple[Tensor, int]] = []  # (B, groups, C' / groups, slices, H', W') and its lead
    biased = False
    for phase, members in phases.items():
        slices = x if step == 1 else x[:, :, phase::step]
        # Slices that no tap sees are not computed.
        start = max(0, members[0][1])
        slices = slices[:, :, start : members[-1][1] + length]
        leads = [lead - start for _, lead in members]
        # The bias comes with a tap that sees a slice wherever the result has one.
        whole = [0 <= lead <= slices.shape[2] - length for lead in leads]
        place = None if biased or bias is None or True not in whole else whole.index(True)
        biased = biased or place is not None
        (first, *_), (last, *_), n = members[0], members[-1], len(members)
        kernels = weight[:, :, first : last + 1 : (last - first) // max(n - 1, 1) or 1]
        # Output channels in the order (group, tap, channel), so that groups stay together.
        kernels = kernels.unflatten(0, (groups, -1)).movedim(3, 1).flatten(0, 2)
        own = None
        if place is not None:
            own = F.pad(bias.view(groups, 1, -1), (0, 0, place, n - 1 - place)).flatten()
        images = fold(slices)
        padding = (top, left) if same else 0
        if not same:
            images = F.pad(images, (left, right, top, bottom))
        y = unfold(F.conv2d(images, kernels, own, stride, padding, dilation, groups), batch)
        if len(phases) == n == 1 and whole[0]:
            return y
        terms += zip(y.unflatten(1, (groups, n, -1)).unbind(2), leads)
    return add_terms(terms, length, None if biased else bias, groups)


def add_terms(
    terms: list[tuple[Tensor, int]], length: int, bias: Tensor | None, groups: int
) -> Tensor:
    """out[d] = the sum of term[d + lead], where there is one, over all (term, lead); plus bias.

    Args:
        terms: each (B, groups, C' / groups, slices, H', W').
        bias: (C',).

    Returns:
        (B, C', length, H', W').
    """
    whole = next((i for i, (y, lead) in enumerate(terms) if 0 <= lead <= y.shape[3] - length), None)
    if whole is None:
        like = terms[0][0]
        total = like.new_zeros(*like.shape[:3], length, *like.shape[4:])
    else:
        term, lead = terms[whole]
        total = term[:, :, :, lead : lead + length].clone()
    if bias is not None:
        total += bias.to(total.dtype).view(groups, -1, 1, 1, 1)
    for i, (term, lead) in enumerate(terms):
        start, stop = max(0, -lead), min(length, term.shape[3] - lead)
        if i != whole and start < stop:
            total[:, :, :, start:stop] += term[:, :, :, start + lead : stop + lead]
    # A copy of a single volume's channels has a batch stride that hides its memory format from
    # what comes next, torch.cat for one; going to images and back gives it the usual one.
    return unfold(fold(total.flatten(1, 2)), len(total))
