"""Parameters and operations of a detector, part by part, in the papers' convention and in plain
multiply-adds. Nothing is computed: the network runs on tensors without data."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2dPack
from mmdet.models.detectors import DINO, SingleStageDetector, TwoStageDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplesion.errors import UserError
from mmdet_ext.models.preprocessor import CTDataPreprocessor
from mmdet_ext.models.slice_groups import BagRoIExtractor, SliceGroups
from mmdet_ext.ops import P3DConv, SliceConv

aten = torch.ops.aten
NORMS = {aten.native_batch_norm, aten._native_batch_norm_legit_no_training}
RELUS = {aten.relu, aten.relu_}
POOLS = {aten.max_pool2d_with_indices, aten.avg_pool2d}
# Which argument is the left matrix.
MATRIX_PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
PRODUCTS = {aten.mul, aten.mul_, aten.addcmul, aten.addcmul_, aten.lerp, aten.lerp_}


@dataclass
class Complexity:
    """Of one part of a network and one image.

    Attributes:
        parameters: their number.
        multiply_adds: of convolutions, matrix products and the operators' own mixing of slices.
        paper_flops: as A3D (MICCAI 2021), Table 1 counts: 1 a convolution's multiply-add, 2 an
            element that BatchNorm gives out, 1 an element of a ReLU, 1 an element that a pooling
            takes in. Mixing slices, an operator's `fuse`, is not counted. For P3D the published
            figures come out with one more BatchNorm and ReLU on the output of each dense layer's
            1 x 1 convolution: they are counted, though `P3DConv` has none.
    """

    parameters: int = 0
    multiply_adds: int = 0
    paper_flops: int = 0

    def __add__(self, other: Complexity) -> Complexity:
        return Complexity(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(Complexity))
        )


class Count(TorchDispatchMode):
    """Counts the operations that run inside it."""

    def __init__(self, result: Complexity) -> None:
        super().__init__()
        self.result = result
        self.mixing = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = function.overloadpacket
        if operation in NORMS:
            # Without data PyTorch's own is a Python function, which takes most of the time.
            statistics = args[0].new_empty(args[0].shape[1])
            out = (torch.empty_like(args[0]), statistics, statistics.clone())
        else:
            out = function(*args, **(kwargs or {}))
        multiply_adds = paper_flops = 0
        if operation is aten.convolution:
            transposed = args[6]
            multiply_adds = (args[0] if transposed else out).numel() * args[1][0].numel()
            paper_flops = multiply_adds
        elif operation in NORMS:
            paper_flops = 2 * out[0].numel()
        elif operation in RELUS:
            paper_flops = out.numel()
        elif operation in POOLS:
            paper_flops = args[0].numel()
        elif operation in MATRIX_PRODUCTS:
            matrix = args[MATRIX_PRODUCTS[operation]]
            multiply_adds = paper_flops = out.numel() * matrix.shape[-1]
        elif operation in PRODUCTS:
            multiply_adds = out.numel()
        self.result.multiply_adds += multiply_adds
        if not self.mixing:
            self.result.paper_flops += paper_flops
        return out

    @contextlib.contextmanager
    def mixing_of(self, part: nn.Module) -> Iterator[None]:
        """Meanwhile what the operators in `part` do to mix slices is known as that."""

        def marked(fuse):
            def run(*args, **kwargs):
                outer, self.mixing = self.mixing, True
                try:
                    return fuse(*args, **kwargs)
                finally:
                    self.mixing = outer

            return run

        operators = [module for module in part.modules() if isinstance(module, SliceConv)]
        for operator in operators:
            operator.fuse, operator.fuse_ = marked(operator.fuse), marked(operator.fuse_)
        try:
            yield
        finally:
            for operator in operators:
                del operator.fuse, operator.fuse_


@contextlib.contextmanager
def deformable_as_plain(part: nn.Module) -> Iterator[None]:
    """Meanwhile deformable convolutions compute their offsets, and are plain convolutions of the
    same kernel: mmcv's own code needs data. Reading between pixels is not counted, as in
    RoIAlign."""

    def plain(conv: DeformConv2dPack):
        def run(x: Tensor) -> Tensor:
            conv.conv_offset(x)
            geometry = conv.stride, conv.padding, conv.dilation, conv.groups
            return F.conv2d(x, conv.weight, None, *geometry)

        return run

    convolutions = [m for m in part.modules() if isinstance(m, DeformConv2dPack)]
    for convolution in convolutions:
        convolution.forward = plain(convolution)
    try:
        yield
    finally:
        for convolution in convolutions:
            del convolution.forward


def count(part: nn.Module, *inputs) -> tuple[Complexity, object]:
    """Runs `part` on `inputs`, which hold no data; its complexity and its outputs."""
    result = Complexity(parameters=sum(p.numel() for p in part.parameters()))

    def published_p3d(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if module.kernel_size == (1, 1):
            result.paper_flops += 3 * output.numel()

    hooks = [m.register_forward_hook(published_p3d) for m in part.modules() if type(m) is P3DConv]
    with (
        torch.no_grad(),
        deformable_as_plain(part),
        Count(result) as counter,
        counter.mixing_of(part),
    ):
        outputs = part(*inputs)
    for hook in hooks:
        hook.remove()
    return result, outputs


def input_shape(config: Config) -> tuple[int, int, int]:
    """Number of slices (of a 2D detector: the 3 channels of an image), height and width (px) that
    an experiment's test pipeline makes; of Resize's scale, what becomes of a square image.

    Raises UserError if the pipeline resizes by neither RandomAffineResize nor Resize.
    """
    dataset = config.test_dataloader.dataset
    steps = {step["type"]: step for step in dataset.get("pipeline", [])}
    if "RandomAffineResize" in steps:
        size = pair(steps["RandomAffineResize"]["size"])
    elif "scale" in steps.get("Resize", {}):
        size = pair(min(pair(steps["Resize"]["scale"])))
    else:
        raise UserError(
            f"{config.filename}: no RandomAffineResize, and no Resize with a scale, in "
            "test_dataloader.dataset.pipeline to tell the image size"
        )
    return dataset.get("stack", {}).get("num_slices", 3), *size


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def detector_complexity(
    config: Config, size: int | tuple[int, int] | None = None
) -> dict[str, Complexity]:
    """Complexity of a detector, of this repository or another single-stage or two-stage one of
    MMDetection, on one image at test time.

    Args:
        config: of an experiment.
        size: (height, width) in px, multiples of 32, or one number for both; default: what the
            config resizes to.

    Returns:
        Those parts that the detector has, by mmdet's names: `backbone`, `neck` (of all the images
        that volumetric attention looks at), `attention`; `rpn_head`,
        `shared_head`, `bbox_head` (on test_cfg.rpn.max_per_img proposals) and `mask_head` (on
        test_cfg.rcnn.max_per_img detections; shared_head too if there is one) of a two-stage
        detector, the stages of a cascade together; `bbox_head` of a single-stage one;
        `transformer` of a DINO, its head included. RoIAlign, reading between pixels, NMS and the
        decoding of boxes are not counted.

    Raises:
        UserError: a size that is no positive multiple of 32; a detector with other parts, or with
            one that does not run on its own or without data.
    """
    slices, *own = input_shape(config)
    size = pair(size or own)
    for side in size:
        if side < 32 or side % 32:
            raise UserError(f"size must be a positive multiple of 32 px, got {side}")
    options = copy.deepcopy(config.model)
    options.backbone.init_cfg = None
    # As in training: at inference norms go into the kernels, but the papers count them.
    model = _build_without_data(options).train()
    with torch.device("meta"):
        if not isinstance(model, (SingleStageDetector, TwoStageDetector, DINO)):
            raise UserError(f"{options.type} is neither a single-stage nor a two-stage detector")
        if isinstance(model.data_preprocessor, CTDataPreprocessor):
            windows = len(model.data_preprocessor.windows)
            inputs = (torch.empty(1, windows, slices, *size), torch.empty(1))
        else:
            inputs = (torch.empty(1, 3, *size),)
        grouped = isinstance(model, SliceGroups)
        if grouped:
            inputs = (model.regroup(inputs[0]),)
        parameters = sum(p.numel() for p in model.parameters())
        parts = {}
        parts["backbone"], features = _count_option("backbone", model.backbone, *inputs)
        if model.with_neck:
            parts["neck"], features = _count_option("neck", model.neck, features)
        if grouped:
            bags = [level.unflatten(0, (1, model.num_images)) for level in features]
            if model.attention_location == "rpn":
                parts["attention"], features = _count_option("attention", model.attention, bags)
            else:
                features = model.attend(bags)
        if isinstance(model, TwoStageDetector):
            parts["rpn_head"], _ = _count_option("rpn_head", model.rpn_head, features)
            parts |= _roi_head_parts(model)
        elif isinstance(model, DINO):
            parts["transformer"] = _transformer_part(model, features, size)
        else:
            parts["bbox_head"], _ = _count_option("bbox_head", model.bbox_head, features)
    counted = sum(part.parameters for part in parts.values())
    if counted != parameters:
        raise UserError(
            f"{options.type} has {parameters - counted} parameters outside its {', '.join(parts)}: "
            "such a detector cannot be counted"
        )
    return parts


def _build_without_data(options: dict) -> nn.Module:
    """The model with tensors that hold no data."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        try:
            with torch.device("meta"):
                # Deformable convolutions make theirs on the CPU all the same.
                return MODELS.build(copy.deepcopy(options)).to("meta")
        except RuntimeError:  # a constructor that looks at its numbers, as Swin's
            return MODELS.build(options).to("meta")


def _count_option(option: str, part: nn.Module, *inputs) -> tuple[Complexity, object]:
    """`count` of the part that `model.<option>` describes, which an error names."""
    try:
        return count(part, *inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"model.{option}: {type(part).__name__} cannot be counted: it must run on its own and "
            f"without data, but {error}"
        ) from error


@torch.no_grad()
def _transformer_part(
    model: DINO, features: tuple[Tensor, ...], size: tuple[int, int]
) -> Complexity:
    """Of all that follows the neck, which the model loses by it. It looks up the sizes of the maps,
    so it runs on data, zeros."""
    model.backbone = model.neck = nn.Identity()
    model.extract_feat = lambda maps: maps
    model.to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    sample = DetDataSample(metainfo=dict(batch_input_shape=size, img_shape=size))
    with torch.device("cpu"):
        maps = tuple(torch.zeros(level.shape) for level in features)
        return _count_option("encoder", model, maps, [sample])[0]


def _roi_head_parts(model: TwoStageDetector) -> dict[str, Complexity]:
    head, parts = model.roi_head, {}
    for name, has_it, number in (
        ("bbox", head.with_bbox, model.test_cfg.rpn.max_per_img),
        ("mask", head.with_mask, model.test_cfg.rcnn.max_per_img),
    ):
        if not has_it:
            continue
        stages, extractors = getattr(head, f"{name}_head"), getattr(head, f"{name}_roi_extractor")
        if not isinstance(stages, nn.ModuleList):
            stages, extractors = [stages], [extractors]
        for stage, extractor in zip(stages, extractors, strict=True):
            size = extractor.roi_layers[0].output_size
            if isinstance(extractor, BagRoIExtractor):
                path = f"roi_head.{name}_roi_extractor.attention"
                bags = torch.empty(number, *extractor.bag_shape, *size)
                attention, regions = _count_option(path, extractor.attention, bags)
                parts["attention"] = parts.get("attention", Complexity()) + attention
            else:
                regions = torch.empty(number, extractor.out_channels, *size)
            if head.with_shared_head:
                shared, regions = _count_option("roi_head.shared_head", head.shared_head, regions)
                if "shared_head" in parts:
                    shared.parameters = 0  # once
                parts["shared_head"] = parts.get("shared_head", Complexity()) + shared
            of_stage, _ = _count_option(f"roi_head.{name}_head", stage, regions)
            parts[f"{name}_head"] = parts.get(f"{name}_head", Complexity()) + of_stage
    return parts


def format_complexity(parts: dict[str, Complexity]) -> str:
    """One line a part and their total, as `tools/complexity.py` prints them."""
    total = sum(parts.values(), Complexity())
    return "\n".join(
        f"{name:<10}{part.paper_flops / 1e9:8.2f} GFLOPs (paper)"
        f"{part.multiply_adds / 1e9:9.2f} G multiply-adds"
        f"{part.parameters / 1e6:8.2f} M parameters"
        for name, part in {**parts, "total": total}.items()
    )
