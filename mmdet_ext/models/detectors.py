"""KeySliceMaskRCNN: mmdet's Mask R-CNN on the key slice of a CT volume, by a 3D backbone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from mmdet.models.detectors import MaskRCNN
from mmdet.registry import MODELS
from torch import Tensor, nn

from mmdet_ext.models import assigner  # noqa: F401 registers it
from mmdet_ext.models.densenet import TruncatedDenseNet3D
from mmdet_ext.models.inference import hooked, takes_pieces
from mmdet_ext.models.neck import KeySliceNeck
from mmdet_ext.models.preprocessor import CTDataPreprocessor
from mmdet_ext.models.roi_align import use_inference_roi_align
from mmdet_ext.models.rpn import faster_rpn
from mmdet_ext.models.shared_slices import SharedSlices, shared_maps, shares_slices
from mmdet_ext.models.tta import ViewsTTA  # noqa: F401 it is registered
from mmdet_ext.ops import OPERATORS

# A default would be silently wrong for a config that was read without `stack`.
NO_NUM_SLICES = (
    "the detector needs num_slices. Read an experiment by mmdet_ext.config.experiment."
    "read_experiment(path), which writes its stack to all parts; mmengine's Config.fromfile does "
    "not"
)


class KeySliceDetector:
    """What detectors on the key slice of a CT volume share, before mmdet's class in the order of
    inheritance: the 3D backbone and a 3D-to-2D neck instead of 2D ones.

    Args:
        num_slices: D, which the backbone gets (an operator that takes it, the channels of 2.5D) and
            the neck. Where the preprocessor has several windows the backbone gets their number.
        backbone, neck, others: of mmdet's class.

    Raises:
        ValueError: no `num_slices`; a part, or in `extract_feat` a volume, has another number of
            slices; the neck is for other maps than the backbone's.
    """

    def __init__(self, backbone: dict, neck: dict, num_slices: int | None = None, **others) -> None:
        if num_slices is None:
            raise ValueError(NO_NUM_SLICES)
        backbone, neck, depth = dict(backbone), dict(neck), num_slices
        windows = num_windows(others.get("data_preprocessor"))
        if windows > 1 or "windows" in backbone:
            source = "data_preprocessor.windows"
            set_once("backbone.windows", backbone, "windows", windows, source)
        if backbone.get("slices_as_channels"):
            set_once("backbone.in_channels", backbone, "in_channels", num_slices)
            depth = 1
        if takes_num_slices(fusion := dict(backbone.get("fusion") or {})):
            set_once("backbone.fusion.num_slices", fusion, "num_slices", num_slices)
            backbone["fusion"] = fusion
        set_once("neck.num_slices", neck, "num_slices", depth)
        super().__init__(backbone=backbone, neck=neck, **others)
        made = getattr(self.backbone, "out_channels", None)  # which one of mmdet's does not say
        known = isinstance(made, (list, tuple)) and isinstance(self.neck, KeySliceNeck)
        if known and tuple(made) != self.neck.in_channels:
            raise ValueError(
                f"neck.in_channels={self.neck.in_channels}, but the backbone's maps have "
                f"{tuple(made)} channels: both must be the same"
            )
        self.num_slices = num_slices

    @property
    def shares_slices(self) -> bool:
        """Whether `extract_feat` takes `SharedSlices`; what derives from a detector may not, so
        each says it of itself."""
        return False

    def inputs_of(self, slices: Tensor, stacks: Tensor, thickness: Tensor) -> tuple[Tensor, ...]:
        """What `extract_feat` takes, and so `predict`, of stacks that have slices in common; the
        arguments are `SharedSlices`'."""
        batch = SharedSlices(slices, stacks, thickness)
        return batch if self.shares_slices else batch.volumes()

    def extract_feat(
        self, batch_inputs: tuple[Tensor, Tensor] | SharedSlices
    ) -> tuple[Tensor, ...]:
        """((B, windows, D, H, W) images, (B,) thickness in mm) -> the neck's (B, C, H_i, W_i).

        At inference also of `SharedSlices`, where `shares_slices`: the same, faster.
        """
        shared = isinstance(batch_inputs, SharedSlices)
        if shared and (torch.is_grad_enabled() or not self.shares_slices):
            return self.extract_feat(batch_inputs.volumes())
        depth = batch_inputs.stacks.shape[1] if shared else batch_inputs[0].shape[2]
        if depth != self.num_slices:
            raise ValueError(
                f"the detector was built for num_slices={self.num_slices}, the volume has "
                f"{depth} slices: load stacks of {self.num_slices}, or set the "
                f"experiment's stack.num_slices to {depth}"
            )
        on_cpu = batch_inputs[0].device.type == "cpu"
        if torch.is_grad_enabled() or not (shared or on_cpu):
            return self.neck(self.backbone(*batch_inputs))
        # On a CPU stack by stack: less memory, and a little faster than several at once.
        by_one = on_cpu and takes_pieces(self)
        at_once = 1 if by_one else len(batch_inputs.stacks if shared else batch_inputs[0])
        if shared:
            groups = shared_maps(self.backbone, batch_inputs, at_once)
        else:
            parts = zip(*(each.split(at_once) for each in batch_inputs))
            make = self.backbone.maps if gives_maps(self.backbone) else self.backbone
            groups = (make(*part) for part in parts)
        # The neck is done with each map before the backbone makes the next, which saves memory;
        # one that is not ours may index them.
        handed = iter if takes_one_by_one(self.neck) else tuple
        found = [self.neck(handed(maps)) for maps in groups]
        return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found)))


@MODELS.register_module()
class KeySliceMaskRCNN(KeySliceDetector, MaskRCNN):
    """Mask R-CNN on the key slice of a CT volume (AlignShift, section 2.3, Fig. 3).

    The 3D backbone and the 3D-to-2D neck make one 2D map; RPN, box head and mask head are mmdet's
    own. Only `extract_feat` differs.

    Args:
        backbone, neck, num_slices: of `KeySliceDetector`.
        rpn_head, others: of mmdet's `MaskRCNN`.

    Raises ValueError as `KeySliceDetector` does.
    """

    def __init__(
        self, backbone: dict, neck: dict, rpn_head: dict, num_slices: int | None = None, **others
    ) -> None:
        super().__init__(backbone, neck, num_slices, rpn_head=faster_rpn(rpn_head), **others)
        self.neck.any_layout = use_inference_roi_align(self)

    @property
    def shares_slices(self) -> bool:
        return type(self) is KeySliceMaskRCNN and shares_slices(self.backbone)


def gives_maps(backbone: nn.Module) -> bool:
    """Whether `backbone.maps` gives what a call of the backbone does."""
    forward = getattr(backbone.forward, "__func__", None)
    return forward is TruncatedDenseNet3D.forward and not hooked(backbone)


def takes_one_by_one(neck: nn.Module) -> bool:
    """Whether maps may be handed to a neck by a generator."""
    return getattr(neck.forward, "one_by_one", False) and not hooked(neck)


def takes_num_slices(fusion: dict) -> bool:
    """Whether an operator's constructor has `num_slices`, as A3D's."""
    # One that is not there is refused when it is built.
    operator = OPERATORS.get(fusion.get("type"))
    classes = operator.__mro__ if operator else ()
    return any(
        "num_slices" in inspect.signature(c.__init__).parameters for c in classes if c is not object
    )


def num_windows(preprocessor: Mapping | CTDataPreprocessor | None) -> int:
    """Of how many HU windows the images are that a preprocessor, or its config, makes."""
    if isinstance(preprocessor, Mapping):
        return len(preprocessor.get("windows") or (None,))
    return len(getattr(preprocessor, "windows", (None,)))


def set_once(path: str, part: dict, name: str, value: int, source: str = "num_slices") -> None:
    """Sets an option of a part; one that is there already must be the same."""
    if part.setdefault(name, value) != value:
        needed = "stack" if source == "num_slices" else source
        raise ValueError(
            f"{path}={part[name]}, but the detector's {needed} needs {value}: leave it out, it "
            f"follows from {source}"
        )
