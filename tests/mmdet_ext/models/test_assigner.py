"""IgnoringAssigner against plain loops, and a detector that learns nothing from a region."""

import numpy as np
import pytest
import torch
from mmdet.models.task_modules.assigners import MaxIoUAssigner
from mmengine.structures import InstanceData

from mmdet_ext.engine.ignored_regions import not_ignoring
from mmdet_ext.models.assigner import IgnoringAssigner

RPN = dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True)
RCNN = dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False)


def boxes(rng, number):
    corner = rng.uniform(0, 60, (number, 2))
    return torch.tensor(np.hstack([corner, corner + rng.uniform(8, 30, (number, 2))])).float()


def instances(found):
    return InstanceData(bboxes=found, labels=torch.zeros(len(found), dtype=torch.long))


def share_inside(box, region):
    """Of the area of a box, pixel by pixel of a fine grid's closed form: a plain intersection."""
    width = max(min(box[2], region[2]) - max(box[0], region[0]), 0)
    height = max(min(box[3], region[3]) - max(box[1], region[1]), 0)
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


@pytest.mark.parametrize("options", [RPN, RCNN], ids=["rpn", "rcnn"])
@pytest.mark.parametrize("lesions", [0, 1, 4])
@pytest.mark.parametrize("regions", [0, 1, 3])
def test_background_inside_a_region_is_left_out_and_the_rest_is_mmdets(options, lesions, regions):
    rng = np.random.default_rng([lesions, regions])
    priors = InstanceData(priors=boxes(rng, 300))
    labelled, ignored = instances(boxes(rng, lesions)), boxes(rng, regions)
    plain = MaxIoUAssigner(**options).assign(priors, labelled)
    found = IgnoringAssigner(**options).assign(priors, labelled, instances(ignored))
    left_out = 0
    for prior, before, after in zip(priors.priors.tolist(), plain.gt_inds, found.gt_inds):
        inside = any(share_inside(prior, region) > 0.5 for region in ignored.tolist())
        left_out += inside and before == 0
        assert after == (-1 if inside and before == 0 else before)
    assert (left_out > 0) == (regions > 0)
    np.testing.assert_array_equal(found.labels, plain.labels)
    without = IgnoringAssigner(**options).assign(priors, labelled)
    np.testing.assert_array_equal(without.gt_inds, plain.gt_inds)


def test_a_lesion_beside_a_region_keeps_its_anchors_and_mmdets_loses_them():
    lesion = torch.tensor([[10.0, 10, 30, 30]])
    region = instances(torch.tensor([[5.0, 5, 35, 35]]))
    priors = InstanceData(priors=lesion.clone())
    mmdets = MaxIoUAssigner(**RPN, ignore_iof_thr=0.5).assign(priors, instances(lesion), region)
    assert mmdets.gt_inds.tolist() == [-1]
    ours = IgnoringAssigner(**RPN).assign(priors, instances(lesion), region)
    assert ours.gt_inds.tolist() == [1]


def test_no_boxes_at_all():
    nothing = InstanceData(priors=torch.zeros(0, 4))
    region = instances(torch.tensor([[5.0, 5, 35, 35]]))
    found = IgnoringAssigner(**RPN).assign(nothing, instances(torch.zeros(0, 4)), region)
    assert len(found.gt_inds) == 0


@pytest.mark.parametrize("share", [-1, 0, 1, float("nan")])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ValueError, match="ignore_iof_thr must be between 0 and 1"):
        IgnoringAssigner(**RPN, ignore_iof_thr=share)


def test_shares_of_the_regions_themselves_are_refused():
    with pytest.raises(ValueError, match="ignore_wrt_candidates=False"):
        IgnoringAssigner(**RPN, ignore_wrt_candidates=False)


def test_parts_that_do_not_ignore_are_named():
    model, head = torch.nn.Module(), torch.nn.Module()
    assert not_ignoring(model) == ["the detector has no assigner"]
    model.rpn_head, model.roi_head = head, torch.nn.Module()
    head.assigner = MaxIoUAssigner(**RPN)
    model.roi_head.bbox_assigner = [IgnoringAssigner(**RCNN), MaxIoUAssigner(**RCNN)]
    assert not_ignoring(model) == ["MaxIoUAssigner of rpn_head", "MaxIoUAssigner of roi_head"]
    head.assigner = MaxIoUAssigner(**RPN, ignore_iof_thr=0.4)
    model.roi_head.bbox_assigner = [IgnoringAssigner(**RCNN)]
    assert not_ignoring(model) == []
