"""EpochSampler: which samples, and what their augmentation is a function of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mmdet.registry import DATA_SAMPLERS
from mmengine.dataset import DefaultSampler

from mmdet_ext.random_states import seeded


class SampleKey(NamedTuple):
    """What a training sample's augmentation is a function of."""

    seed: int
    epoch: int
    index: int


def index_and_key(index: int | SampleKey) -> tuple[int, SampleKey | None]:
    """Which sample a data set is asked for, and the key that fixes what is drawn, if any."""
    return (index.index, index) if isinstance(index, SampleKey) else (index, None)


def run_pipeline(pipeline: Callable, sample: dict, key: SampleKey | None) -> dict:
    """What the pipeline makes of a sample. With a key all that it draws from the global generators,
    as transforms of mmdet and MONAI do, depends on the key alone."""
    if key is None:
        return pipeline(sample)
    with seeded(key):
        return pipeline(sample)


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
