"""How a network runs where autograd does not record: norms folded into kernels, maps in pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_ext.ops import Affine, SliceConv

# What a strip of a map may take: well below a processor's last-level cache.
STRIP_BYTES = 4 << 20


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Runs BatchNorm layers of `module` without counting the batch in their running statistics.

    Used while activation checkpointing computes a forward pass again: the batch was counted the
    first time. Layers normalise by the batch in training mode either way.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    counted = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({k: v.clone() for k, v in norm._buffers.items() if v is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, counted):
            norm._buffers.update(buffers)


def affine_of(norm: nn.BatchNorm3d) -> Affine | None:
    """(scale, shift) of a norm that uses its running statistics. None if it uses the batch's, or
    must be called: pruning too makes the weight in a hook."""
    if norm.training or norm.running_mean is None or hooked(norm):
        return None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


def norm_relu(norm: nn.BatchNorm3d, x: Tensor) -> Tensor:
    """relu(norm(x)) in memory of its own, (B, C, D, H, W)."""
    affine = affine_of(norm)
    if affine is None:
        return F.relu(norm(x), inplace=True)
    # On a CPU, PyTorch's BatchNorm would copy a part of a larger map first.
    scale, shift = (a.to(x.dtype).view(-1, 1, 1, 1) for a in affine)
    return torch.addcmul(shift, x, scale).relu_()


def conv_norm_relu(conv: SliceConv, norm: nn.BatchNorm3d, x: Tensor, *args, **kwargs) -> Tensor:
    """relu(norm(conv(x))), the norm folded into the kernel where it uses running statistics."""
    # A hook on the convolution sees its own output, not the norm's.
    affine = None if conv._forward_hooks else affine_of(norm)
    if affine is None:
        return F.relu(norm(conv(x, *args, **kwargs)), inplace=True)
    # In place only where autograd does not record: the operator's last step may need its output.
    y = conv(x, *args, affine=affine, **kwargs)
    return F.relu(y, inplace=not torch.is_grad_enabled())


def looks_at_the_batch(module: nn.Module) -> bool:
    """Whether anything in `module` is in training mode, or normalises without running statistics:
    it may need the whole of what it is given."""
    norm = nn.modules.batchnorm._NormBase
    return any(
        m.training or (isinstance(m, norm) and m.running_mean is None) for m in module.modules()
    )


def hooked(module: nn.Module) -> bool:
    """Whether forward hooks see what goes into `module` or comes out of it: it must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def takes_pieces(module: nn.Module) -> bool:
    """Whether `module` may be given its input in pieces: it computes the same, and no hook in it
    would see a piece for the whole."""
    return not (looks_at_the_batch(module) or any(map(hooked, module.modules())))


def in_pieces(
    module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, dim: int, length: int
) -> Tensor:
    """function(x) of a (B, C, D, H, W) map, at inference on a CPU computed from pieces of `length`
    along `dim`, for functions to which the pieces are independent.

    What several passes write and read stays in the processor's cache, and what lies between input
    and output takes the memory of a piece.
    """
    size = x.shape[dim]
    whole = torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling()
    if whole or length >= size or not takes_pieces(module):
        return function(x)
    out, done = None, 0
    # Pooling would leave nothing of a remainder of one row: the piece before takes it along.
    cuts = range(length, size - (size % length == 1), length)
    for piece in x.tensor_split(tuple(cuts), dim):
        y = function(piece)
        if out is None:
            shape = list(y.shape)
            shape[dim] = size * shape[dim] // piece.shape[dim]
            out = empty_map(y, shape)
        out.narrow(dim, done, y.shape[dim]).copy_(y)
        done += y.shape[dim]
    return out


def in_strips(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`in_pieces` of an even number of rows, about `STRIP_BYTES` large."""
    rows = STRIP_BYTES * x.shape[3] // (x.element_size() * x.numel())
    return in_pieces(module, function, x, dim=3, length=max(2, rows // 2 * 2))


def empty_map(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Channels-last memory of the type of `x`."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
