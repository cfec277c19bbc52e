"""Test-time augmentation: a detector also looks at its stacks flipped and in reverse order, and
what it finds in the views is fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.utils import weighted_boxes_fusion
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_flip, bbox_overlaps
from mmengine.model import BaseTTAModel
from mmengine.structures import InstanceData
from torch import Tensor, nn

# What each view turns round: axes of a stack (1, D, H, W), and mmdet's name of what that does to
# boxes.
VIEWS = {
    "horizontal": ((3,), "horizontal"),
    "vertical": ((2,), "vertical"),
    "both": ((2, 3), "diagonal"),
    "depth": ((1,), None),
}


@MODELS.register_module()
class ViewsTTA(BaseTTAModel):
    """A two-stage detector of CT stacks, on each stack as it is and on views of it.

    Boxes and masks are turned back and the boxes of one label fused by weighted boxes fusion
    (Solovyev et al., Image and Vision Computing 2021; mmdet's): boxes whose IoU is above the
    detector's own threshold of NMS become their mean weighted by score, with the sum of their
    scores over the number of views as score, at most 1. The mask of a fused box is where those of
    its boxes that hold at least half of their score are. The best `test_cfg.rcnn.max_per_img` are
    kept (all if that is no limit). Boxes without area go. Thickness and all
    else in a sample is the same for every view.

    Args:
        module: the detector, or its wrapper of several processes.
        views: of `VIEWS`, beside the plain one; none at all leaves what `predict` finds.
    """

    def __init__(self, module: nn.Module | dict, views: Sequence[str] = tuple(VIEWS)) -> None:
        super().__init__(module)
        for view in views:
            if view not in VIEWS:
                raise ValueError(f"there is no view {view!r}; there are {', '.join(VIEWS)}")
        if len({*views}) < len(views):
            raise ValueError(f"a view is named twice: {', '.join(views)}")
        self.views = (None, *views)
        detector = getattr(self.module, "module", self.module)
        options = (getattr(detector, "test_cfg", None) or {}).get("rcnn")
        if options is None:
            raise ValueError(
                f"{type(detector).__name__} is no two-stage detector, whose boxes could be fused"
            )
        self.iou_threshold = options["nms"]["iou_threshold"]
        self.max_per_image = options["max_per_img"]

    def test_step(self, data: dict) -> list[DetDataSample]:
        """What a detector's does, of one batch as the data loader gives it."""
        return self.merge_preds(list(zip(*(self.look(data, view) for view in self.views))))

    def look(self, data: dict, view: str | None) -> list[DetDataSample]:
        """What the detector finds in one view of a batch, as it lies in that view."""
        axes = VIEWS[view][0] if view else ()
        inputs = [stack.flip(axes) for stack in data["inputs"]]
        # A detector writes what it finds into the samples that it is given.
        samples = [sample.new() for sample in data["data_samples"]]
        return self.module.test_step(dict(inputs=inputs, data_samples=samples))

    def merge_preds(
        self, data_samples_list: Sequence[Sequence[DetDataSample]]
    ) -> list[DetDataSample]:
        """Of each image the samples of its views -> one sample."""
        merged = []
        for samples in data_samples_list:
            found = [turned_back(s, view) for s, view in zip(samples, self.views, strict=True)]
            sample = samples[0].new()
            every = fused(found, self.iou_threshold)
            most = self.max_per_image if self.max_per_image > 0 else len(every)
            sample.pred_instances = every[:most]
            merged.append(sample)
        return merged


def turned_back(sample: DetDataSample, view: str | None) -> InstanceData:
    """What was found in a view, where it lies in the plain image; without boxes of no area."""
    found = sample.pred_instances
    found = found[(found.bboxes[:, 2:] > found.bboxes[:, :2]).all(1)]
    axes, direction = VIEWS[view] if view else ((), None)
    if direction is None:
        return found
    back = InstanceData(
        bboxes=bbox_flip(found.bboxes, sample.ori_shape, direction),
        scores=found.scores,
        labels=found.labels,
    )
    if "masks" in found:
        back.masks = found.masks.flip([axis - 1 for axis in axes])
    return back


def fused(views: Sequence[InstanceData], iou_threshold: float) -> InstanceData:
    """Detections of several views of an image -> one list, by falling score."""
    boxes, scores, labels = weighted_boxes_fusion(
        [view.bboxes.cpu().numpy() for view in views],
        [view.scores.cpu().numpy() for view in views],
        [view.labels.cpu().numpy() for view in views],
        iou_thr=iou_threshold,
        # Otherwise of more boxes than views the mean counts: a faint one more would lower it.
        allows_overflow=True,
    )
    every = InstanceData.cat(list(views))
    result = InstanceData(
        bboxes=boxes.reshape(-1, 4).to(every.bboxes),
        scores=scores.clamp(max=1).to(every.scores),
        labels=labels.to(every.labels),
    )
    if "masks" in every:
        result.masks = fused_masks(result, every, iou_threshold)
    return result


def fused_masks(result: InstanceData, every: InstanceData, iou_threshold: float) -> Tensor:
    """(n, H, W) bool, of each fused box where at least half the score of its boxes is mask."""
    if not len(result):
        return every.masks[:0]
    overlaps = bbox_overlaps(result.bboxes, every.bboxes)
    overlaps[result.labels[:, None] != every.labels] = -1
    own = (overlaps > iou_threshold) | (overlaps == overlaps.amax(1, keepdim=True))
    masks = []
    for members in own:
        share = every.scores[members] / every.scores[members].sum()
        masks.append(torch.tensordot(share, every.masks[members].float(), dims=1) >= 0.5 - 1e-6)
    return torch.stack(masks)
