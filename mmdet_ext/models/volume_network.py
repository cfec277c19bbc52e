"""VolumeNetwork: what a segmentor and a classifier of volumes share. A 2D network becomes one for
volumes, and begins with random weights, ImageNet's, or those of a 2D training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from deeplesion.errors import UserError
from mmdet_ext.checkpoint import CheckpointError, download, load_checkpoint_file
from mmdet_ext.convert import convert_to_3d
from mmdet_ext.ops import SliceConv

NOT_OF_THIS_NETWORK = (
    "model.pretrained={path} does not hold the weights of the 2D {network}: {reason}. Give the "
    "checkpoint of a 2D training of the same network"
)


class VolumeNetwork(BaseModel):
    """A 2D network, or what `convert_to_3d` makes of it, in mmengine's runner. A task gives it
    `losses` and `add_predictions`.

    Args:
        network: of 2D, with a last layer `head`.
        fusion: the operator that its convolutions become, as `convert_to_3d(depth='isotropic')`
            takes it; None for images.
        pretrained: checkpoint of a training without `fusion`, or a file of torchvision's (path or
            URL) that the network's `load_published` takes. All of it is transferred but the `head`,
            BatchNorm's statistics included.
        transfer: 'network', or 'encoder': of `pretrained` the network's `encoder` alone.
        init: how convolutions begin without `pretrained`: as in 'torch', or 'kaiming': uniform, by
            the fan-in of the kernels as they are, in 3D of all their taps.
        data_preprocessor: of mmengine.

    Raises:
        ValueError: an `init` or a `transfer` that is neither; 'encoder' of a network without one.
    """

    def __init__(
        self,
        network: dict,
        fusion: dict | None = None,
        pretrained: str | None = None,
        init: str = "torch",
        data_preprocessor: dict | None = None,
        transfer: str = "network",
    ) -> None:
        super().__init__(data_preprocessor)
        if init not in ("torch", "kaiming"):
            raise ValueError(f"init must be 'torch' or 'kaiming', got {init!r}")
        if transfer not in ("network", "encoder"):
            raise ValueError(f"transfer must be 'network' or 'encoder', got {transfer!r}")
        self.encoder_only = transfer == "encoder"
        self.network_2d, self.fusion = dict(network), dict(fusion) if fusion else None
        self.pretrained, self.init = pretrained, init
        built = MODELS.build(self.network_2d)
        if self.encoder_only and not hasattr(built, "encoder"):
            raise ValueError(f"transfer='encoder': a {type(built).__name__} has no `encoder`")
        self.network = self.converted(built)

    def converted(self, network: nn.Module) -> nn.Module:
        if self.fusion is None:
            return network
        channels = getattr(network, "in_channels", 1)
        return convert_to_3d(network, self.fusion, in_channels=channels, depth="isotropic")

    def init_weights(self) -> None:
        """Called by the runner when a training begins.

        Raises:
            MissingDataError: there is no file `pretrained`.
            CheckpointError: it holds other weights, or cannot be fetched.
        """
        if self.pretrained:
            network = MODELS.build(self.network_2d)
            load_all_but_head(network, self.pretrained, self.encoder_only)
            self.network.load_state_dict(self.converted(network).state_dict())
        elif self.init == "kaiming":
            for module in self.network.modules():
                if isinstance(module, (nn.Conv2d, SliceConv)):
                    nn.init.kaiming_uniform_(module.weight)

    def forward(
        self,
        inputs: Sequence[Tensor],
        data_samples: Sequence[BaseDataElement] | None = None,
        mode: str = "tensor",
    ) -> dict[str, Tensor] | list[BaseDataElement] | Tensor:
        """Of B tensors (1, H, W) or (1, D, H, W): with 'tensor' the logits, with 'loss' what
        `losses` makes of them, with 'predict' the samples that `add_predictions` has filled."""
        if mode not in ("tensor", "loss", "predict"):
            raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")
        if mode == "predict":
            self.add_predictions(inputs, data_samples)
            return list(data_samples)
        # Stacked with the channel last in memory, which makes inference on a CPU faster. Of one
        # channel `contiguous` would leave the strides as they are.
        stacked = torch.stack([sample.movedim(0, -1) for sample in inputs]).movedim(-1, 1)
        logits = self.network(stacked)
        return self.losses(logits, data_samples) if mode == "loss" else logits

    def losses(self, logits: Tensor, samples: Sequence[BaseDataElement]) -> dict[str, Tensor]:
        raise NotImplementedError

    def add_predictions(self, inputs: Sequence[Tensor], samples: Sequence[BaseDataElement]) -> None:
        raise NotImplementedError


def finite(outputs: Tensor) -> Tensor:
    """The same. Raises UserError if there is a NaN or an infinity, of which argmax makes a class
    like any other."""
    if not outputs.sum(dtype=torch.float32).isfinite():
        raise UserError(
            "the network gives NaN or infinity: the weights are those of a training that went wrong"
        )
    return outputs


def load_all_but_head(network: nn.Module, path: str, encoder_only: bool = False) -> None:
    """Gives a 2D network the weights of its training without `fusion`, or
    those that torchvision published: all but those of its `head`, or those of its `encoder` alone.
    Raises MissingDataError, UnreachableError or CheckpointError."""
    checkpoint = load_checkpoint_file(download(path) if "://" in path else Path(path))
    state = checkpoint.get("state_dict", checkpoint)
    ours = [name for name in state if name.startswith("network.")]
    if not ours and hasattr(network, "load_published"):
        try:
            report = network.load_published(state, encoder_only)
        except CheckpointError as error:
            raise CheckpointError(f"model.pretrained={path}: {error}") from None
        print_log(f"{type(network).__name__}: {path}: {report}", logger="current")
        return
    part = "encoder." if encoder_only else ""
    weights = {name.removeprefix("network."): state[name] for name in ours}
    weights, own = (
        {name: w for name, w in of.items() if name.startswith(part) and name[:5] != "head."}
        for of in (weights, network.state_dict())
    )
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        reason = f"{len(wrong)} of its names or shapes differ, such as {wrong[0]}"
        raise CheckpointError(
            NOT_OF_THIS_NETWORK.format(path=path, network=type(network).__name__, reason=reason)
        )
    network.load_state_dict(weights, strict=False)
