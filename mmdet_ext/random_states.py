"""Python's, numpy's and torch's global random states, from which the framework draws, as plain
data; and what to keep from moving them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch


def random_states() -> dict:
    """The states of all generators that a process draws from, its GPU's too, if it uses one."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = dict(
        python=[version, list(numbers), gauss],
        numpy=[name, keys.tolist(), *rest],
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    """Sets what `random_states` returned, maybe by way of a file."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """What is drawn inside leaves no trace outside."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


@contextlib.contextmanager
def seeded(key: Sequence[int]) -> Iterator[None]:
    """What is drawn inside (on the CPU) depends on `key` alone and leaves no trace outside."""
    with kept_random_states():
        seeds = np.random.SeedSequence(key).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])  # noqa: NPY002
        torch.default_generator.manual_seed(int(seeds[2]))
        yield
