"""Gaps of a scan: where slices are missing, and the parts between them."""

import numpy as np

from ct_volumes.gaps import gaps, parts


def positions_of(steps):
    return -123.456 + np.append(0, np.cumsum(steps))


def test_gaps_are_intervals_longer_than_those_on_both_sides():
    assert not gaps(positions_of([1, 1, 5, 5, 5])).any()
    assert not gaps(positions_of([3])).any() and not gaps(positions_of([])).any()
    assert gaps(positions_of([1, 2, 1, 1, 4])).tolist() == [False, True, False, False, True]
    assert gaps(positions_of([80])).tolist() == [True]  # no CT slice is so thick


def test_parts_end_at_gaps_that_are_long_enough():
    positions = positions_of([1, 1, 7, 1, 1, 300, 1])
    assert parts(positions).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert parts(positions, 10.0).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert parts(positions_of([1, 1, 20, 20])).tolist() == [0] * 5  # thicker slices follow
    assert parts(positions_of([])).tolist() == [0]
