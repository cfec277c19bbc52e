"""Which slices of a CT volume a network looks at: the key slices, those of them that show a body,
and the stack around each, from the true positions of the slices."""

from __future__ import annotations

import cv2
import numpy as np

from ct_volumes.gaps import parts
from ct_volumes.hounsfield import AIR_HU
from ct_volumes.volume import CTVolume
from deeplesion.data.slices import blend, plan_stack
from deeplesion.errors import DataError

# Intervals of one run of slices differ by no more: headers round, tables move a little unevenly.
EVEN = 0.02  # of the interval

# What is denser than this, on pixels of about 4 mm, is body. Fat lies at -100 HU, and the thin
# shell of a table, averaged with the air or foam beside it, mostly below.
BODY_HU = -300.0
BODY_PIXEL_MM = 4.0
LEAST_BODY_MM2 = 1000.0  # less than an infant's neck


def key_slices(volume: CTVolume, interval_mm: float | None = None) -> list[int]:
    """Indices of the slices nearest to every `interval_mm` from the first slice on, ascending.

    None, or an interval shorter than the slices' own, is every slice. Of two that are equally near
    the first is taken; positions within a gap fall on the slices beside it.

    Raises ValueError if the interval is not a positive number.
    """
    if interval_mm is None:
        return list(range(len(volume.hu)))
    if not 0 < interval_mm < np.inf:
        raise ValueError(f"interval_mm must be a positive number of millimetres, got {interval_mm}")
    positions = np.round(volume.positions_mm - volume.positions_mm[0], 6)
    wanted = np.arange(int(positions[-1] / interval_mm + 1e-6) + 1) * interval_mm
    below = np.clip(np.searchsorted(positions, wanted, side="right") - 1, 0, None)
    above = np.minimum(below + 1, len(positions) - 1)
    nearer = np.round(positions[above] - wanted, 6) < np.round(wanted - positions[below], 6)
    return np.unique(np.where(nearer, above, below)).tolist()


def has_body(hu: np.ndarray, spacing_mm: tuple[float, float]) -> bool:
    """Whether a slice shows a part of a body: a piece of 10 cm2 as dense as fat or denser.

    Looked at in pixels of about 4 mm, without what is thinner than 12 mm: air, a table, a head
    rest, cables and blankets are no body. Where in doubt it is one.

    Args:
        hu: (H, W) int16.
        spacing_mm: (of rows, of columns).
    """
    size = [max(1, round(n * mm / BODY_PIXEL_MM)) for n, mm in zip(hu.shape, spacing_mm)]
    # Metal would make up for the air around it, and so would padding below air the other way.
    coarse = np.clip(hu, AIR_HU, 200).astype(np.float32)
    if size[0] < hu.shape[0] and size[1] < hu.shape[1]:
        coarse = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_AREA)
    pixel_mm2 = np.prod([n * mm for n, mm in zip(hu.shape, spacing_mm)]) / coarse.size
    dense = cv2.morphologyEx(
        (coarse > BODY_HU).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)
    )
    # Without the background, which is part 0.
    areas = cv2.connectedComponentsWithStats(dense, connectivity=4)[2][1:, cv2.CC_STAT_AREA]
    return bool((areas * pixel_mm2 >= LEAST_BODY_MM2).any())


def plan_volume_stack(
    positions_mm: np.ndarray,
    key: int,
    num_slices: int,
    policy: str = "keep_thick",
    target_mm: float = 2.0,
    interpolation: str = "exact",
) -> tuple[list[tuple[int, int, float]], float]:
    """Say which slices make up the stack around slice `key` of a volume.

    Where the slices in reach are evenly spaced this is `deeplesion.data.slices.plan_stack`. Where
    they are not, a stack that is resampled takes each position from the two slices around it,
    linearly in mm (under either `interpolation`: the weights of 'released' have no meaning there);
    one that keeps thick slices takes the neighbours as they are, and its thickness is the mean of
    the intervals on both sides of the key slice, which also decides what is thick. Nothing is
    taken from beyond a gap (`ct_volumes.gaps`): as at an end of the volume, the slice before it is
    repeated.

    Args:
        positions_mm: (S,) increasing, where each slice lies.
        key: the slice in the middle.
        num_slices, policy, target_mm, interpolation: see `deeplesion.data.slices.load_slices`.

    Returns what `plan_stack` does: for each position, from head to feet, (near, far, weight), and
    the thickness in mm. A slice without neighbours is repeated, the thickness infinite.

    Raises DataError if there is no such slice, ValueError on an option out of its range.
    """
    positions_mm = np.asarray(positions_mm, np.float64)
    options = (num_slices, policy, target_mm, interpolation)
    if not 0 <= key < len(positions_mm):
        raise DataError(f"there is no slice {key}: slices are 0..{len(positions_mm) - 1}")
    part = parts(positions_mm)
    first, last = np.flatnonzero(part == part[key])[[0, -1]].tolist()
    if first == last:
        return plan_stack(key, None, (first, last), *options)

    low, high = _even_run(positions_mm, key, first, last)
    thickness = round(float(positions_mm[high] - positions_mm[low]) / (high - low), 6)
    far_away = 10 * num_slices * (1 + int(target_mm / thickness))
    ends = (
        low if low == first else key - far_away,
        high if high == last else key + far_away,
    )
    plan, stack_mm = plan_stack(key, thickness, ends, *options)
    if all(low <= index <= high for near, far, _ in plan for index in (near, far)):
        return plan, stack_mm
    return _uneven_plan(positions_mm[first : last + 1], key - first, first, *options[:3])


def slice_of(hu: np.ndarray, place: tuple[int, int, float]) -> np.ndarray:
    """The (H, W) int16 slice that an entry of a plan, (near, far, weight), stands for."""
    near, far, weight = place
    return blend(hu[near], hu[far], weight)


def _even_run(positions: np.ndarray, key: int, first: int, last: int) -> tuple[int, int]:
    """The first and last of the evenly spaced slices around `key`, at least two of them."""
    step = (
        positions[key] - positions[key - 1] if key > first else positions[1 + key] - positions[key]
    )
    even = np.abs(np.diff(positions[first : last + 1]) - step) <= EVEN * step
    breaks = np.flatnonzero(~even) + first  # break b lies between slices b and b + 1
    low = int(breaks[breaks < key][-1]) + 1 if (breaks < key).any() else first
    high = int(breaks[breaks >= key][0]) if (breaks >= key).any() else last
    return low, high


def _uneven_plan(
    positions: np.ndarray, key: int, first: int, num_slices: int, policy: str, target_mm: float
) -> tuple[list[tuple[int, int, float]], float]:
    """`plan_volume_stack` of slices without a gap; `first` is added to the indices."""
    beside = positions[max(key - 1, 0) : key + 2]
    thickness = round(float(beside[-1] - beside[0]) / (len(beside) - 1), 6)
    offsets = range(-(num_slices // 2), num_slices // 2 + 1)
    if policy == "keep_thick" and thickness > target_mm:
        own = [min(max(key + offset, 0), len(positions) - 1) + first for offset in offsets]
        return [(index, index, 0.0) for index in own], thickness

    plan = []
    for offset in offsets:
        wanted = positions[key] + offset * target_mm
        after = int(np.clip(np.searchsorted(positions, wanted), 1, len(positions) - 1))
        interval = positions[after] - positions[after - 1]
        weight = round(float(np.clip((wanted - positions[after - 1]) / interval, 0, 1)), 6)
        near, far = after - 1, after
        if offset <= 0:  # near is the one on the side of the key slice, as in `plan_stack`
            near, far, weight = far, near, round(1 - weight, 6)
        if weight in (0, 1):
            near = far = far if weight else near
            weight = 0.0
        plan.append((near + first, far + first, weight))
    return plan, float(target_mm)
