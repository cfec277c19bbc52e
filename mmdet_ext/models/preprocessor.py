"""CTDataPreprocessor: int16 HU to windowed, padded batches, on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.models.utils import samplelist_boxtype2tensor
from mmdet.registry import MODELS
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from deeplesion.conventions import HU_SHIFT, HU_WINDOW


@MODELS.register_module()
class CTDataPreprocessor(BaseDataPreprocessor):
    """Batches CT volumes on the device: int16 HU in, windowed float32 out.

    HU clipped to [low, high] are mapped linearly to [0, 255], minus `shift`, over `divisor`; the
    defaults are those of MULAN, A3D and AlignShift.
    Volumes are padded with air, right and below, to the batch's largest size rounded up to
    `pad_size_divisor`.

    Args:
        low, high: window in HU.
        shift: subtracted after scaling to [0, 255].
        divisor: what it is divided by then. Networks whose BatchNorm keeps the statistics of
            ImageNet need its mean and standard deviation, as numbers of one grey value.
        pad_size_divisor: stride of the network's coarsest map, or a multiple.
        windows: instead of `low` and `high`, one (low, high) for each channel of the output;
            `shift` and `divisor` are the same for all.
    """

    def __init__(
        self,
        low: float = HU_WINDOW[0],
        high: float = HU_WINDOW[1],
        shift: float = HU_SHIFT,
        pad_size_divisor: int = 32,
        divisor: float = 1.0,
        non_blocking: bool = False,
        windows: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        super().__init__(non_blocking=non_blocking)
        self.windows = windows_of(low, high, windows)
        if not divisor > 0:
            raise ValueError(f"divisor must be > 0, got {divisor}")
        self.shift, self.divisor = shift, divisor
        self.pad_size_divisor = pad_size_divisor

    def window(self, hu: Tensor) -> Tensor:
        """(B, 1, ...) HU -> (B, windows, ...)."""
        channels = [self._scaled(hu, low, high) for low, high in self.windows]
        return channels[0] if len(channels) == 1 else torch.cat(channels, dim=1)

    def _scaled(self, hu: Tensor, low: float, high: float) -> Tensor:
        copied = hu.to(torch.float32, copy=True)  # the next window takes the HU again
        scaled = (copied.clamp_(low, high) - low) * (255 / (high - low))
        scaled.sub_(self.shift)
        return scaled if self.divisor == 1 else scaled.div_(self.divisor)

    def forward(self, data: dict, training: bool = False) -> dict:
        """
        Args:
            data: 'inputs': list of (1, D, H, W) int16 HU, 'data_samples': list of DetDataSample
                with `thickness_mm` in their metainfo.

        Returns:
            'inputs': (images (B, windows, D, H', W') float32, thickness (B,) float32 mm);
            'data_samples': with `batch_input_shape` and `pad_shape` set and masks padded.

        Raises:
            ValueError: volumes with different numbers of slices, thickness NaN or <= 0.
        """
        samples = data["data_samples"]
        for sample in samples:
            mm = sample.thickness_mm
            if not mm > 0:
                raise ValueError(
                    f"{sample.img_path}: thickness_mm must be > 0 (infinite if unknown), got {mm}"
                )
        thickness = torch.tensor([s.thickness_mm for s in samples], dtype=torch.float32)
        volumes = data["inputs"]
        depths = {v.shape[1] for v in volumes}
        if len(depths) > 1:
            raise ValueError(f"volumes of one batch must have equal depth, got {sorted(depths)}")
        data = self.cast_data({"inputs": list(volumes), "data_samples": samples})
        thickness = self.cast_data(thickness)
        divisor = self.pad_size_divisor
        height, width = (
            math.ceil(max(v.shape[axis] for v in volumes) / divisor) * divisor for axis in (2, 3)
        )
        air = int(min(low for low, _ in self.windows))
        images = torch.stack(
            [
                F.pad(v, (0, width - v.shape[3], 0, height - v.shape[2]), value=air)
                for v in data["inputs"]
            ]
        )
        samples = data["data_samples"]
        for sample in samples:
            sample.set_metainfo(
                {"batch_input_shape": (height, width), "pad_shape": (height, width)}
            )
            if training and "masks" in sample.gt_instances:
                masks = sample.gt_instances.masks
                sample.gt_instances.masks = masks.pad((height, width), pad_val=0)
        samplelist_boxtype2tensor(samples)
        return {"inputs": (self.window(images), thickness), "data_samples": samples}


def windows_of(
    low: float, high: float, windows: Sequence[tuple[float, float]] | None
) -> tuple[tuple[float, float], ...]:
    """The windows of a `CTDataPreprocessor`. Raises ValueError for what is none."""
    if windows is None:
        if not low < high:
            raise ValueError(f"the window must have low < high, got low={low}, high={high}")
        return ((low, high),)
    pairs = isinstance(windows, Sequence) and not isinstance(windows, str) and len(windows) > 0
    if not pairs or not all(isinstance(w, Sequence) and len(w) == 2 for w in windows):
        raise ValueError(f"windows must be pairs (low, high) in HU, got {windows!r}")
    for window in windows:
        numbers = all(isinstance(end, int | float) and math.isfinite(end) for end in window)
        if not numbers or not window[0] < window[1]:
            raise ValueError(f"windows: each must have low < high in HU, got {tuple(window)}")
    return tuple((low, high) for low, high in windows)
