"""How well single channels of features tell foreground from background: the area under the ROC
curve, over more voxels than can be sorted, from histograms."""

from __future__ import annotations

import torch
from torch import Tensor

# A bin is what floats agree in: exponents of 2^-24 to 2^8, each in 2^11 parts, both signs; and 0.
MANTISSA = 11
LEAST, EXPONENTS = -24, 32
HALF = EXPONENTS << MANTISSA


class FeatureAUC:
    """AUC of every channel, foreground against background, over all voxels that are added.

    Values that agree in the first 12 binary digits count as equal, and a pair of equal values as
    half in order, as in the AUC by sorting. From some 10^5 voxels on the result is that of sorting
    to 10^-6, since a bin holds pairs in both orders; `uncertainty` bounds what it could differ by
    if all of them were in one. Magnitudes below 2^-24 (other than 0), or from 2^8, fall into one
    bin each.

    Args:
        channels: C.

    Attributes:
        counts: int64 (C, 2, bins), of background and foreground.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        shape = (channels, 2, 2 * HALF + 1)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, features: Tensor, foreground: Tensor) -> None:
        """Of one image or volume: features (C, ...) and the bool foreground (...).

        Raises ValueError for other shapes, or a feature that is not finite.
        """
        channels, _, bins = self.counts.shape
        if features.shape != (channels, *foreground.shape):
            raise ValueError(
                f"expected features ({channels}, ...) and a foreground (...), got "
                f"{tuple(features.shape)} and {tuple(foreground.shape)}"
            )
        if not torch.isfinite(features).all():
            raise ValueError("the features hold NaN or infinity")
        places = bins_of(features.flatten(1))
        places += foreground.flatten().long() * bins
        places += torch.arange(channels, device=places.device)[:, None] * (2 * bins)
        counted = torch.bincount(places.flatten(), minlength=self.counts.numel())
        self.counts += counted.view_as(self.counts)

    def values(self) -> Tensor:
        """(C,), float64. Raises ValueError without a voxel of either side."""
        shares = self._shares()
        below = shares[:, 0].cumsum(1) - shares[:, 0]
        return (shares[:, 1] * (below + shares[:, 0] / 2)).sum(1)

    def uncertainty(self) -> float:
        """By how much a channel's value can differ from that of sorting at most."""
        shares = self._shares()
        pairs = shares[:, 0] * shares[:, 1]
        pairs[:, HALF] = 0  # the bin of 0 holds nothing else
        return float(pairs.sum(1).max()) / 2

    def mean(self) -> float:
        """mAUC of the ACS paper: the mean over channels of max(AUC, 1 - AUC), 0.5 to 1."""
        values = self.values()
        return float(torch.maximum(values, 1 - values).mean())

    def _shares(self) -> Tensor:
        sums = self.counts.sum(2, keepdim=True)
        if (sums == 0).any():
            raise ValueError("there must be voxels of foreground and of background")
        return self.counts.double() / sums


def bins_of(values: Tensor) -> Tensor:
    """The bin of each float, in their order: 0 to 2 HALF, and HALF for 0."""
    values = values.float().contiguous()
    digits = (values.abs().view(torch.int32) >> (23 - MANTISSA)).long()
    place = (digits - ((127 + LEAST) << MANTISSA)).clamp_(0, HALF - 1) + 1
    return HALF + place * values.sign().long()
