"""Stacks that have slices in common: what a network computes of a slice whatever lies beside it is
computed once a slice, not once a stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from mmdet_ext.models.densenet import TruncatedDenseNet3D
from mmdet_ext.models.inference import hooked, in_pieces, looks_at_the_batch
from mmdet_ext.ops import OPERATORS, SliceConv, fold, unfold


class SharedSlices(NamedTuple):
    """A batch of stacks by their slices; what `KeySliceMaskRCNN.extract_feat` also takes.

    Attributes:
        slices: (S, windows, H, W) windowed HU, each slice once.
        stacks: (N, D) numbers of the slices of each stack.
        thickness: (N,) mm.
    """

    slices: Tensor
    stacks: Tensor
    thickness: Tensor

    def volumes(self) -> tuple[Tensor, Tensor]:
        """((N, windows, D, H, W), (N,)): the batch with each stack written out."""
        return self.slices[self.stacks].transpose(1, 2), self.thickness


def shares_slices(backbone: object) -> bool:
    """Whether `shared_maps` gives what this backbone gives of stacks that are written out: the
    slices are not channels (2.5D), no norm looks at the whole batch, and no hook at the maps."""
    return (
        type(backbone) is TruncatedDenseNet3D
        and not backbone.slices_as_channels
        and not looks_at_the_batch(backbone)
        and not hooked(backbone)
    )


def shared_maps(
    backbone: TruncatedDenseNet3D, batch: SharedSlices, at_once: int
) -> Iterator[Iterator[Tensor]]:
    """`backbone.maps` of a batch at inference, of `at_once` stacks after each other: for each of
    these groups (n, C_i, D, H_i, W_i) one after the other.

    The stem sees one slice at a time, so it runs once for each. Without fusion all of the backbone
    does, and the stacks are one group.
    """
    # The slices are the depth of one volume: what does not look along it keeps them apart.
    x = in_pieces(backbone, backbone.root, batch.slices.transpose(0, 1)[None], 2, 1)
    if not fuses(backbone, batch.thickness):
        maps = backbone.stages(x, batch.thickness[:1])
        yield (written_out(each, batch.stacks) for each in maps)
        return
    for stacks, thickness in zip(batch.stacks.split(at_once), batch.thickness.split(at_once)):
        yield backbone.stages(written_out(x, stacks), thickness)


def fuses(backbone: TruncatedDenseNet3D, thickness: Tensor) -> bool:
    """Whether a slice of the maps depends on others: not with `SliceConv`, nor, on infinitely
    thick slices, with `AlignShiftConv` and `AlignACSConv` (`AlignA3DConv` takes no more than D)."""
    apart = {SliceConv}
    if thickness.isposinf().all():
        apart |= {OPERATORS["AlignShiftConv"], OPERATORS["AlignACSConv"]}
    return any(type(m) not in apart for m in backbone.modules() if isinstance(m, SliceConv))


def written_out(x: Tensor, stacks: Tensor) -> Tensor:
    """(1, C, S, H, W) maps of slices -> (N, C, D, H, W) of stacks."""
    return unfold(fold(x).index_select(0, stacks.flatten()), len(stacks))
