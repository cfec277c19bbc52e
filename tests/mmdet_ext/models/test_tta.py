"""Test-time augmentation: views turned back exactly, their boxes and masks fused."""

import numpy as np
import pytest
import torch
from mmdet.models.utils import weighted_boxes_fusion
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from scipy import ndimage
from torch import nn

from mmdet_ext.checkpoint import load_checkpoint_file
from mmdet_ext.models.tta import VIEWS, ViewsTTA, clusters_of, fused

from ..small_detector import body_of, config_of, write_checkpoint
from .test_detectors import collate, sample


class BlobDetector(nn.Module):
    """Finds connected bright pixels of the middle slice: whatever way up, the same ones. `drift`
    moves its boxes and masks to the right, in the image as it sees it."""

    def __init__(self, drift=0, top=10):
        super().__init__()
        self.test_cfg = ConfigDict(rcnn=dict(nms=dict(iou_threshold=0.5), max_per_img=top))
        self.drift = drift
        self.seen = []

    def test_step(self, data):
        for stack, found in zip(data["inputs"], data["data_samples"]):
            self.seen.append(stack)
            image = stack[0, stack.shape[1] // 2].numpy()
            labels, count = ndimage.label(image > 0)
            masks = np.stack([labels == n for n in range(1, count + 1)])
            boxes = [
                (x.start + self.drift, y.start, x.stop + self.drift, y.stop)
                for y, x in ndimage.find_objects(labels)
            ]
            scores = [image[mask].mean() / 1000 for mask in masks]
            found.pred_instances = InstanceData(
                bboxes=torch.tensor(boxes, dtype=torch.float32),
                scores=torch.tensor(scores, dtype=torch.float32),
                labels=torch.zeros(count, dtype=torch.long),
                masks=torch.from_numpy(np.roll(masks, self.drift, axis=2)),
            )
        return data["data_samples"]


def blobs(height=40, width=56):
    """Two shapes without symmetry, in an image that is not square."""
    stack = torch.full((1, 3, height, width), -500, dtype=torch.int16)
    stack[0, 1, 4:12, 6:20] = 900
    stack[0, 1, 4:7, 10:20] = -500
    stack[0, 1, 30:36, 40:50] = 300
    return stack, sample(height, width)[1]


@pytest.mark.parametrize("views", [(), *((view,) for view in VIEWS), tuple(VIEWS)])
def test_views_of_a_detector_that_knows_no_direction_are_what_it_finds(views):
    (plain,) = BlobDetector().test_step(collate(blobs()))
    (found,) = ViewsTTA(BlobDetector(), views).test_step(collate(blobs()))
    plain, found = plain.pred_instances, found.pred_instances
    assert len(found) == 2 and found.scores[0] > found.scores[1]
    order = plain.scores.argsort(descending=True)
    torch.testing.assert_close(found.bboxes, plain.bboxes[order])
    torch.testing.assert_close(found.scores, plain.scores[order])
    assert torch.equal(found.masks, plain.masks[order])
    assert torch.equal(found.labels, plain.labels)


@pytest.mark.parametrize("view", ["horizontal", "both"])
def test_a_drift_to_the_right_becomes_one_to_the_left(view):
    (plain,) = BlobDetector().test_step(collate(blobs()))
    (found,) = ViewsTTA(BlobDetector(drift=1), [view]).test_step(collate(blobs()))
    order = plain.pred_instances.scores.argsort(descending=True)
    torch.testing.assert_close(found.pred_instances.bboxes, plain.pred_instances.bboxes[order])


def test_every_view_is_what_its_name_says_and_leaves_the_batch_alone():
    stack = torch.arange(3 * 40 * 56, dtype=torch.int16).reshape(1, 3, 40, 56) - 3000
    detector, data = BlobDetector(), collate((stack, sample(40, 56)[1]))
    ViewsTTA(detector).test_step(data)
    plain, horizontal, vertical, both, depth = (seen[0].numpy() for seen in detector.seen)
    assert (plain == stack[0].numpy()).all() and "pred_instances" not in data["data_samples"][0]
    assert (horizontal == plain[:, :, ::-1]).all() and (vertical == plain[:, ::-1]).all()
    assert (both == plain[:, ::-1, ::-1]).all() and (depth == plain[::-1]).all()


def boxes_of(*rows, size=20):
    """x, y, width, score, label; the mask is the box."""
    masks = torch.zeros(len(rows), size, size, dtype=torch.bool)
    for mask, (x, y, width, _, _) in zip(masks, rows):
        mask[y : y + 4, x : x + width] = True
    x, y, width, scores, labels = torch.tensor(rows).reshape(-1, 5).T
    return InstanceData(
        bboxes=torch.stack([x, y, x + width, y + 4], dim=1),
        scores=scores,
        labels=labels.long(),
        masks=masks,
    )


def test_boxes_are_their_mean_by_score_and_score_by_how_many_views_agree():
    one = boxes_of((2, 2, 8, 0.9, 0), (12, 12, 4, 0.5, 0))
    two = boxes_of((4, 2, 8, 0.3, 0), (12, 12, 4, 0.8, 1))
    found = fused([one, two], 0.5)
    x = (0.9 * 2 + 0.3 * 4) / 1.2
    expected = [[x, 2, x + 8, 6], [12, 12, 16, 16], [12, 12, 16, 16]]
    torch.testing.assert_close(found.bboxes, torch.tensor(expected))
    torch.testing.assert_close(found.scores, torch.tensor([1.2 / 2, 0.8 / 2, 0.5 / 2]))
    assert found.labels.tolist() == [0, 1, 0]
    # The better view holds three quarters of the score: its mask.
    assert torch.equal(found.masks[0], one.masks[0])
    nothing = fused([one[:0], two[:0]], 0.5)
    assert nothing.bboxes.shape == (0, 4) and nothing.masks.shape == (0, 20, 20)


def crowd(seed, views=3, number=12, size=40):
    """Views with many boxes of two labels on one another, whose masks are noise in them."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(views):
        corner, side = rng.uniform(0, 20, (number, 2)), rng.uniform(6, 16, (number, 2))
        found.append(
            InstanceData(
                bboxes=torch.tensor(np.hstack([corner, corner + side]), dtype=torch.float32),
                scores=torch.tensor(rng.uniform(0.05, 0.6, number), dtype=torch.float32),
                labels=torch.tensor(rng.integers(0, 2, number)),
                masks=torch.tensor(rng.random((number, size, size)) < 0.5),
            )
        )
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_boxes_are_those_of_a_library_and_masks_of_the_boxes_that_they_are_made_of(seed, threshold):
    views = crowd(seed)
    found, every = fused(views, threshold), InstanceData.cat(views)
    boxes, scores, labels = weighted_boxes_fusion(
        *([v[name].numpy() for v in views] for name in ("bboxes", "scores", "labels")),
        iou_thr=threshold,
        allows_overflow=True,
    )
    torch.testing.assert_close(found.bboxes, boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores, scores.clamp(max=1))
    assert found.labels.tolist() == labels.tolist()

    clusters, means = clusters_of(every, threshold)
    assert sorted(n for cluster in clusters for n in cluster) == list(range(len(every)))
    assert max(map(len, clusters)) > 1
    for cluster, mean in zip(clusters, means):
        weights = every.scores[cluster, None]
        box = (every.bboxes[cluster] * weights).sum(0) / weights.sum()
        torch.testing.assert_close(mean, box, atol=1e-4, rtol=0)
        votes = sum(every.scores[n] * every.masks[n] for n in cluster)
        (place,) = (found.bboxes - mean).abs().amax(1).lt(1e-3).nonzero().flatten()
        assert torch.equal(found.masks[place], votes >= weights.sum() / 2)


def test_a_box_votes_on_the_mask_of_its_own_cluster_alone():
    """Two fused boxes that overlap by more than the threshold, each with masks of its own."""
    view = boxes_of((2, 2, 8, 0.9, 0), (7, 2, 8, 0.6, 0))
    other = boxes_of((3, 2, 8, 0.5, 0))  # joins the first, whose mean it pulls to the second
    found = fused([view, other], 0.25)
    assert bbox_overlaps(found.bboxes[:1], view.bboxes[1:]) > 0.25
    assert torch.equal(found.masks[0], view.masks[0]) and torch.equal(found.masks[1], view.masks[1])


def test_without_views_equal_scores_keep_their_order():
    view = boxes_of(*((2 + 4 * n, 2, 4, 0.5, 0) for n in range(4)))
    assert torch.equal(fused([view], 0.5).bboxes, view.bboxes)


def test_of_more_boxes_than_views_none_lowers_the_score():
    """A faint one, which its own view's NMS left beside the best, joins those that agree."""
    view, other = boxes_of((2, 2, 8, 0.9, 0), (5, 2, 8, 0.002, 0)), boxes_of((4, 2, 8, 0.9, 0))
    found = fused([view, other], 0.5)
    assert bbox_overlaps(view.bboxes[:1], view.bboxes[1:]) < 0.5 and len(found) == 1
    torch.testing.assert_close(found.scores, torch.tensor([1.802 / 2]))
    view.scores[1] = 0.8
    assert fused([view, other], 0.5).scores.tolist() == [1]


def test_no_more_boxes_than_of_one_view_and_none_without_area():
    (found,) = ViewsTTA(BlobDetector(top=1), ["vertical"]).test_step(collate(blobs()))
    assert found.pred_instances.scores.tolist() == pytest.approx([0.9])
    (found,) = ViewsTTA(BlobDetector(top=-1), ["vertical"]).test_step(collate(blobs()))
    assert len(found.pred_instances) == 2  # -1 is no limit

    class Flat(BlobDetector):
        def test_step(self, data):
            found = super().test_step(data)
            found[0].pred_instances.bboxes[1, 2] = found[0].pred_instances.bboxes[1, 0]
            return found

    (found,) = ViewsTTA(Flat(), []).test_step(collate(blobs()))
    assert len(found.pred_instances) == 1


def network(operator="SliceConv"):
    init_default_scope("mmdet")
    config = config_of(**{"model.test_cfg.rcnn.score_thr": 0.0})
    config.model.backbone.fusion = ConfigDict(type=operator)
    return config


def built(config, folder, change=lambda weights: weights):
    path = write_checkpoint(config, folder / "weights.pth")
    model = MODELS.build(config.model).eval()
    model.load_state_dict(change(load_checkpoint_file(path)["state_dict"]))
    return model


def stack_of_body():
    return torch.from_numpy(body_of(3)[None, :, 16:112, 16:112]), sample(96, 96)[1]


def found_by(model, data):
    with torch.no_grad():
        return model.test_step(data)[0].pred_instances


def assert_same(one, other, masks=1.0):
    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.bboxes, other.bboxes, atol=1e-2, rtol=1e-4)
    assert (one.masks == other.masks).float().mean() >= masks


def test_without_views_it_is_predict(tmp_path):
    model = built(network(), tmp_path)
    plain = found_by(model, collate(stack_of_body()))
    found = found_by(ViewsTTA(model, []), collate(stack_of_body()))
    assert len(plain) > 2
    for name in ("bboxes", "scores", "labels", "masks"):
        assert torch.equal(plain[name], found[name]), name


def test_reverse_order_is_undone_by_a_network_alike_in_both_directions(tmp_path):
    def symmetric(weights):
        return {k: (v + v.flip(2)) / 2 if v.ndim == 5 else v for k, v in weights.items()}

    model = built(network(), tmp_path, symmetric)
    plain = found_by(model, collate(stack_of_body()))
    found = found_by(ViewsTTA(model, ["depth"]), collate(stack_of_body()))
    assert len(plain) > 2
    assert_same(found, plain, masks=0.999)
    lopsided = built(network(), tmp_path)
    other = found_by(ViewsTTA(lopsided, ["depth"]), collate(stack_of_body()))
    plain = found_by(lopsided, collate(stack_of_body()))
    assert len(other) != len(plain) or not torch.allclose(other.scores, plain.scores, atol=1e-4)


@pytest.mark.parametrize("operator", ["A3DConv", "AlignShiftConv", "TSMConv"])
def test_reverse_order_adds_what_is_found_from_behind_whatever_the_operator(operator, tmp_path):
    model = built(network(operator), tmp_path)
    stack, data = stack_of_body()
    plain, behind = (found_by(model, collate((s, data))) for s in (stack, stack[:, [2, 1, 0]]))
    found = found_by(ViewsTTA(model, ["depth"]), collate((stack, data)))
    assert len(plain) > 2 and not torch.equal(plain.scores, behind.scores)
    options = model.test_cfg.rcnn
    expected = fused([plain, behind], options.nms.iou_threshold)[: options.max_per_img]
    for name in ("bboxes", "scores", "labels", "masks"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    "views, message", [(["up"], "no view 'up'; there are horizontal"), (["both"] * 2, "twice")]
)
def test_unknown_views_are_refused(views, message):
    with pytest.raises(ValueError, match=message):
        ViewsTTA(BlobDetector(), views)


def test_what_is_no_two_stage_detector_is_refused():
    detector = BlobDetector()
    detector.test_cfg = ConfigDict(nms=dict(iou_threshold=0.5))
    with pytest.raises(ValueError, match="no two-stage detector"):
        ViewsTTA(detector)
