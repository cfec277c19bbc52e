"""Test-time augmentation: a detector also looks at its stacks flipped and in reverse order, and
what it finds in the views is fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    (Solovyev et al., Image and Vision Computing 2021): boxes whose IoU is above the detector's own
    threshold of NMS become their mean weighted by score, with the sum of their scores over the
    number of views as score, at most 1. The mask of a fused box is where those of its boxes that
    hold at least half of their score are. The best `test_cfg.rcnn.max_per_img` are kept (all if
    that is no limit). Boxes without area go. Thickness and all else in a sample is the same for
    every view.

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
    """Detections of several views of an image -> one list, by falling score.

    Of more boxes than views, as where the NMS of one view left two, the sum of the scores counts:
    with their mean a faint one more would lower it.
    """
    every = InstanceData.cat(list(views))
    clusters, boxes = clusters_of(every, iou_threshold)
    scores = torch.stack([every.scores[c].sum() for c in clusters]) if clusters else every.scores
    scores = (scores / len(views)).clamp(max=1)
    order = scores.argsort(descending=True, stable=True)
    clusters = [clusters[i] for i in order.tolist()]
    first = [cluster[0] for cluster in clusters]
    result = InstanceData(bboxes=boxes[order], scores=scores[order], labels=every.labels[first])
    if "masks" in every:
        result.masks = every.masks[first]
        for number, cluster in enumerate(clusters):
            if len(cluster) > 1:
                result.masks[number] = mask_of(every.masks[cluster], every.scores[cluster])
    return result


def clusters_of(found: InstanceData, iou_threshold: float) -> tuple[list[list[int]], Tensor]:
    """Which boxes become one, by weighted boxes fusion: by falling score each joins the cluster of
    its label whose mean it overlaps most, if by more than the threshold, else it begins one.

    Returns:
        Indices of the n clusters' boxes, by falling score, and their means weighted by score
        (n, 4).
    """
    boxes, scores = found.bboxes.double().cpu(), found.scores.double().cpu()
    labels = found.labels.cpu()
    clusters: list[list[int]] = []
    means, weights = torch.zeros_like(boxes), torch.zeros_like(scores)
    own_label = torch.zeros_like(labels)
    for box in scores.argsort(descending=True, stable=True).tolist():
        overlaps = bbox_overlaps(boxes[box, None], means[: len(clusters)])[0]
        overlaps[own_label[: len(clusters)] != labels[box]] = -1
        if clusters and overlaps.max() > iou_threshold:
            nearest = int(overlaps.argmax())
            clusters[nearest].append(box)
            weights[nearest] += scores[box]
            share = scores[box] / weights[nearest]
            means[nearest] += share * (boxes[box] - means[nearest])
        else:
            means[len(clusters)], weights[len(clusters)] = boxes[box], scores[box]
            own_label[len(clusters)] = labels[box]
            clusters.append([box])
    return clusters, means[: len(clusters)].to(found.bboxes)


def mask_of(masks: Tensor, scores: Tensor) -> Tensor:
    """(n, H, W) bool of a cluster and (n,) -> (H, W): where at least half of the score is mask."""
    share = scores / scores.sum()
    return torch.tensordot(share, masks.float(), dims=1) >= 0.5 - 1e-6
