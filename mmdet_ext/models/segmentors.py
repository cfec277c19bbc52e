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
from mmdet_ext.models.volume_network import VolumeNetwork, finite

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

    def losses(self, logits: Tensor, samples: Sequence[BaseDataElement]) -> dict[str, Tensor]:
        """Of (B, classes, ...) logits and the samples' `labels`, (H, W) or (D, H, W)."""
        labels = torch.stack([sample.labels for sample in samples])
        return dict(loss_dice=self.loss(logits, labels))

    def add_predictions(self, inputs: Sequence[Tensor], samples: Sequence[BaseDataElement]) -> None:
        """Gives each sample `prediction`, uint8 (H, W) or (D, H, W)."""
        predictions = finite(self(inputs)).argmax(1).to(torch.uint8)
        for sample, prediction in zip(samples, predictions, strict=True):
            sample.prediction = prediction
