"""mmdet's assignment of anchors and proposals, with regions to ignore: what lies in one is neither
background nor a lesion. They hold what may be a lesion that nobody has labelled."""

from __future__ import annotations

from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from mmdet.registry import TASK_UTILS
from mmengine.structures import InstanceData


@TASK_UTILS.register_module()
class IgnoringAssigner(MaxIoUAssigner):
    """As mmdet's `MaxIoUAssigner`, but background alone is ignored, and on images without a lesion
    too.

    mmdet's takes whatever lies in a region away from the lesions beside it, and on an image without
    a lesion all of it is background. Without regions both assign the same.

    Args:
        ignore_iof_thr: a box is left out if more than this share of it lies in one region.
        others: of `MaxIoUAssigner`.
    """

    def __init__(self, *args, ignore_iof_thr: float = 0.5, **others) -> None:
        if not 0 < ignore_iof_thr < 1:
            raise ValueError(f"ignore_iof_thr must be between 0 and 1, got {ignore_iof_thr}")
        super().__init__(*args, ignore_iof_thr=ignore_iof_thr, **others)
        if not self.ignore_wrt_candidates:
            raise ValueError("ignore_wrt_candidates=False: here it is boxes' shares that count")

    def assign(
        self,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        gt_instances_ignore: InstanceData | None = None,
        **options,
    ) -> AssignResult:
        """mmdet's, then -1 in the place of 0 for what lies in a region."""
        result = super().assign(pred_instances, gt_instances, None, **options)
        priors = pred_instances.priors
        if gt_instances_ignore is None or not len(gt_instances_ignore) or not len(priors):
            return result
        shares = self.iou_calculator(priors, gt_instances_ignore.bboxes, mode="iof")
        inside = shares.max(dim=1)[0] > self.ignore_iof_thr
        result.gt_inds[inside & (result.gt_inds == 0)] = -1
        return result
