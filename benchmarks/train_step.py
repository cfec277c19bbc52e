"""A training step, forward and backward: ours against the papers' way, and with activation
checkpointing against without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.measure import Case

FUSIONS = ("AlignShiftConv", "A3DConv")


def cases(num_slices: int = 3, size: int = 256, batch: int = 1) -> list[Case]:
    """Of backbone and neck; the last cases are ours, checkpointed, against ours."""
    inputs = plain.volumes(batch, num_slices, size)
    against_plain, checkpointed = [], []
    for fusion in FUSIONS:
        parts = plain.build(fusion, num_slices)
        saving = plain.build(fusion, num_slices, with_cp=True)
        ours = partial(step, network, parts, inputs)
        name = f"{fusion} {num_slices} x {size} x {size}, batch {batch}"
        against_plain.append(
            Case(name, ours, partial(step, plain.network, parts, inputs), close, memory=True)
        )
        checkpointed.append(
            Case(
                f"{fusion}, with_cp against without",
                partial(step, network, saving, inputs),
                ours,
                close,
                memory=True,
            )
        )
    return against_plain + checkpointed


def network(backbone: nn.Module, neck: nn.Module, images: Tensor, thickness: Tensor) -> Tensor:
    return neck(backbone(images, thickness))[0]


def step(forward: Callable[..., Tensor], parts: tuple, inputs: tuple) -> list[Tensor]:
    """The loss, and the gradients of the first layers."""
    parameters = [p for part in parts for p in part.parameters()]
    for parameter in parameters:
        parameter.grad = None
    loss = forward(*parts, *inputs).square().mean()
    loss.backward()
    return [plain.finished(loss.detach()), *(p.grad for p in parameters[:3])]


def close(ours: list[Tensor], baseline: list[Tensor]) -> None:
    """The loss to 1e-4 and the gradients of the first layers, behind all others, to 5 % in norm:
    rounding turns some of the many ReLUs; in float64 they are equal, which the tests check."""
    torch.testing.assert_close(ours[0], baseline[0], rtol=1e-4, atol=0)
    for a, b in zip(ours[1:], baseline[1:], strict=True):
        assert (a - b).norm() <= 0.05 * b.norm(), ((a - b).norm() / b.norm()).item()
