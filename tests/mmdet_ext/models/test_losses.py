"""SoftDiceMaskLoss against its formula in a plain loop."""

import pytest
import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmdet_ext.models.losses import SoftDiceMaskLoss


def batch(n=5, classes=2, size=6):
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(n, classes, size, size, generator=generator, dtype=torch.float64)
    target = (torch.rand(n, size, size, generator=generator) > 0.6).double()
    labels = torch.randint(0, classes, (n,), generator=generator)
    return pred.requires_grad_(), target, labels


def test_equals_the_loop():
    pred, target, labels = batch()
    total = 0.0
    for i in range(len(pred)):
        p = torch.sigmoid(pred[i, labels[i]].detach())
        t = target[i]
        intersection = sum(float(p[r, c] * t[r, c]) for r in range(6) for c in range(6))
        both = sum(float(p[r, c] + t[r, c]) for r in range(6) for c in range(6))
        total += (2 * intersection + 0.01) / (both + 0.01)
    expected = 3.0 * (1 - total / len(pred))
    loss = SoftDiceMaskLoss(loss_weight=3.0)(pred, target, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_gradients_numerically():
    pred, target, labels = batch(3)
    assert torch.autograd.gradcheck(lambda x: SoftDiceMaskLoss()(x, target, labels), pred)


def test_perfect_and_opposite_masks():
    _, target, labels = batch(classes=1)
    logits = (target * 2 - 1)[:, None] * 50
    assert SoftDiceMaskLoss()(logits, target, labels * 0).item() == pytest.approx(0, abs=1e-5)
    assert SoftDiceMaskLoss()(-logits, target, labels * 0).item() == pytest.approx(1, abs=1e-2)


def test_gradient_reaches_the_chosen_class_only():
    pred, target, labels = batch()
    SoftDiceMaskLoss()(pred, target, labels).backward()
    chosen = torch.zeros_like(pred, dtype=torch.bool)
    chosen[range(len(labels)), labels] = True
    assert (pred.grad[~chosen] == 0).all() and (pred.grad[chosen] != 0).any()


def test_no_positives_give_zero_and_stay_connected():
    pred = torch.zeros(0, 1, 28, 28, requires_grad=True)
    loss = SoftDiceMaskLoss()(pred, torch.zeros(0, 28, 28), torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()
    assert pred.grad is not None


def test_half_precision_keeps_its_accuracy():
    pred, target, labels = batch(3, 1, 28)
    exact = SoftDiceMaskLoss()(pred, target, labels)
    half = SoftDiceMaskLoss()(pred.half(), target.half(), labels)
    assert half.item() == pytest.approx(exact.item(), abs=1e-3)


def test_under_the_mask_head_it_is_not_zero():
    """mmdet's own DiceLoss, of another signature, is silently 0 here."""
    head = FCNMaskHead(
        num_convs=1,
        in_channels=4,
        conv_out_channels=4,
        num_classes=1,
        loss_mask=dict(type=SoftDiceMaskLoss),
    )
    head.init_weights()
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[:, 8:20, 8:20] = 1
    sampled = InstanceData(
        pos_priors=torch.tensor([[8.0, 8, 24, 24], [4, 4, 24, 24]]),
        pos_assigned_gt_inds=torch.tensor([0, 1]),
        pos_gt_labels=torch.tensor([0, 0]),
    )
    truth = InstanceData(masks=BitmapMasks(masks.numpy(), 32, 32))
    pred = head(torch.randn(2, 4, 14, 14))
    loss = head.loss_and_target(pred, [sampled], [truth], ConfigDict(mask_size=28))
    value = loss["loss_mask"]["loss_mask"]
    assert 0.1 < value.item() < 1
    value.backward()
    assert head.convs[0].conv.weight.grad.abs().sum() > 0
