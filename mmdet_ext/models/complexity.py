"""Parameters and operations of a detector, part by part, in the papers' convention and in plain
multiply-adds. Nothing is computed: the network runs on tensors without data."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_ext.ops import P3DConv

aten = torch.ops.aten
NORMS = {aten.native_batch_norm, aten._native_batch_norm_legit_no_training}
RELUS = {aten.relu, aten.relu_}
POOLS = {aten.max_pool2d_with_indices, aten.avg_pool2d}
PRODUCTS = {aten.mul, aten.mul_, aten.addcmul, aten.addcmul_, aten.lerp, aten.lerp_}


@dataclass
class Complexity:
    """Of one part of a network and one image.

    Attributes:
        parameters: their number.
        multiply_adds: of convolutions, matrix products and the operators' own mixing of slices.
        paper_flops: as A3D (MICCAI 2021), Table 1 counts: 1 a convolution's multiply-add, 2 an
            element that BatchNorm gives out, 1 an element of a ReLU, 1 an element that a pooling
            takes in. Mixing slices (shifts, A3D's products) is not counted. For P3D the published
            figures come out with one more BatchNorm and ReLU on the output of each dense layer's
            1 x 1 convolution: they are counted, though `P3DConv` has none.
    """

    parameters: int = 0
    multiply_adds: int = 0
    paper_flops: int = 0


class Count(TorchDispatchMode):
    """Counts the operations that run inside it."""

    def __init__(self, result: Complexity) -> None:
        super().__init__()
        self.result = result

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        operation = function.overloadpacket
        result = self.result
        if operation is aten.convolution:
            transposed = args[6]
            macs = (args[0] if transposed else out).numel() * args[1][0].numel()
            result.multiply_adds += macs
            result.paper_flops += macs
        elif operation in NORMS:
            result.paper_flops += 2 * out[0].numel()
        elif operation in RELUS:
            result.paper_flops += out.numel()
        elif operation in POOLS:
            result.paper_flops += args[0].numel()
        elif operation in (aten.addmm, aten.mm, aten.bmm):
            matrix = args[1] if operation is aten.addmm else args[0]
            result.multiply_adds += out.numel() * matrix.shape[-1]
            result.paper_flops += out.numel() * matrix.shape[-1]
        elif operation in PRODUCTS:
            result.multiply_adds += out.numel()
        return out


def count(part: nn.Module, *inputs) -> tuple[Complexity, object]:
    """Runs `part` on `inputs`, which hold no data; its complexity and its outputs."""
    result = Complexity(parameters=sum(p.numel() for p in part.parameters()))

    def published_p3d(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if module.kernel_size == (1, 1):
            result.paper_flops += 3 * output.numel()

    hooks = [m.register_forward_hook(published_p3d) for m in part.modules() if type(m) is P3DConv]
    with torch.no_grad(), Count(result):
        outputs = part(*inputs)
    for hook in hooks:
        hook.remove()
    return result, outputs


def input_shape(config: Config) -> tuple[int, int]:
    """Number of slices and image size (px) that an experiment's network sees."""
    return config.stack.num_slices, config.resize.size


def detector_complexity(config: Config, size: int | None = None) -> dict[str, Complexity]:
    """Complexity of a detector of this repository on one image at test time.

    Args:
        config: of an experiment.
        size: height and width in px, a multiple of 32; default: what the config resizes to.

    Returns:
        `backbone`, `neck`, `rpn_head`, `bbox_head` (on test_cfg.rpn.max_per_img proposals) and
        `mask_head` (on test_cfg.rcnn.max_per_img detections). RoIAlign, NMS and the decoding of
        boxes are not counted.

    Raises:
        ValueError: size is not a positive multiple of 32.
    """
    slices, config_size = input_shape(config)
    size = size or config_size
    if size < 32 or size % 32:
        raise ValueError(f"size must be a positive multiple of 32 px, got {size}")
    options = copy.deepcopy(config.model)
    options.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        # As in training: at inference norms go into the kernels, but the papers count them.
        model = MODELS.build(options).train()
        images, thickness = torch.empty(1, 1, slices, size, size), torch.empty(1)
        parts = {}
        parts["backbone"], maps = count(model.backbone, images, thickness)
        parts["neck"], features = count(model.neck, maps)
        parts["rpn_head"], _ = count(model.rpn_head, features)
        for name, number in (
            ("bbox", model.test_cfg.rpn.max_per_img),
            ("mask", model.test_cfg.rcnn.max_per_img),
        ):
            extractor = options.roi_head[f"{name}_roi_extractor"]
            side = extractor.roi_layer.output_size
            regions = torch.empty(number, extractor.out_channels, side, side)
            head = getattr(model.roi_head, f"{name}_head")
            parts[f"{name}_head"], _ = count(head, regions)
    return parts


def format_complexity(parts: dict[str, Complexity]) -> str:
    """One line a part and their total, as `tools/complexity.py` prints them."""
    total = Complexity(
        *(sum(getattr(p, f.name) for p in parts.values()) for f in fields(Complexity))
    )
    return "\n".join(
        f"{name:<10}{part.paper_flops / 1e9:8.2f} GFLOPs (paper)"
        f"{part.multiply_adds / 1e9:9.2f} G multiply-adds"
        f"{part.parameters / 1e6:8.2f} M parameters"
        for name, part in {**parts, "total": total}.items()
    )
