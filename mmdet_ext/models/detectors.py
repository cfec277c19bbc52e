"""KeySliceMaskRCNN and the preprocessor that feeds it: mmdet's Mask R-CNN on a CT volume."""

from __future__ import annotations

import torch
from mmdet.models.detectors import MaskRCNN
from mmdet.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class KeySliceMaskRCNN(MaskRCNN):
    """Mask R-CNN on the key slice of a CT volume (AlignShift, section 2.3, Fig. 3).

    The 3D backbone and the 3D-to-2D neck make one 2D map; RPN, box head and mask head are mmdet's
    own. Only `extract_feat` differs.
    """

    def extract_feat(self, batch_inputs: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        """((B, 1, D, H, W) images, (B,) thickness in mm) -> ((B, C, H/4, W/4),)."""
        images, thickness = batch_inputs
        if torch.is_grad_enabled() or images.is_cuda:
            return self.neck(self.backbone(images, thickness))
        # Saves memory: the neck is done with each map before the backbone makes the next.
        return self.neck(self.backbone.maps(images, thickness))
