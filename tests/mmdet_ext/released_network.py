"""Checkpoints in the layout of the released detectors, and a tiny detector made of one."""

import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope, init_default_scope

from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.released.weights import convert

TINY = dict(
    growth=8, bn_size=2, blocks=(1, 2, 2), stem=16, neck=24, fc=20, roi=7, mask=12, anchors=18
)
DENSENET121 = dict(
    growth=32, bn_size=4, blocks=(6, 12, 24), stem=64, neck=512, fc=2048, roi=7, mask=256,
    anchors=18,
)  # fmt: skip


def released_shapes(kind, slices, growth, bn_size, blocks, stem, neck, fc, roi, mask, anchors):
    """Names and shapes of a released detector's weights."""
    shapes = {}

    def conv(name, out, channels, kernel, depth=slices):
        shapes[f"backbone.{name}.weight"] = (out, channels, kernel, kernel)
        if kind == "a3d":
            shapes[f"backbone.{name}.adaptive_align_weights"] = (depth, depth, channels)

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone.{name}.{part}"] = (channels,)
        shapes[f"backbone.{name}.num_batches_tracked"] = ()

    def layer(name, *weight):
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = (weight[0],)

    conv("conv0", stem, slices if kind == "25d" else 1, 7, depth=3)
    norm("norm0", stem)
    channels = stem
    for i, layers in enumerate(blocks, start=1):
        for j in range(1, layers + 1):
            name = f"denseblock{i}.denselayer{j}"
            norm(f"{name}.norm1", channels)
            conv(f"{name}.conv1", bn_size * growth, channels, 1)
            norm(f"{name}.norm2", bn_size * growth)
            conv(f"{name}.conv2", growth, bn_size * growth, 3)
            channels += growth
        layer(f"backbone.lateral{i + 1}", neck, channels, 1, 1)
        if kind != "25d":
            size = (channels, channels, slices, 1, 1)
            shapes[f"backbone.reductionz{i}.reduction_z_conv.weight"] = size
        if i < len(blocks):
            norm(f"transition{i}.norm", channels)
            conv(f"transition{i}.conv", channels // 2, channels, 1, depth=3)
            channels //= 2
    layer("rpn_head.rpn_conv", neck, neck, 3, 3)
    layer("rpn_head.rpn_cls", anchors, neck, 1, 1)
    layer("rpn_head.rpn_reg", 4 * anchors, neck, 1, 1)
    layer("bbox_head.shared_fcs.0", fc, neck * roi * roi)
    layer("bbox_head.shared_fcs.1", fc, fc)
    layer("bbox_head.fc_cls", 2, fc)
    layer("bbox_head.fc_reg", 8, fc)
    for i in range(4):
        layer(f"mask_head.convs.{i}.conv", mask, mask if i else neck, 3, 3)
    shapes["mask_head.upsample.weight"] = (mask, mask, 2, 2)
    shapes["mask_head.upsample.bias"] = (mask,)
    layer("mask_head.conv_logits", 2, mask, 1, 1)
    return shapes


def released_weights(kind, slices):
    """Random weights of a tiny released detector, none of which would not matter."""
    generator = torch.Generator().manual_seed(slices)
    weights = {}
    for name, shape in released_shapes(kind, slices, **TINY).items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(100)
            continue
        value = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            value = 0.5 + value.abs()
        elif name.endswith("adaptive_align_weights"):
            value = 0.2 * value + torch.eye(len(value))[:, :, None]
        elif len(shape) > 1:
            value = value / (value[0].numel() / 2) ** 0.5
        weights[name] = value
    return weights


def linear_map(weights, name, x):
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x) + bias[:, None, None]


def tiny_config(kind, slices, repository):
    config = read_experiment(repository / f"configs/released/{kind}_{slices}slice.py")
    channels = [16 + 8, (16 + 8) // 2 + 16, (12 + 16) // 2 + 16]
    config.merge_from_dict(
        {
            "model.backbone.growth": TINY["growth"],
            "model.backbone.bn_size": TINY["bn_size"],
            "model.backbone.block_config": TINY["blocks"],
            "model.backbone.stem_channels": TINY["stem"],
            "model.backbone.init_cfg": None,
            "model.neck.in_channels": channels,
            "model.neck.out_channels": TINY["neck"],
            "model.rpn_head.in_channels": TINY["neck"],
            "model.rpn_head.feat_channels": TINY["neck"],
            "model.roi_head.bbox_roi_extractor.out_channels": TINY["neck"],
            "model.roi_head.mask_roi_extractor.out_channels": TINY["neck"],
            "model.roi_head.bbox_head.in_channels": TINY["neck"],
            "model.roi_head.bbox_head.fc_out_channels": TINY["fc"],
            "model.roi_head.mask_head.in_channels": TINY["neck"],
            "model.roi_head.mask_head.conv_out_channels": TINY["mask"],
        }
    )
    return config


def tiny_detector(kind, slices, repository):
    """(released weights, our detector with them loaded)."""
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")
    weights = released_weights(kind, slices)
    model = MODELS.build(tiny_config(kind, slices, repository).model).eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(convert(weights, shapes), strict=True)
    return weights, model
