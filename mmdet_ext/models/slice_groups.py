"""Slices regrouped into images of three for mmdet's own 2D detectors, with volumetric attention
between the images: SliceGroupFasterRCNN, SliceGroupMaskRCNN (Volumetric Attention, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain

import torch
from mmdet.models.detectors import FasterRCNN, MaskRCNN, TwoStageDetector
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox2roi
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ext.models.attention import VolumetricAttention, entropy
from mmdet_ext.models.detectors import NO_NUM_SLICES, num_windows, set_once
from mmdet_ext.models.inference import looks_at_the_batch
from mmdet_ext.models.pretrained import copy_parts
from mmdet_ext.models.roi_align import use_inference_roi_align
from mmdet_ext.models.rpn import InferenceRPNHead, faster_rpn

SLICES_OF_AN_IMAGE = 3  # the colours of an ImageNet network
LOCATIONS = ("rpn", "rcnn")

MODELS.register_module(module=VolumetricAttention)


class SliceGroups:
    """What both detectors share, before mmdet's class in the order of inheritance."""

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        rpn_head: dict,
        roi_head: dict,
        num_slices: int | None = None,
        attention: dict | None = None,
        attention_location: str = "rpn",
        pretrained: dict | None = None,
        **others,
    ) -> None:
        if num_slices is None:
            raise ValueError(NO_NUM_SLICES)
        if num_windows(others.get("data_preprocessor")) > 1:
            raise ValueError(
                "the channels of its images are slices: data_preprocessor.windows must be one"
            )
        images = num_slices // SLICES_OF_AN_IMAGE
        if num_slices % SLICES_OF_AN_IMAGE or not images % 2:
            raise ValueError(
                f"num_slices={num_slices}: images of {SLICES_OF_AN_IMAGE} slices with the target "
                "in the middle need stack.num_slices=3, 9, 15, 21, 27, 33 ..."
            )
        if attention_location not in LOCATIONS:
            raise ValueError(
                f"attention_location must be one of {LOCATIONS}, got {attention_location!r}"
            )
        if not attention and attention_location != "rpn":
            raise ValueError(
                f"attention_location={attention_location!r} without attention: set model.attention "
                "as well, or leave it out"
            )
        if not attention and images > 1:
            raise ValueError(
                f"num_slices={num_slices} makes {images} images, and without attention only the "
                "middle one would be looked at: set model.attention, or stack.num_slices=3"
            )
        pretrained = dict(pretrained or {})
        if unknown := pretrained.keys() - {"checkpoint", "parts"}:
            raise ValueError(f"pretrained has no option {unknown.pop()!r}: checkpoint, parts")
        if pretrained.get("checkpoint") and not pretrained.get("parts"):
            raise ValueError("pretrained.checkpoint needs pretrained.parts: ['backbone', ...]")
        if pretrained.get("checkpoint") and "backbone" in pretrained["parts"]:
            backbone = {**backbone, "init_cfg": None}  # not fetched only to be overwritten
        where = attention_location if attention else None
        if attention:
            attention = dict(attention)
            set_once("attention.channels", attention, "channels", neck["out_channels"])
        if where == "rcnn":
            bag = dict(num_images=images, attention=attention)
            rpn_head = _replaced("rpn_head", rpn_head, "RPNHead", "TargetRPNHead")
            roi_head = dict(roi_head)
            for name in ("bbox_roi_extractor", "mask_roi_extractor"):
                if roi_head.get(name):
                    roi_head[name] = _replaced(
                        f"roi_head.{name}",
                        roi_head[name],
                        "SingleRoIExtractor",
                        "BagRoIExtractor",
                        **bag,
                    )
        rpn_head = faster_rpn(rpn_head)
        super().__init__(
            backbone=backbone, neck=neck, rpn_head=rpn_head, roi_head=roi_head, **others
        )
        use_inference_roi_align(self)
        self.pretrained = pretrained
        self.num_slices, self.num_images = num_slices, images
        self.attention_location = where
        if where == "rpn":
            self.attention = PyramidAttention(neck["num_outs"], attention)

    def init_weights(self) -> None:
        super().init_weights()
        if path := self.pretrained.get("checkpoint"):
            report = copy_parts(self, path, self.pretrained["parts"])
            print_log(f"{type(self).__name__}: {path}: {report}", logger="current")

    def extract_feat(self, batch_inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """((B, 1, D, H, W) images, (B,) thickness in mm) -> a map a level.

        (B, C, H_i, W_i), the target's with attention before the RPN or without any; with attention
        on RoI features (B, N C, H_i, W_i), the maps of the N images one after the other.
        """
        return self.attend(self.bags_of(batch_inputs))

    def bags_of(self, batch_inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        """What `extract_feat` takes -> (B, N, C, H_i, W_i), a level each."""
        images = self.image_features(self.regroup(batch_inputs[0]))
        return [level.unflatten(0, (-1, self.num_images)) for level in images]

    def regroup(self, volumes: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> (B N, 3, H, W): three neighbouring slices an image, sorted along z."""
        batch, channels, depth, *size = volumes.shape
        if channels != 1 or depth != self.num_slices:
            raise ValueError(
                f"the detector was built for num_slices={self.num_slices}, the volume has "
                f"{depth} slices of {channels} channel(s): load stacks of {self.num_slices}, or "
                f"set the experiment's stack.num_slices to {depth}"
            )
        return volumes.reshape(batch * self.num_images, SLICES_OF_AN_IMAGE, *size)

    def image_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """(M, 3, H, W) -> the pyramid's maps of each image, (M, C, H_i, W_i)."""
        return self.neck(self.backbone(images))

    def attend(self, bags: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, N, C, H_i, W_i), a level each -> what `extract_feat` returns."""
        if self.attention_location == "rpn":
            return self.attention(bags)
        return tuple(bag.flatten(1, 2) for bag in bags)

    @property
    def shares_images(self) -> bool:
        """Whether `shared_features` saves work and gives what `extract_feat` does: stacks of
        several images, no norm that looks at the whole batch, methods that are those of here."""
        own = type(self).extract_feat is SliceGroups.extract_feat
        own &= type(self).predict is TwoStageDetector.predict
        return own and self.num_images > 1 and not looks_at_the_batch(self)

    def images_of(self, stack: Sequence[Hashable]) -> list[tuple]:
        """What makes up each image of a stack, of what makes up its D slices."""
        size = SLICES_OF_AN_IMAGE
        return [tuple(stack[n : n + size]) for n in range(0, self.num_slices, size)]

    def shared_features(
        self,
        bags: Sequence[Sequence[Hashable]],
        load: Callable[[Sequence[Hashable]], Tensor],
        known: dict[Hashable, list[Tensor]],
    ) -> tuple[Tensor, ...]:
        """`extract_feat` of B stacks, each image computed once.

        Args:
            bags: of each stack the names of its N images, sorted along z.
            load: M names -> (M, 3, H, W), the preprocessed images.
            known: name -> its maps, of images computed before. New ones are added; whatever is
                taken out is computed again when it is needed.
        """
        new = [name for name in dict.fromkeys(chain(*bags)) if name not in known]
        for first in range(0, len(new), len(bags)):  # B at a time, however many are new
            names = new[first : first + len(bags)]
            maps = self.image_features(load(names))
            known |= {name: [level[i] for level in maps] for i, name in enumerate(names)}
        attended = []
        for bag in bags:
            levels = zip(*(known[name] for name in bag))
            attended.append(self.attend([torch.stack(level)[None] for level in levels]))
        return tuple(torch.cat(level) for level in zip(*attended))

    def attention_weights(
        self, batch_inputs: tuple[Tensor, Tensor], boxes: Sequence[Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """How much each image of the bags counts, for pictures.

        Args:
            batch_inputs: of `extract_feat`.
            boxes: (n_i, 4) of each sample, in the pixels of `batch_inputs`. Attention on RoI
                features is that of these boxes, attention before the RPN that of the whole maps.

        Returns:
            'P2' ... of the levels, or 'bbox' -> 'channel', 'spatial' -> (B, N), of RoI features
            (boxes, N); see `VolumetricAttention.attend`. Empty without attention.
        """
        bags = self.bags_of(batch_inputs)
        if self.attention_location == "rpn":
            levels = zip(self.attention.levels, bags, strict=True)
            return {f"P{i}": level.attend(bag)[1] for i, (level, bag) in enumerate(levels, 2)}
        if self.attention_location == "rcnn":
            extractor = self.roi_head.bbox_roi_extractor
            maps = self.attend(bags)[: extractor.num_inputs]
            return {"bbox": extractor.attend(maps, bbox2roi(list(boxes)))[1]}
        return {}

    def volume_features(
        self, volume: Tensor, step: int = 1
    ) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """`extract_feat` around every `step`-th slice of a volume, each image computed once.

        A stack around each slice would compute every image N times. Slices beyond an end are the
        end's, as in `load_slices`.

        Args:
            volume: (S, H, W), preprocessed slices as far apart as those of the stacks.
            step: 1, or as many slices as lie between two targets.

        Yields:
            the target's slice, and its maps with a batch of 1.
        """
        half, last = self.num_slices // 2, len(volume) - 1
        known: dict[tuple[int, ...], list[Tensor]] = {}
        for slice_ in range(0, len(volume), step):
            stack = [min(max(slice_ + i, 0), last) for i in range(-half, half + 1)]
            known = {image: maps for image, maps in known.items() if image[0] >= stack[0]}
            bags = [self.images_of(stack)]
            yield slice_, self.shared_features(bags, lambda new: volume[torch.tensor(new)], known)

    def predict_features(
        self, features: tuple[Tensor, ...], batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """`predict` from what `extract_feat` returns, or `shared_features`, `volume_features`."""
        proposals = self.rpn_head.predict(features, batch_data_samples, rescale=False)
        results = self.roi_head.predict(features, proposals, batch_data_samples, rescale=rescale)
        return self.add_pred_to_datasample(batch_data_samples, results)

    def loss(self, batch_inputs: tuple[Tensor, Tensor], batch_data_samples: SampleList) -> dict:
        """mmdet's losses, and the attention's entropies under names that mmdet logs and does not
        add up: entropy_P2_channel ... of the levels, entropy_bbox_spatial ... of RoI features."""
        losses = super().loss(batch_inputs, batch_data_samples)
        if self.attention_location == "rpn":
            entropies = {f"P{i + 2}": e for i, e in enumerate(self.attention.entropies)}
        elif self.attention_location == "rcnn":
            parts = {name: getattr(self.roi_head, f"{name}_roi_extractor") for name in self._rois()}
            entropies = {name: part.entropies for name, part in parts.items()}
        else:
            entropies = {}
        named = {f"entropy_{a}_{b}": e for a, parts in entropies.items() for b, e in parts.items()}
        return {**losses, **named}

    def _rois(self) -> list[str]:
        """Of what RoI features there are."""
        own_mask = self.roi_head.with_mask and not self.roi_head.share_roi_extractor
        return ["bbox", "mask"] if own_mask else ["bbox"]


_ARGUMENTS = """
    D = 3 N slices, three an image, are a batch of N images to backbone and neck. Neighbouring
    images do not overlap; the target is the middle one of them. RPN and heads are mmdet's own.

    Args:
        backbone, neck, rpn_head, roi_head, others: of mmdet's `{parent}`.
        num_slices: D, of an odd number of images. An experiment's `stack` says it.
        attention: config of the attention between images, `dict(type='VolumetricAttention')` with
            its options; the channels follow from the neck. Another module must have its
            `attend((B, N, C, H, W)) -> (B, C, H, W), dict of (B, N)`. None: the target alone, D
            must be 3.
        attention_location: 'rpn', on each level of the pyramid before the RPN, with weights of its
            own; or 'rcnn' (Table 2e), on RoI features after RoIAlign, one for boxes and one for
            masks, the RPN seeing the target alone.
        pretrained: dict(checkpoint=..., parts=[...]): where training starts from a detector that
            was trained on other data, the file and which of its parts are copied (the paper:
            feature extractor and RPN). Without a checkpoint the backbone's `init_cfg` counts.

    Raises:
        ValueError: no `num_slices`, or one that does not fit; options out of their range.
    """


@MODELS.register_module()
class SliceGroupFasterRCNN(SliceGroups, FasterRCNN):
    __doc__ = "Faster R-CNN on the middle image of a CT stack (section 3.3)." + (
        _ARGUMENTS.format(parent="FasterRCNN")
    )


@MODELS.register_module()
class SliceGroupMaskRCNN(SliceGroups, MaskRCNN):
    __doc__ = "Mask R-CNN on the middle image of a CT stack (Fig. 2)." + (
        _ARGUMENTS.format(parent="MaskRCNN")
    )


class PyramidAttention(nn.Module):
    """One attention a level of the pyramid.

    Args:
        levels: their number.
        attention: config of each.

    Attributes:
        entropies: of the last batch in training, a dict a level: {'channel': ..., 'spatial': ...}.
    """

    def __init__(self, levels: int, attention: dict) -> None:
        super().__init__()
        self.levels = nn.ModuleList(MODELS.build(dict(attention)) for _ in range(levels))
        self.entropies: list[dict[str, Tensor]] = []

    def forward(self, bags: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, N, C, H_i, W_i), a level each -> (B, C, H_i, W_i)."""
        attended = [level.attend(bag) for level, bag in zip(self.levels, bags, strict=True)]
        if self.training:
            self.entropies = [entropies_of(attention) for _, attention in attended]
        return tuple(maps for maps, _ in attended)


@MODELS.register_module()
class TargetRPNHead(InferenceRPNHead):
    """mmdet's RPN on the middle one of several images whose maps come one after the other.

    Takes (B, N C, H, W), C being `in_channels`.
    """

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        def target(level: Tensor) -> Tensor:
            middle = level.shape[1] // self.in_channels // 2
            return level.narrow(1, middle * self.in_channels, self.in_channels)

        return super().forward(tuple(target(level) for level in x))


@MODELS.register_module()
class BagRoIExtractor(SingleRoIExtractor):
    """mmdet's RoIAlign of the same regions in N images, then attention between these.

    Args:
        out_channels: C, what comes out.
        num_images: N; maps are (B, N C, H, W).
        attention: config of the attention.
        others: of mmdet's `SingleRoIExtractor`.

    Attributes:
        entropies: of the last batch in training that had regions: {'channel': ..., ...}.
    """

    def __init__(self, out_channels: int, num_images: int, attention: dict, **others) -> None:
        # mmdet's class allocates as many channels as it pools.
        super().__init__(out_channels=num_images * out_channels, **others)
        self.bag_shape = (num_images, out_channels)
        self.attention = MODELS.build(dict(attention))
        self.entropies: dict[str, Tensor] = {}

    def forward(
        self, feats: tuple[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """(B, N C, H_i, W_i), a level each, and (R, 5) regions -> (R, C, s, s)."""
        attended, attention = self.attend(feats, rois, roi_scale_factor)
        if self.training:
            self.entropies = entropies_of(attention) if len(rois) else {}
        return attended

    def attend(
        self, feats: tuple[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward`, and the (R, N) attention of each part."""
        pooled = super().forward(feats, rois, roi_scale_factor)
        return self.attention.attend(pooled.unflatten(1, self.bag_shape))


def entropies_of(attention: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: entropy(weights.detach()) for name, weights in attention.items()}


def _replaced(path: str, part: dict, expected: str, kind: str, **options) -> dict:
    """A part of mmdet's as the one here that takes a bag."""
    if part.get("type") != expected:
        raise ValueError(
            f"{path}.type={part.get('type')}: with attention_location='rcnn' it must be "
            f"{expected}, which becomes {kind}"
        )
    return {**part, "type": kind, **options}
