"""TruncatedDenseNet3D: the DenseNet-121 of the papers, cut after its third dense block, its
convolutions inside the dense blocks replaced by a context-fusion operator chosen by config."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdet_ext.checkpoint import CheckpointError
from mmdet_ext.models.inference import (
    conv_norm_relu,
    empty_map,
    frozen_statistics,
    hooked,
    in_pieces,
    in_strips,
    norm_relu,
)
from mmdet_ext.models.pretrained import check_init, densenet_name, fetch_weights, first_of
from mmdet_ext.ops import SliceConv, build_conv3d, fold, unfold

STEMS = ("middle", "sum", "tile")


class DenseLayer(nn.Module):
    """BN-ReLU-1x1-BN-ReLU-3x3 (DenseNet-B); adds `growth` channels to its input's."""

    def __init__(self, channels: int, growth: int, bn_size: int, fusion: dict, with_cp: bool):
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = build_conv3d(fusion, channels, bn_size * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm3d(bn_size * growth)
        self.conv2 = build_conv3d(fusion, bn_size * growth, growth, 3, padding=1, bias=False)
        self.with_cp = with_cp

    def bottleneck(self, features: list[Tensor], thickness: Tensor) -> Tensor:
        x = norm_relu(self.norm1, torch.cat(features, dim=1) if len(features) > 1 else features[0])
        return conv_norm_relu(self.conv1, self.norm2, x, thickness, inplace=True)

    def forward(self, features: list[Tensor], thickness: Tensor) -> Tensor:
        """(B, C_i, D, H, W) maps that make up `channels`, and (B,) mm -> (B, growth, D, H, W)."""
        if self.with_cp and torch.is_grad_enabled():
            # The concatenation and the wide norm1 output are what fills the memory: they are
            # computed again in the backward pass.
            options = {}
            # Compiled code counts a batch once by itself, and cannot have contexts.
            if not torch.compiler.is_compiling():
                options["context_fn"] = lambda: (contextlib.nullcontext(), frozen_statistics(self))
            y = checkpoint(self.bottleneck, features, thickness, use_reentrant=False, **options)
        else:
            y = self.bottleneck(features, thickness)
        return self.conv2(y, thickness)

    def infer(self, x: Tensor, thickness: Tensor) -> Tensor:
        """`forward` of all input channels in one map, where autograd does not record."""
        if not (self.conv1.runs_on_strips and self.conv2.runs_on_strips):
            return self.conv2(self.bottleneck([x], thickness), thickness, inplace=True)

        def strip(x: Tensor) -> Tensor:
            return self.conv2.fuse_(self.bottleneck([x], thickness), thickness)

        return self.conv2.convolve_affine(in_strips(self, strip, x), thickness)


class DenseBlock(nn.Module):
    """Layers that each see the outputs of all before them."""

    def __init__(self, num_layers: int, channels: int, growth: int, **layer) -> None:
        super().__init__()
        self.growth = growth
        for i in range(num_layers):
            self.add_module(
                f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth, **layer)
            )

    def forward(self, x: Tensor, thickness: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.infer(x, thickness)
        features = [x]
        for layer in self.children():
            # A new list each time: checkpointing reads the one it was given again, later.
            features = [*features, layer(features, thickness)]
        return torch.cat(features, dim=1)

    def infer(self, x: Tensor, thickness: Tensor) -> Tensor:
        """Every layer reads what is there of the output and writes its own part: no copies."""
        batch, channels, *size = x.shape
        out = empty_map(x, (batch, channels + len(self._modules) * self.growth, *size))
        out[:, :channels] = x
        for layer in self.children():
            seen = out[:, :channels]
            # A hook on a layer sees calls only.
            y = layer([seen], thickness) if hooked(layer) else layer.infer(seen, thickness)
            out[:, channels : channels + self.growth] = y
            channels += self.growth
        return out


class Transition(nn.Module):
    """BN-ReLU-1x1 without fusion, then 2x2 average pooling in-plane."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(in_channels)
        self.conv = SliceConv(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return in_strips(self, self.whole, x)

    def whole(self, x: Tensor) -> Tensor:
        x = self.conv(norm_relu(self.norm, x))
        return unfold(F.avg_pool2d(fold(x), 2), len(x))


@MODELS.register_module()
class TruncatedDenseNet3D(BaseModule):
    """DenseNet-121 up to the third dense block, as a 3D network (AlignShift, section 2.3, Table 1;
    A3D, section 2.3).

    Every 1x1 and 3x3 convolution inside the dense blocks is `fusion`; stem and transitions are
    plain per-slice convolutions. Depth never shrinks.

    With `slices_as_channels` it is the papers' 2.5D network: the D slices of a volume are the
    input channels of the 2D network, and the maps have a depth of 1.

    Args:
        fusion: config of the operator, e.g. `dict(type='AlignShiftConv', n_fold=8)`; of a 2.5D
            network `dict(type='SliceConv')`.
        in_channels: channels of the volume, 1 for CT; of a 2.5D network D.
        stem: how the three kernels of an RGB stem become those of `in_channels`: 'middle' keeps
            the green one (the released DeepLesion models), 'sum' adds the three, 'tile' repeats
            them, cut to `in_channels` about their middle and not rescaled (2.5D).
        slices_as_channels: 2.5D.
        windows: in how many HU windows each slice comes, as channels. The kernels of a pretrained
            stem are shared out: each window gets its slice's over `windows`.
        growth, bn_size, block_config, stem_channels: of the DenseNet; the defaults are
            DenseNet-121's.
        with_cp: checkpoint the first half of each dense layer: less memory, more time.
        init_cfg: `dict(type='Pretrained', checkpoint=URL or file)` loads torchvision's
            DenseNet-121; None starts from random weights.

    Raises:
        ValueError: options out of range; in `forward`, a volume of another shape, thickness NaN
            or <= 0.
        CheckpointError: weights whose keys or shapes do not fit.
    """

    def __init__(
        self,
        fusion: dict,
        in_channels: int = 1,
        stem: str = "middle",
        slices_as_channels: bool = False,
        growth: int = 32,
        bn_size: int = 4,
        block_config: Sequence[int] = (6, 12, 24),
        stem_channels: int = 64,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        windows: int = 1,
    ) -> None:
        super().__init__(init_cfg)
        check_init(type(self).__name__, init_cfg)
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if windows < 1:
            raise ValueError(f"windows must be at least 1, got {windows}")
        if fusion.get("depth", "keep") != "keep":
            raise ValueError(
                f"fusion.depth={fusion['depth']!r}: the maps keep their depth, leave it out"
            )
        if slices_as_channels and fusion.get("type") != "SliceConv":
            raise ValueError(
                f"fusion.type={fusion.get('type')} has no slices to fuse with "
                "slices_as_channels=True, where maps have a depth of 1: it must be SliceConv"
            )
        self.in_channels = in_channels
        self.stem = stem
        self.slices_as_channels = slices_as_channels
        self.windows = windows
        channels = in_channels * windows
        self.conv0 = SliceConv(channels, stem_channels, 7, stride=2, padding=3, bias=False)
        self.norm0 = nn.BatchNorm3d(stem_channels)
        self.out_channels: list[int] = []
        channels = stem_channels
        for i, num_layers in enumerate(block_config, start=1):
            if i > 1:
                self.add_module(f"transition{i - 1}", Transition(channels, channels // 2))
                channels //= 2
            block = DenseBlock(
                num_layers, channels, growth, bn_size=bn_size, fusion=fusion, with_cp=with_cp
            )
            self.add_module(f"denseblock{i}", block)
            channels += num_layers * growth
            self.out_channels.append(channels)
        convolutions = [module for module in self.modules() if isinstance(module, SliceConv)]
        if fusion.get("type") != "SliceConv" and not any(conv.fuses for conv in convolutions):
            raise ValueError(
                f"no convolution sees another slice with fusion={fusion}: n_fold must not be above "
                "every layer's channels"
            )
        for module in convolutions:
            shape = (module.out_channels, module.in_channels // module.groups)
            weight = torch.empty(*shape, *module.kernel_size)
            module.load_weight2d(nn.init.kaiming_normal_(weight))

    def forward(self, images: Tensor, thickness: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, C, D, H, W) windowed HU and (B,) mm -> one map a dense block, (B, C_i, D, H_i, W_i)
        at strides 4, 8 and 16."""
        return tuple(self.maps(images, thickness))

    def maps(self, images: Tensor, thickness: Tensor | None = None) -> Iterator[Tensor]:
        """The maps of `forward` one after the other, for a caller that keeps none of them."""
        channels, as_channels = self.in_channels * self.windows, self.slices_as_channels
        sizes = (self.windows, self.in_channels) if as_channels else (channels,)
        if images.ndim != 5 or tuple(images.shape[1 : 1 + len(sizes)]) != sizes:
            expected = ", ".join(["B", *map(str, sizes), *"DHW"[len(sizes) - 1 :]])
            raise ValueError(f"expected a volume of shape ({expected}), got {tuple(images.shape)}")
        if self.slices_as_channels:  # slice after slice, each in its windows
            images = images.transpose(1, 2).flatten(1, 2).unsqueeze(2)
        yield from self.stages(in_pieces(self, self.root, images, dim=2, length=1), thickness)

    def stages(self, x: Tensor, thickness: Tensor | None = None) -> Iterator[Tensor]:
        """What `maps` makes of the output of `root`."""
        for i in range(1, len(self.out_channels) + 1):
            if i > 1:
                x = getattr(self, f"transition{i - 1}")(x)
            x = getattr(self, f"denseblock{i}")(x, thickness)
            yield x

    def root(self, images: Tensor) -> Tensor:
        """Stem and pooling: (B, C, D, H, W) -> (B, stem_channels, D, H / 4, W / 4)."""
        x = fold(conv_norm_relu(self.conv0, self.norm0, images))
        # From here on every tensor stays in channels-last memory: depth folds by a view, and the
        # 2D kernels run in the layout they are fastest in.
        x = x.contiguous(memory_format=torch.channels_last)
        return unfold(F.max_pool2d(x, 3, stride=2, padding=1), len(images))

    def init_weights(self) -> None:
        if self.init_cfg is None or self.is_init:
            return
        source = self.init_cfg["checkpoint"]
        report = self.load_imagenet(fetch_weights(source))
        print_log(f"{type(self).__name__}: {source}: {report}", logger="current")
        self._is_init = True

    def load_imagenet(self, weights: dict[str, Tensor]) -> str:
        """Loads torchvision's DenseNet-121 ImageNet weights, in either spelling of their keys
        (`norm.1` of the published file, `norm1`).

        Returns a line saying what was and what was not loaded. Raises CheckpointError for missing
        keys, unexpected keys beyond the cut-off part, and shapes that do not fit.
        """
        own = self.state_dict()
        loaded, cut, unexpected = {}, [], []
        for key, value in weights.items():
            name = densenet_name(key.removeprefix("features."))
            if name in own:
                loaded[name] = self._stem(value) if name == "conv0.weight" else value
            elif key.startswith("classifier.") or re.match(
                r"(transition3|denseblock4|norm5)\.", name
            ):
                cut.append(key)
            else:
                unexpected.append(key)
        # Files older than PyTorch 0.4 lack the batch counters; operators bring parameters and
        # modules of their own, which keep their initial values.
        own_only = {k for k in own if k.endswith("num_batches_tracked")}
        for path, module in self.named_modules():
            if isinstance(module, SliceConv):
                keys = {f"{path}.{key}" for key in module.state_dict()}
                own_only |= keys - {f"{path}.weight"}
        missing = [k for k in own if k not in loaded and k not in own_only]
        problems = [f"missing {k}" for k in missing] + [f"unexpected {k}" for k in unexpected]
        for key, value in loaded.items():
            shape = own[key].shape
            shape = shape[:2] + shape[-2:] if len(shape) == 5 else shape  # I3D inflates
            if value.shape != shape:
                problems.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        if problems:
            raise CheckpointError(
                f"these are not DenseNet-121 weights for this network "
                f"({first_of(problems)}). Pretrained weights need growth=32, "
                "block_config=(6, 12, 24); init_cfg=None trains without them."
            )
        self.load_state_dict(loaded, strict=False)
        kept = [k for k in own if k not in loaded and not k.endswith("num_batches_tracked")]
        names = Counter(k.rpartition(".")[2] for k in kept)
        report = (
            f"{len(loaded)} tensors loaded; {len(cut)} not used (beyond the third dense block); "
            f"{len(kept)} keep their initial values"
        )
        return report + (f" ({', '.join(f'{n} {k}' for k, n in names.items())})" if kept else "")

    def _stem(self, weight: Tensor) -> Tensor:
        """(64, 3, 7, 7) RGB kernels -> (64, in_channels * windows, 7, 7)."""
        return self._stem_of_one_window(weight).repeat_interleave(self.windows, 1) / self.windows

    def _stem_of_one_window(self, weight: Tensor) -> Tensor:
        if weight.shape[1] == self.in_channels:
            return weight
        if self.stem == "middle":
            return weight[:, 1:2]
        if self.stem == "sum":
            return weight.sum(1, keepdim=True)
        tiled = weight.repeat(1, math.ceil(self.in_channels / 3), 1, 1)
        start = (tiled.shape[1] - self.in_channels) // 2
        return tiled[:, start : start + self.in_channels]
