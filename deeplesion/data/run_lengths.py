"""Checks COCO's compressed run lengths before pycocotools decodes them: its C code trusts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_AT_ONCE = 2000  # masks, so that the arrays stay in the processor's cache
_MOST_GROUPS = 7  # hold any run of an image


def mask_areas(counts: Sequence[object], pixels: Sequence[int]) -> np.ndarray:
    """How many pixels each mask holds, or -1 where its run lengths are not those of such an image.

    Many masks at once, for a result file holds hundreds of thousands.

    Args:
        counts: compressed run lengths (str), COCO's `counts`; anything else is not valid.
        pixels: of each mask's image, height times width.
    """
    areas = np.full(len(counts), -1)
    usable = [i for i, text in enumerate(counts) if isinstance(text, str) and text.isascii()]
    usable = [i for i in usable if counts[i]]
    for k in range(0, len(usable), _AT_ONCE):
        chosen = usable[k : k + _AT_ONCE]
        areas[chosen] = _areas([counts[i] for i in chosen], [pixels[i] for i in chosen])
    return areas


def _areas(texts: list[str], pixels: list[int]) -> np.ndarray:
    """`mask_areas` of texts that are ASCII and not empty.

    The encoding (pycocotools, rleToString): runs of 0, 1, 0 ... down the columns, from the fourth
    on the difference to the one two before; each in groups of 5 bits from the lowest, plus 48, with
    bit 5 set in all groups but the last and bit 4 of the last as the sign.
    """
    groups = np.frombuffer("".join(texts).encode("ascii"), np.uint8).astype(np.int64) - 48
    end = np.cumsum([len(text) for text in texts])
    start = np.concatenate([[0], end[:-1]])
    more = groups & 0x20 > 0
    bad = np.logical_or.reduceat((groups < 0) | (groups > 0x3F), start) | more[end - 1]
    more[end - 1] = False  # so that a bad mask does not reach into the next

    last = np.flatnonzero(~more)  # the last group of each number
    begin = np.concatenate([[0], last[:-1] + 1])
    length = last - begin + 1
    first = np.searchsorted(begin, start)  # the first number of each mask
    numbers = np.diff(first, append=len(begin))
    mask = np.repeat(np.arange(len(texts)), numbers)
    bad[mask[length > _MOST_GROUPS]] = True
    power = np.minimum(np.arange(len(groups)) - np.repeat(begin, length), _MOST_GROUPS)
    runs = np.add.reduceat((groups & 0x1F) << 5 * power, begin)
    runs -= np.where(groups[last] & 0x10, 1 << 5 * np.minimum(length, _MOST_GROUPS + 1), 0)

    place = np.arange(len(runs)) - np.repeat(first, numbers)
    for parity in (0, 1):  # differences to runs: the very first run is not part of the sums
        chain = np.flatnonzero((place > 0) & (place % 2 == parity))
        summed = np.cumsum(runs[chain])
        head = place[chain] == (1 if parity else 2)
        before = (summed - runs[chain])[head]
        runs[chain] = summed - np.repeat(before, np.diff(np.flatnonzero(head), append=len(chain)))

    bad |= np.minimum.reduceat(runs, first) < 0
    bad |= np.add.reduceat(runs, first) != pixels
    return np.where(bad, -1, np.add.reduceat(np.where(place % 2, runs, 0), first))
