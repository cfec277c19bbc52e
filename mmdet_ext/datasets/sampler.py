"""EpochSampler: which samples, and what their augmentation is a function of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from mmdet.registry import DATA_SAMPLERS
from mmengine.dataset import DefaultSampler


class SampleKey(NamedTuple):
    """What a training sample's augmentation is a function of."""

    seed: int
    epoch: int
    index: int


@DATA_SAMPLERS.register_module()
class EpochSampler(DefaultSampler):
    """mmengine's DefaultSampler that hands every sample its `SampleKey`.

    Augmentation then depends on (seed, epoch, sample) alone: not on the worker that happens to
    draw it, and it differs between epochs, in each of which mmengine seeds its workers alike.
    """

    # How many of this process' samples are left out: an epoch resumed in its middle goes on here.
    start = 0

    def __iter__(self) -> Iterator[SampleKey]:
        for index in itertools.islice(super().__iter__(), self.start, None):
            yield SampleKey(self.seed, self.epoch, index)
