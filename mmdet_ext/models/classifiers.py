"""VolumeClassifier: classifies images, or volumes by a network converted to 3D, in mmengine's
runner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdet_ext.models.volume_network import VolumeNetwork


@MODELS.register_module()
class VolumeClassifier(VolumeNetwork):
    """One class a sample; the loss is cross entropy.

    Args:
        network: as in `VolumeNetwork`; it returns (B, classes).
        fusion, pretrained, init, data_preprocessor, transfer: see there.
    """

    def forward(
        self,
        inputs: Sequence[Tensor],
        data_samples: Sequence[BaseDataElement] | None = None,
        mode: str = "tensor",
    ) -> dict[str, Tensor] | list[BaseDataElement] | Tensor:
        """Of B tensors (1, H, W) or (1, D, H, W): with 'loss' the loss against the samples'
        `label`, with 'predict' the samples with `probabilities` (classes,), with 'tensor' the
        logits (B, classes)."""
        logits = self.logits(inputs)
        if mode == "tensor":
            return logits
        if mode == "loss":
            labels = torch.stack([sample.label for sample in data_samples])
            return dict(loss_cls=F.cross_entropy(logits, labels))
        if mode != "predict":
            raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")
        for sample, probabilities in zip(data_samples, logits.float().softmax(1)):
            sample.probabilities = probabilities
        return list(data_samples)
