"""AUC of features, channel by channel, from histograms: all voxels of a data set need not be kept
or sorted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class HistogramAUC:
    """Area under the ROC curve of each channel, foreground against background.

    The range of a channel's values in the first batch is divided into bins that are equal in the
    root of the value, so finer about 0, where what follows a ReLU crowds; what lies beyond later
    counts in the outermost. Of two values in one bin each counts as larger by half. With
    features of a network the result equals the sorted one to 1e-6; `error_bound` says how far off
    it can be whatever the values are.

    Args:
        channels: C.
        bins: of each channel; memory is 8 bytes times `channels` times `bins`.

    Raises:
        ValueError: less than 1 channel or 2 bins.
    """

    def __init__(
        self, channels: int, bins: int = 2**20, device: torch.device | str = "cpu"
    ) -> None:
        if channels < 1 or bins < 2:
            raise ValueError(f"expected 1 channel and 2 bins at least, got {channels} and {bins}")
        self.counts = torch.zeros(2, channels, bins, dtype=torch.int32, device=device)
        self.range: tuple[Tensor, Tensor] | None = None  # least and greatest root, each (C,)

    def update(self, values: Tensor, foreground: Tensor) -> None:
        """Adds a batch.

        Args:
            values: (B, C, ...) of any floating type.
            foreground: (B, ...) bool.

        Raises:
            ValueError: other shapes; a value that is not a finite number.
        """
        if values.shape[:1] + values.shape[2:] != foreground.shape:
            raise ValueError(
                f"values {tuple(values.shape)} and foreground {tuple(foreground.shape)} differ in "
                "more than the channels"
            )
        _, channels, bins = self.counts.shape
        if values.shape[1] != channels:
            raise ValueError(f"expected {channels} channels, got {values.shape[1]}")
        if not values.isfinite().all():
            raise ValueError("a feature is not a finite number")
        values = values.movedim(1, 0).flatten(1).double()
        values = values.sign() * values.abs().sqrt()
        mask = foreground.flatten()
        if self.range is None:
            self.range = values.amin(1), values.amax(1)
        for channel, (of_channel, low, high) in enumerate(zip(values, *self.range)):
            places = (of_channel - low) / (high - low).clamp(min=1e-300) * bins
            places = places.clamp(0, bins - 1).long()
            for kind, of_kind in enumerate((places[~mask], places[mask])):
                counted = torch.bincount(of_kind, minlength=bins)
                self.counts[kind, channel] += counted.to(torch.int32)

    def auc(self) -> Tensor:
        """(C,) float64: the probability that foreground is larger; NaN without either."""
        return self._share(lambda background: background.cumsum(0) - background / 2)

    def error_bound(self) -> Tensor:
        """(C,) float64: how far `auc` can be from the sorted one, by pairs within one bin. Equal
        values, which both count as half, are among these."""
        return self._share(lambda background: background / 2)

    def _share(self, counted: Callable[[Tensor], Tensor]) -> Tensor:
        """Of all pairs of a foreground and a background voxel, the part that is counted: by bins of
        the background, how many of it count for a foreground voxel there."""
        shares = []
        for of_channel in self.counts.unbind(1):
            background, foreground = of_channel.double()
            pairs = foreground.sum() * background.sum()
            shares.append((foreground * counted(background)).sum() / pairs)
        return torch.stack(shares)

    def mean(self) -> float:
        """Mean over channels of max(AUC, 1 - AUC): mAUC (ACS, JBHI 2021, section IV-A)."""
        auc = self.auc()
        return torch.maximum(auc, 1 - auc).mean().item()
