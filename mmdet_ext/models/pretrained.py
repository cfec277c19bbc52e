"""Pretrained weights, from a file or fetched once."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from mmdet_ext.checkpoint import download, load_checkpoint_file


def fetch_weights(source: str) -> dict[str, Tensor]:
    """Loads a state dict from a file or URL, as data only (no pickled code runs).

    Raises FileNotFoundError or ConnectionError with what to do instead.
    """
    if not re.match(r"https?://", source):
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"init_cfg.checkpoint={source}: no such file. Give the path of torchvision's "
                "densenet121-a639ec97.pth, or train without it: "
                "--cfg-options model.backbone.init_cfg=None"
            )
        return load_checkpoint_file(source)
    try:
        file = download(source)
    except (URLError, OSError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / source.rsplit("/", 1)[-1]
        raise ConnectionError(
            f"could not fetch the ImageNet weights {source} ({error}). On a machine with network "
            f"fetch that file and put it at {file} (or set model.backbone.init_cfg.checkpoint to "
            "its path). To train without pretrained weights: "
            "--cfg-options model.backbone.init_cfg=None"
        ) from None
    return load_checkpoint_file(file)
