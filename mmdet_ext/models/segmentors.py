"""VolumeSegmentor: segments images, or volumes by a network converted to 3D, in mmengine's
runner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdet_ext.models.losses import SoftDiceLoss
from mmdet_ext.models.shapes_unet import ShapesUNet
from mmdet_ext.models.volume_network import VolumeNetwork

MODELS.register_module(module=ShapesUNet)


@MODELS.register_module()
class VolumeSegmentor(VolumeNetwork):
    """Segments images, or volumes by a network converted to 3D.

    Args:
        network, fusion, pretrained, init, data_preprocessor, transfer: see `VolumeNetwork`.
        loss: takes logits and labels; None: `SoftDiceLoss`.
    """

    def __init__(
        self,
        network: dict,
        fusion: dict | None = None,
        loss: dict | None = None,
        pretrained: str | None = None,
        init: str = "torch",
        data_preprocessor: dict | None = None,
        transfer: str = "network",
    ) -> None:
        super().__init__(network, fusion, pretrained, init, data_preprocessor, transfer)
        self.loss = MODELS.build(loss) if loss else SoftDiceLoss()

    def forward(
        self,
        inputs: Sequence[Tensor],
        data_samples: Sequence[BaseDataElement] | None = None,
        mode: str = "tensor",
    ) -> dict[str, Tensor] | list[BaseDataElement] | Tensor:
        """Of B tensors (1, H, W) or (1, D, H, W): with 'loss' the loss against the samples'
        `labels`, with 'predict' the samples with `prediction`, uint8 (H, W) or (D, H, W), with
        'tensor' the logits (B, classes, ...)."""
        logits = self.logits(inputs)
        if mode == "tensor":
            return logits
        if mode == "loss":
            labels = torch.stack([sample.labels for sample in data_samples])
            return dict(loss_dice=self.loss(logits, labels))
        if mode != "predict":
            raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")
        for sample, prediction in zip(data_samples, logits.argmax(1).to(torch.uint8)):
            sample.prediction = prediction
        return list(data_samples)
