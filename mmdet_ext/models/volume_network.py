"""VolumeNetwork: what a segmentor and a classifier of volumes share. A 2D network becomes one for
volumes, and begins with random weights, ImageNet's, or those of a 2D training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmdet_ext.checkpoint import CheckpointError, download, load_checkpoint_file
from mmdet_ext.convert import convert_to_3d
from mmdet_ext.ops import SliceConv

OWN = "network."  # what the weights of a training begin with
NOT_OF_THIS_NETWORK = (
    "model.pretrained={path} does not hold the weights of the 2D {network}: {reason}. Give the "
    "checkpoint of a 2D training of the same network"
)
OR_IMAGENET = ", or torchvision's ImageNet file of its backbone"


class VolumeNetwork(BaseModel):
    """A 2D network, or what `convert_to_3d` makes of it, in mmengine's runner.

    Args:
        network: of 2D, with a last layer `head`.
        fusion: the operator that its convolutions become, as `convert_to_3d(depth='isotropic')`
            takes it; None for images.
        pretrained: checkpoint of a training without `fusion`, of which all is transferred but the
            `head`, BatchNorm's statistics included. Or, of a network with `load_imagenet`, path or
            address of torchvision's file, which gives what that method takes of it.
        init: how convolutions begin without `pretrained`: as in 'torch', or 'kaiming': uniform, by
            the fan-in of the kernels as they are, in 3D of all their taps.
        data_preprocessor: of mmengine.

    Raises:
        ValueError: an `init` that is neither.
    """

    def __init__(
        self,
        network: dict,
        fusion: dict | None = None,
        pretrained: str | None = None,
        init: str = "torch",
        data_preprocessor: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        if init not in ("torch", "kaiming"):
            raise ValueError(f"init must be 'torch' or 'kaiming', got {init!r}")
        self.network_2d, self.fusion = dict(network), dict(fusion) if fusion else None
        self.pretrained, self.init = pretrained, init
        self.network = self.converted(MODELS.build(self.network_2d))

    def converted(self, network: nn.Module) -> nn.Module:
        if self.fusion is None:
            return network
        return convert_to_3d(network, self.fusion, depth="isotropic")

    def init_weights(self) -> None:
        """Called by the runner when a training begins.

        Raises:
            MissingDataError: there is no file `pretrained`.
            CheckpointError: it holds other weights, or cannot be fetched.
        """
        if self.pretrained:
            network = MODELS.build(self.network_2d)
            load_all_but_head(network, self.pretrained)
            self.network.load_state_dict(self.converted(network).state_dict())
        elif self.init == "kaiming":
            for module in self.network.modules():
                if isinstance(module, (nn.Conv2d, SliceConv)):
                    nn.init.kaiming_uniform_(module.weight)

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Of B tensors (C, H, W) or (C, D, H, W) what the network returns of them together."""
        return self.network(torch.stack(tuple(inputs)))


def load_all_but_head(network: nn.Module, source: str) -> None:
    """Gives a 2D network the weights that it was trained to without `fusion`, all but those of its
    `head`, or, if it has `load_imagenet`, those of ImageNet. Raises MissingDataError or
    CheckpointError."""
    path = download(source) if re.match(r"https?://", source) else Path(source)
    checkpoint = load_checkpoint_file(path)
    state = checkpoint.get("state_dict", checkpoint)
    takes_imagenet = hasattr(network, "load_imagenet")
    if takes_imagenet and not any(str(name).startswith(OWN) for name in state):
        network.load_imagenet(path)
        return
    weights = {
        name.removeprefix(OWN): weight
        for name, weight in state.items()
        if name.startswith(OWN) and not name.startswith(f"{OWN}head.")
    }
    own = {name: w for name, w in network.state_dict().items() if not name.startswith("head.")}
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        reason = f"{len(wrong)} of its names or shapes differ, such as {wrong[0]}"
        text = NOT_OF_THIS_NETWORK + (OR_IMAGENET if takes_imagenet else "")
        raise CheckpointError(
            text.format(path=source, network=type(network).__name__, reason=reason)
        )
    network.load_state_dict(weights, strict=False)
