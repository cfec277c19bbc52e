"""SoftDiceMaskLoss: the mask head's loss."""

from __future__ import annotations

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class SoftDiceMaskLoss(nn.Module):
    """Soft Dice over the positive RoIs, with the call signature `FCNMaskHead` uses.

        loss = 1 - mean_i (2 sum(p_i t_i) + eps) / (sum(p_i) + sum(t_i) + eps),  p = sigmoid(pred)

    (mmdet registers a `DiceLoss` of another signature, which under `FCNMaskHead` silently gives 0.)

    Args:
        eps: smoothing, in pixels of the mask.
        loss_weight: factor.
    """

    def __init__(self, eps: float = 0.01, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            pred: (N, num_classes, h, w) logits.
            target: (N, h, w) in [0, 1].
            labels: (N,) class of each RoI, choosing the channel.

        Returns:
            scalar; 0, still connected to `pred`, when N = 0.
        """
        if len(pred) == 0:
            return pred.sum() * 0
        rois = torch.arange(len(labels), device=labels.device)
        # At least float32: a sum over 784 sigmoids loses too much in half precision.
        dtype = torch.promote_types(pred.dtype, torch.float32)
        p = pred[rois, labels].to(dtype).sigmoid().flatten(1)
        t = target.to(dtype).flatten(1)
        dice = (2 * (p * t).sum(1) + self.eps) / (p.sum(1) + t.sum(1) + self.eps)
        return self.loss_weight * (1 - dice.mean())
