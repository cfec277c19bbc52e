"""The geometry of mmdet 1.x, in which the released detectors were trained.

mmdet 1.x counts a box's last pixel in: its box (x1, y1, x2, y2) is x2 - x1 + 1 wide. Written by the
edges of its pixels, (x1, y1, x2 + 1, y2 + 1), the same box has today's width, and its box coder,
IoU, NMS, RoIAlign and pasting of masks become today's. What stays of the old geometry is here
(anchors and masks on whole pixels, where a lesion's box lies) and in
configs/_base_/released.py; docs/converting.md has the list.
"""

from __future__ import annotations

import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, LegacyAnchorGenerator
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures import SampleList
from mmdet.structures.mask import mask_target
from torch import Tensor

from deeplesion.conventions import PIXEL_CENTRE
from mmdet_ext.models.detectors import KeySliceMaskRCNN


@TASK_UTILS.register_module()
class WholePixelAnchorGenerator(LegacyAnchorGenerator):
    """The released anchors: rounded to whole pixels and given by their edges.

    They are centred on pixel 0 of each cell, as the released configs ask of mmdet 1.x by
    `ctr=[0, 0]`; it would centre them on (stride - 1) / 2 by itself. Takes what mmdet's
    `AnchorGenerator` takes, but for `center_offset`, which is 0.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, center_offset=0.0, **kwargs)

    def gen_single_level_base_anchors(self, *args, **kwargs) -> Tensor:
        """(num_base_anchors, 4) anchors of the first cell."""
        anchors = super().gen_single_level_base_anchors(*args, **kwargs)
        return anchors + anchors.new_tensor([0, 0, 1, 1])


@TASK_UTILS.register_module()
class WholePixelBoxCoder(DeltaXYWHBBoxCoder):
    """DeltaXYWHBBoxCoder, which by edges is the coder of mmdet 1.x, with the clipping of that: of a
    box outside the image the pixels at its border are left, not nothing."""

    def decode(
        self, bboxes: Tensor, pred_bboxes: Tensor, max_shape: tuple[int, int] | None = None
    ) -> Tensor:
        """(n, 4), (n, 4 k) and (height, width) -> (n, 4 k) boxes by their edges."""
        boxes = super().decode(bboxes, pred_bboxes)
        if max_shape is None:
            return boxes
        first = boxes.new_tensor([[0, 0], [1, 1]])
        last = first + first.new_tensor([max_shape[1], max_shape[0]]) - 1
        return boxes.reshape(-1, 2, 2).clamp(first, last).reshape(boxes.shape)


@MODELS.register_module()
class WholePixelMaskHead(FCNMaskHead):
    """FCNMaskHead whose masks fill the whole pixels of their boxes, as mmdet 1.x cut and pasted
    them: a box's edges are rounded down before its mask is."""

    def get_targets(
        self, sampling_results: list, batch_gt_instances: list, rcnn_train_cfg: dict
    ) -> Tensor:
        return mask_target(
            [sampled.pos_priors.floor() for sampled in sampling_results],
            [sampled.pos_assigned_gt_inds for sampled in sampling_results],
            [instances.masks for instances in batch_gt_instances],
            rcnn_train_cfg,
        )

    def _predict_by_feat_single(
        self,
        mask_preds: Tensor,
        bboxes: Tensor,
        labels: Tensor,
        img_meta: dict,
        rcnn_test_cfg: dict,
        rescale: bool = False,
        activate_map: bool = False,
    ) -> Tensor:
        if rescale:
            # In place as mmdet does it: these boxes are the result.
            bboxes /= bboxes.new_tensor(img_meta["scale_factor"]).repeat(2)
            img_meta = {**img_meta, "scale_factor": (1.0, 1.0)}
        return super()._predict_by_feat_single(
            mask_preds, bboxes.floor(), labels, img_meta, rcnn_test_cfg, rescale, activate_map
        )


@MODELS.register_module()
class ReleasedKeySliceMaskRCNN(KeySliceMaskRCNN):
    """KeySliceMaskRCNN whose boxes are those of mmdet 1.x, by the edges of their pixels.

    Ground truth goes in half a pixel larger on every side, predictions come out half a pixel
    smaller: a box (x1, x2) of pixel centres is in there (x1, x2 + 1), as mmdet 1.x took
    DeepLesion's x1 and x2 for the first and the last pixel.
    """

    def loss(self, batch_inputs: tuple[Tensor, Tensor], batch_data_samples: SampleList) -> dict:
        samples = [sample.new() for sample in batch_data_samples]  # the caller's stay as they are
        for sample in samples:
            sample.gt_instances = sample.gt_instances.new()
            sample.gt_instances.bboxes = grown(sample.gt_instances.bboxes, PIXEL_CENTRE)
        return super().loss(batch_inputs, samples)

    def predict(
        self,
        batch_inputs: tuple[Tensor, Tensor],
        batch_data_samples: SampleList,
        rescale: bool = True,
    ) -> SampleList:
        samples = super().predict(batch_inputs, batch_data_samples, rescale)
        for sample in samples:
            found = sample.pred_instances
            pixel = found.bboxes.new_tensor(sample.scale_factor if rescale else (1, 1)).reciprocal()
            found.bboxes = grown(found.bboxes, -PIXEL_CENTRE * pixel)
        return samples


def grown(boxes: Tensor, margin: float | Tensor) -> Tensor:
    """(n, 4) boxes larger by `margin` px, one number or (x, y), on every side; what would become
    less than nothing, smaller than twice a negative margin, becomes its centre."""
    first, last = boxes.unflatten(1, (2, 2)).unbind(1)
    centre, half = (first + last) / 2, ((last - first) / 2 + margin).clamp(min=0)
    return torch.cat([centre - half, centre + half], dim=1)
