"""Soft Dice: SoftDiceMaskLoss of the mask head, SoftDiceLoss of a segmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from deeplesion.errors import UserError


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


@MODELS.register_module()
class SoftDiceLoss(nn.Module):
    """Soft Dice of each class over the whole batch (the ACS paper's proof of concept, as coded).

        loss = sum_c (1 - (2 sum(p_c t_c) + smooth) / (sum(p_c) + sum(t_c) + smooth)) / classes

    p is the softmax over the classes, t one-hot, and the sums are over all pixels of the batch. The
    sum over c leaves out classes that the batch does not have; the divisor counts them.

    Args:
        smooth: in pixels.
    """

    def __init__(self, smooth: float = 0.01) -> None:
        super().__init__()
        if not smooth > 0:
            raise ValueError(f"smooth must be above 0, got {smooth}")
        self.smooth = smooth

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, classes, ...) and (B, ...) of 0 to classes - 1 -> a scalar. Raises UserError for a
        network whose output has another size than the labels, or fewer classes."""
        if logits.shape[2:] != labels.shape[1:]:
            raise UserError(
                f"the network gives {tuple(logits.shape[2:])} for labels of "
                f"{tuple(labels.shape[1:])}: a segmentation gives each voxel its classes"
            )
        # At least float32: sums over millions of voxels lose too much in half precision.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        classes, losses, counted = logits.shape[1], [], 0
        for p, number in zip(F.softmax(logits, dim=1).unbind(1), range(classes)):
            there = labels == number
            size = there.sum()
            counted = counted + size
            dice = (2 * (p * there).sum() + self.smooth) / (p.sum() + size + self.smooth)
            # Without looking at `size`: a GPU is waited for once, at the end, not for each class.
            losses.append(torch.where(size > 0, 1 - dice, 0 * dice))
        if int(counted) != labels.numel():
            raise UserError(
                f"the labels go up to {int(labels.max())}, and the network has the classes 0 to "
                f"{classes - 1}: set model.network.num_classes"
            )
        return torch.stack(losses).sum() / classes
