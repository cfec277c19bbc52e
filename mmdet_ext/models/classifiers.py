"""VolumeClassifier: classifies images, or volumes by a network converted to 3D, in mmengine's
runner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdet_ext.models.volume_network import VolumeNetwork, finite


@MODELS.register_module()
class VolumeClassifier(VolumeNetwork):
    """One class a sample; the loss is cross entropy.

    Args:
        network: as in `VolumeNetwork`; it returns (B, classes).
        fusion, pretrained, init, data_preprocessor, transfer: see there.
    """

    def losses(self, logits: Tensor, samples: Sequence[BaseDataElement]) -> dict[str, Tensor]:
        """Of (B, classes) logits and the samples' `label`."""
        labels = torch.stack([sample.label for sample in samples])
        return dict(loss_cls=F.cross_entropy(logits, labels))

    def add_predictions(self, inputs: Sequence[Tensor], samples: Sequence[BaseDataElement]) -> None:
        """Gives each sample `probabilities` (classes,)."""
        logits = finite(self(inputs).float())
        for sample, probabilities in zip(samples, logits.softmax(1), strict=True):
            sample.probabilities = probabilities
