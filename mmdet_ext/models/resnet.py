"""TorchvisionResNet: mmdet's ResNet that starts from torchvision's ImageNet file, read as data only
and checked key by key."""

from __future__ import annotations

from mmcv.ops import DeformConv2d
from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ext.models.pretrained import check_init, fetch_weights, load_published

PUBLISHED = {
    18: "resnet18-f37072fd.pth",
    34: "resnet34-b627a593.pth",
    50: "resnet50-0676ba61.pth",
    101: "resnet101-63fe2227.pth",
    152: "resnet152-394f9c45.pth",
}
MOST_IMAGES = 32  # that mmcv's deformable convolution takes apart at once


@MODELS.register_module()
class TorchvisionResNet(ResNet):
    """mmdet's `ResNet`; names and shapes of its weights are torchvision's.

    mmengine's own loading would unpickle any file, and logs weights that do not fit without
    stopping. Deformable convolutions begin as plain ones, with the file's kernels and offsets of
    zero (Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.1).

    Args:
        depth: 18, 34, 50, 101 or 152.
        init_cfg: `dict(type='Pretrained', checkpoint=URL or file)` loads torchvision's ResNet of
            that depth; None starts from random weights.
        others: of mmdet's `ResNet`.

    Raises:
        ValueError: another `init_cfg`.
        CheckpointError: weights whose keys or shapes do not fit.
    """

    def __init__(self, depth: int, init_cfg: dict | None = None, **others) -> None:
        check_init(type(self).__name__, init_cfg)
        super().__init__(depth, init_cfg=init_cfg, **others)
        self._deformable = tuple(m for m in self.modules() if isinstance(m, DeformConv2d))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> a map a stage, at strides 4, 8, 16 and 32."""
        if self._deformable:
            # mmcv's kernel wants batches that it can divide into equal parts of so many images.
            images = max(n for n in range(1, MOST_IMAGES + 1) if len(x) % n == 0)
            for convolution in self._deformable:
                convolution.im2col_step = images
        return super().forward(x)

    def init_weights(self) -> None:
        if self.is_init:
            return
        # Given an init_cfg, mmdet fills it in only where there is none.
        if isinstance(self.init_cfg, dict) and self.init_cfg.get("type") == "Pretrained":
            source = self.init_cfg["checkpoint"]
            report = self.load_imagenet(fetch_weights(source, PUBLISHED[self.depth]))
            print_log(f"{type(self).__name__}: {source}: {report}", logger="current")
            self._is_init = True
        else:
            super().init_weights()
            # That draws the offsets' weights at random, too.
            for convolution in self._deformable:
                if hasattr(convolution, "conv_offset"):
                    nn.init.zeros_(convolution.conv_offset.weight)
                    nn.init.zeros_(convolution.conv_offset.bias)

    def load_imagenet(self, weights: dict[str, Tensor]) -> str:
        """Loads torchvision's ImageNet weights; its classifier `fc` is left out.

        Returns a line saying what was and what was not loaded. Raises CheckpointError for missing
        and unexpected keys, and shapes that do not fit.
        """
        offsets = [key for key in self.state_dict() if ".conv_offset." in f".{key}"]
        return load_published(self, weights, r"fc\.", PUBLISHED[self.depth], offsets)
