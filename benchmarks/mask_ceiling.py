"""What masks of m x m cells cost on LiTS: the Dice of a detector that finds every instance and
draws each cell of its mask right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import DATASETS, METRICS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from pycocotools import mask as coco_mask
from torch import Tensor
from tqdm import tqdm


def ceilings(config: Config, mask_sizes: Sequence[int]) -> dict[tuple[int, str], dict[str, float]]:
    """(mask size, kind) -> the figures of the config's metric on its test data.

    The true masks, resized as the network's input is, are brought onto the cells of their boxes and
    drawn from there on the original slices, as targets of training and predictions are. Kinds are
    'binary', the targets themselves, and 'share', how much of each cell the mask covers, which
    needs a network that is unsure in the right measure. Size 0 draws the true masks: what is lost
    by the slices' distance.
    """
    options = config.test_dataloader.dataset.copy()
    load, *steps = options.pop("pipeline")
    pipeline = [load, dict(type="LoadAnnotations", with_bbox=True, with_mask=True), *steps]
    stack = {**options.pop("stack"), "num_slices": 1}  # the images are not looked at
    with DefaultScope.overwrite_default_scope("mmdet"):
        dataset = DATASETS.build(dict(**options, stack=stack, pipeline=pipeline))
        kinds = [(m, kind) for m in mask_sizes for kind in (("binary", "share") if m else ("-",))]
        metrics = {kind: METRICS.build(dict(config.test_evaluator)) for kind in kinds}
    head = FCNMaskHead(0, in_channels=1, conv_out_channels=1, num_classes=1, class_agnostic=True)
    for index in tqdm(range(len(dataset)), desc="slices"):
        sample = dataset[index]["data_samples"]
        for (size, kind), metric in metrics.items():
            if size:
                masks = drawn(head, sample, size, kind, config.model.test_cfg.rcnn)
            else:
                masks = true_masks(dataset.get_data_info(index))
            labels = sample.gt_instances.labels
            found = dict(masks=masks, labels=labels, scores=torch.ones(len(labels)))
            metric.process({}, [dict(sample.metainfo, pred_instances=found)])
    for metric in metrics.values():
        metric.dataset_meta = dataset.metainfo
    return {kind: metric.compute_metrics(metric.results) for kind, metric in metrics.items()}


def drawn(head: FCNMaskHead, sample: DetDataSample, size: int, kind: str, test_cfg: dict) -> Tensor:
    """(n, H, W) bool of the original slice: the true masks by way of size x size cells."""
    truth = sample.gt_instances
    boxes = truth.bboxes.tensor.clone()
    cells = truth.masks.crop_and_resize(
        boxes, (size, size), torch.arange(len(boxes)), binarize=kind == "binary"
    )
    if not len(boxes):
        return torch.zeros((0, *sample.ori_shape), dtype=torch.bool)
    shares = torch.from_numpy(cells.masks).float()
    logits = shares.clamp(1e-6, 1 - 1e-6).logit()[:, None]
    return head._predict_by_feat_single(
        logits, boxes, truth.labels, sample.metainfo, test_cfg, rescale=True
    )


def true_masks(data: dict) -> Tensor:
    """(n, H, W) bool of a sample of the data set."""
    masks = [torch.from_numpy(coco_mask.decode(i["mask"])) for i in data["instances"]]
    shape = data["height"], data["width"]
    return torch.stack(masks).bool() if masks else torch.zeros((0, *shape), dtype=torch.bool)
