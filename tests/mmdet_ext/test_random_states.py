"""The global random states, saved, restored and kept apart."""

import random

import numpy as np
import pytest
import torch

from mmdet_ext.random_states import kept_random_states, random_states, seeded, set_random_states


def draw():
    """From every generator, the second of a pair of normal numbers included."""
    numbers = [random.random(), random.gauss(0, 1), torch.rand(1).item(), torch.randn(1).item()]
    return numbers + [np.random.rand(), np.random.randn()]  # noqa: NPY002


def test_states_come_back_from_a_file_of_plain_data(tmp_path):
    draw()
    torch.save(random_states(), tmp_path / "states.pth")
    expected = [draw(), draw()]
    set_random_states(torch.load(tmp_path / "states.pth", weights_only=True))
    assert [draw(), draw()] == expected


def test_what_is_drawn_inside_leaves_no_trace():
    states = random_states()
    expected = draw()
    set_random_states(states)
    with pytest.raises(KeyboardInterrupt), kept_random_states():
        draw()
        raise KeyboardInterrupt
    assert draw() == expected


def test_seeded_depends_on_the_key_alone():
    def drawn(*key):
        with seeded(key):
            return draw()

    first = drawn(0, 1, 2)
    draw()
    assert drawn(0, 1, 2) == first
    others = [drawn(0, 1, 3), drawn(0, 2, 2), drawn(1, 1, 2), drawn(0, 2, 1)]
    assert all(set(first).isdisjoint(other) for other in others)
