"""CTDataPreprocessor: int16 HU to windowed, padded batches, on the device."""

from __future__ import annotations

import math

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

    HU clipped to [low, high] are mapped linearly to [0, 255], minus `shift`, over `divisor`.
    Volumes are padded with air, right and below, to the batch's largest size rounded up to
    `pad_size_divisor`.

    Args:
        low, high: window in HU.
        shift: subtracted after scaling to [0, 255].
        divisor: what it is divided by then. Networks whose BatchNorm keeps the statistics of
            ImageNet need its mean and standard deviation, as numbers of one grey value.
        pad_size_divisor: stride of the network's coarsest map, or a multiple.
    """

    def __init__(
        self,
        low: float = HU_WINDOW[0],
        high: float = HU_WINDOW[1],
        shift: float = HU_SHIFT,
        pad_size_divisor: int = 32,
        divisor: float = 1.0,
        non_blocking: bool = False,
    ) -> None:
        super().__init__(non_blocking=non_blocking)
        if not low < high:
            raise ValueError(f"the window must have low < high, got low={low}, high={high}")
        if not divisor > 0:
            raise ValueError(f"divisor must be > 0, got {divisor}")
        self.low, self.high, self.shift, self.divisor = low, high, shift, divisor
        self.pad_size_divisor = pad_size_divisor

    def window(self, hu: Tensor) -> Tensor:
        scaled = (hu.float().clamp_(self.low, self.high) - self.low) * (
            255 / (self.high - self.low)
        )
        scaled.sub_(self.shift)
        return scaled if self.divisor == 1 else scaled.div_(self.divisor)

    def forward(self, data: dict, training: bool = False) -> dict:
        """
        Args:
            data: 'inputs': list of (1, D, H, W) int16 HU, 'data_samples': list of DetDataSample
                with `thickness_mm` in their metainfo.

        Returns:
            'inputs': (images (B, 1, D, H', W') float32, thickness (B,) float32 mm);
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
        images = torch.stack(
            [
                F.pad(v, (0, width - v.shape[3], 0, height - v.shape[2]), value=int(self.low))
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
