"""KeySliceDINO: mmdet's DINO on the key slice of a CT volume, and the neck that gives it maps of
several strides."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from mmdet.models.detectors import DINO
from mmdet.models.necks import ChannelMapper
from mmdet.registry import MODELS
from torch import Tensor

from deeplesion.errors import UserError
from mmdet_ext.models.detectors import KeySliceDetector
from mmdet_ext.models.neck import FINEST_STRIDE, KeySliceNeck, one_by_one
from mmdet_ext.models.shared_slices import shares_slices


@MODELS.register_module()
class KeySliceLevels(KeySliceNeck):
    """3D-to-2D neck for heads on several levels: squeezed maps, then mmdet's `ChannelMapper`.

    Args:
        in_channels: channels of the backbone's maps, finest first, strides 4, 8, 16.
        first_level: the first map that is used; 1 leaves out stride 4.
        num_outs: levels; those beyond the backbone's come from its last map by 3 x 3 convolutions
            of stride 2.
        out_channels, norm_cfg: of `ChannelMapper`, with 1 x 1 convolutions and no activation.
        num_slices, attention: of `KeySliceNeck`.

    Raises:
        ValueError: no map is left, or there are more of them than `num_outs`.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (256, 512, 1024),
        num_slices: int = 3,
        first_level: int = 1,
        num_outs: int = 3,
        out_channels: int = 256,
        norm_cfg: dict | None = None,
        attention: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        levels = range(len(in_channels))[first_level:]
        if first_level < 0 or not 0 < len(levels) <= num_outs:
            raise ValueError(
                f"first_level={first_level} leaves {len(levels)} of {len(in_channels)} maps for "
                f"num_outs={num_outs} levels: it must be at least 1, and no more than num_outs"
            )
        used = [in_channels[level] for level in levels]
        strides = [FINEST_STRIDE << level for level in levels]
        super().__init__(used, num_slices, strides, attention, init_cfg)
        self.in_channels, self.first_level = tuple(in_channels), first_level
        self.mapper = ChannelMapper(
            used,
            out_channels,
            kernel_size=1,
            norm_cfg=norm_cfg,
            act_cfg=None,
            num_outs=num_outs,
        )

    @one_by_one
    def forward(self, features: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """(B, C_i, D, H_i, W_i) maps, finest first -> (B, out_channels, H_j, W_j) a level.

        Raises ValueError for another number of maps, and maps of another depth than `num_slices`.
        """
        maps = self.of_each(self._squeeze, features)
        levels = self.mapper([y for y in maps if y is not None])
        # DINO flattens maps by a view of NCHW memory.
        return tuple(y.contiguous() for y in levels)

    def _squeeze(self, level: int, x: Tensor) -> Tensor | None:
        used = level - self.first_level
        return self.reduce(x, used) if used >= 0 else None


@MODELS.register_module()
class KeySliceDINO(KeySliceDetector, DINO):
    """DINO (Zhang et al., ICLR 2023) on the key slice of a CT volume.

    The 3D backbone and `KeySliceLevels` make 2D maps; transformer and head are mmdet's own. It
    finds boxes without anchors, proposals and NMS, and has no masks.

    Args:
        backbone, neck, num_slices: of `KeySliceDetector`.
        encoder, decoder, bbox_head, dn_cfg, others: of mmdet's `DINO`.

    Raises ValueError as `KeySliceDetector` does, and UserError for images with fewer places on all
    levels than there are queries.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        encoder: dict,
        decoder: dict,
        bbox_head: dict,
        dn_cfg: dict,
        num_slices: int | None = None,
        **others,
    ) -> None:
        # mmdet writes into these dicts, and refuses what it wrote when it is built again.
        own = dict(encoder=encoder, decoder=decoder, bbox_head=bbox_head, dn_cfg=dn_cfg)
        super().__init__(backbone, neck, num_slices, **copy.deepcopy(own), **others)

    @property
    def shares_slices(self) -> bool:
        return type(self) is KeySliceDINO and shares_slices(self.backbone)

    def pre_decoder(self, memory: Tensor, *args, **kwargs) -> tuple[dict, dict]:
        """mmdet's, which takes the `num_queries` best of (B, places, C)."""
        if memory.shape[1] < self.num_queries:
            raise UserError(
                f"num_queries={self.num_queries}, but the maps of an image have {memory.shape[1]} "
                "places together: larger images (resize.size) or fewer queries"
            )
        return super().pre_decoder(memory, *args, **kwargs)
