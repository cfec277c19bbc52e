"""What of a detector can be exported, and what its programs do not say: the manifest."""

from __future__ import annotations

import torch
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from torch import nn

from ct_volumes.export_format import MULTIPLE
from ct_volumes.exported import INTERPOLATIONS
from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.errors import UserError
from mmdet_ext.config.network import network_of
from mmdet_ext.engine.predict import LesionDetector

RELEASED = "ReleasedKeySliceMaskRCNN"
DETECTORS = ("KeySliceMaskRCNN", RELEASED)
CAN = "What can be exported is KeySliceMaskRCNN, with any fusion operator, and released detectors"
# The parts of such a detector whose results are computed here, by their names: what derives from
# them may compute something else.
PARTS = {
    "data_preprocessor": ("CTDataPreprocessor",),
    "rpn_head": ("RPNHead", "InferenceRPNHead"),
    "rpn_head.prior_generator": ("AnchorGenerator", "WholePixelAnchorGenerator"),
    "rpn_head.bbox_coder": ("DeltaXYWHBBoxCoder", "WholePixelBoxCoder"),
    "roi_head": ("StandardRoIHead",),
    "roi_head.bbox_roi_extractor": ("SingleRoIExtractor",),
    "roi_head.bbox_head": ("Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead"),
    "roi_head.bbox_head.bbox_coder": ("DeltaXYWHBBoxCoder", "WholePixelBoxCoder"),
    "roi_head.mask_roi_extractor": ("SingleRoIExtractor",),
    "roi_head.mask_head": ("FCNMaskHead", "WholePixelMaskHead"),
}
STEPS = ("RandomAffineResize", "PackCTInputs")  # of the test pipeline, after loading


def check_kind(name: str, kind: str) -> None:
    """Raises UserError for an experiment's kind of detector that cannot be exported."""
    if kind not in DETECTORS:
        raise UserError(f"{name}: a {kind} cannot be exported. {CAN}")


def check_exportable(detector: LesionDetector) -> None:
    """Raises UserError, by its name, for what is not known here."""
    model = detector.model
    check_kind(detector.name, type(model).__name__)

    def refuse(what: str) -> None:
        raise UserError(f"{detector.name}: {what}, which cannot be exported. {CAN}")

    for path, known in PARTS.items():
        part = model
        for name in path.split("."):
            part = getattr(part, name, None)
        if part is not None and type(part).__name__ not in known:
            refuse(f"its {path} is a {type(part).__name__}")
    steps = [step.get("type") for step in detector.steps]
    if other := [step for step in steps if step not in STEPS]:
        refuse(f"its test pipeline has {other[0]}")
    resize = [step for step in detector.pipeline.transforms if hasattr(step, "flip_prob")]
    if len(resize) > 1 or any(step.prob or step.flip_prob for step in resize):
        refuse("its test pipeline augments images")
    if (divisor := model.data_preprocessor.pad_size_divisor) != MULTIPLE:
        refuse(f"its images are padded to multiples of {divisor} pixels, not of {MULTIPLE}")
    rpn, box = model.rpn_head, model.roi_head.bbox_head
    if len({side for stride in rpn.prior_generator.strides for side in stride}) != 1:
        refuse("it has maps of several strides")
    for path, part in (("rpn_head", rpn), ("roi_head.bbox_head", box)):
        if not part.bbox_coder.clip_border or part.bbox_coder.add_ctr_clamp:
            refuse(f"its {path}.bbox_coder has another clip_border or add_ctr_clamp than usual")
    if model.roi_head.with_shared_head:
        refuse("its roi_head has a shared_head")
    if not rpn.use_sigmoid_cls or rpn.cls_out_channels != 1:
        refuse("its RPN has a softmax")
    if box.custom_cls_channels or not (box.with_cls and box.with_reg):
        refuse("its box head has outputs of its own")
    for name, part in (("rpn", model.test_cfg.rpn), ("rcnn", model.test_cfg.rcnn)):
        if set(part.nms) != {"type", "iou_threshold"} or part.nms["type"] != "nms":
            refuse(f"test_cfg.{name}.nms is {dict(part.nms)}")
    if not model.test_cfg.rpn.max_per_img > 0:
        refuse("test_cfg.rpn.max_per_img is no limit")
    if model.with_mask and not model.test_cfg.rcnn.mask_thr_binary >= 0:
        refuse("test_cfg.rcnn.mask_thr_binary is negative")
    for extractor in ("bbox_roi_extractor", "mask_roi_extractor"):
        layers = getattr(getattr(model.roi_head, extractor, None), "roi_layers", ())
        if any(layer.pool_mode != "avg" or layer.use_torchvision for layer in layers):
            refuse(f"its {extractor} is no average")


def describe(detector: LesionDetector, kind: str, size: tuple[int, ...]) -> dict:
    """The manifest, still without programs."""
    model, test_cfg = detector.model, detector.model.test_cfg
    windows = model.data_preprocessor.windows
    resize = next((s for s in detector.pipeline.transforms if hasattr(s, "interpolation")), None)
    interpolation = getattr(resize, "interpolation", INTERPOLATIONS["linear"])
    rpn, box = model.rpn_head, model.roi_head.bbox_head
    classes = detector.config.get("classes") or ["lesion"] * (box.num_classes == 1)
    manifest = dict(
        kind=kind,
        experiment=detector.name,
        software=detector.software,
        torch=torch.__version__,
        checkpoint_sha256=detector.checkpoint_sha256,
        network_sha256=detector.network_sha256,
        trained_as=network_of(detector.config),
        classes=list(classes) or [str(number) for number in range(box.num_classes)],
        stack=dict(
            dict(policy="keep_thick", target_mm=2.0, interpolation="exact"), **detector.stack
        ),
        input=dict(
            size=list(detector.size) if detector.size else None,
            program_size=list(size) or None,
            interpolation=next(k for k, v in INTERPOLATIONS.items() if v == interpolation),
            air_hu=int(min(low for low, _ in windows)),
            windows_hu=[list(window) for window in windows],
        ),
        proposals=dict(
            coder(rpn.bbox_coder),
            stride=rpn.prior_generator.strides[0][0],
            base_anchors=rpn.prior_generator.base_anchors[0].tolist(),
            nms_pre=test_cfg.rpn.get("nms_pre", -1),
            max_per_img=test_cfg.rpn.max_per_img,
            iou_threshold=test_cfg.rpn.nms.iou_threshold,
            min_size=smallest(test_cfg.rpn.get("min_bbox_size", -1)),
        ),
        boxes=dict(
            coder(box.bbox_coder),
            **roi(model.roi_head.bbox_roi_extractor),
            score_thr=test_cfg.rcnn.score_thr,
            iou_threshold=test_cfg.rcnn.nms.iou_threshold,
            max_per_img=test_cfg.rcnn.max_per_img,
            shrink=PIXEL_CENTRE if type(model).__name__ == RELEASED else 0.0,
        ),
        masks=None,
        programs={},
    )
    if model.with_mask:
        head = model.roi_head.mask_head
        manifest["masks"] = dict(
            roi(model.roi_head.mask_roi_extractor),
            per_class=not head.class_agnostic,
            threshold=test_cfg.rcnn.mask_thr_binary,
            whole_pixels=type(head).__name__ == "WholePixelMaskHead",
        )
    return manifest


def smallest(size: float) -> float | None:
    return size if size >= 0 else None


def coder(part: DeltaXYWHBBoxCoder) -> dict:
    whole = type(part).__name__ == "WholePixelBoxCoder"
    return dict(
        means=list(part.means),
        stds=list(part.stds),
        ratio_clip=16 / 1000,  # mmdet's delta2bbox
        clip="pixels" if whole else "edges",
    )


def roi(extractor: nn.Module) -> dict:
    (layer,) = extractor.roi_layers
    bins, other = layer.output_size
    assert bins == other
    return dict(
        bins=bins,
        scale=layer.spatial_scale,
        sampling_ratio=layer.sampling_ratio,
        aligned=layer.aligned,
    )
