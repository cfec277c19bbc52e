"""Pretrained weights, from a file or fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from deeplesion.errors import MissingDataError
from mmdet_ext.checkpoint import UnreachableError, download, load_checkpoint_file

WITHOUT = "To train without pretrained weights: --cfg-options model.backbone.init_cfg=None"


def fetch_weights(source: str, published: str = "densenet121-a639ec97.pth") -> dict[str, Tensor]:
    """Loads a state dict from a file or URL, as data only (no pickled code runs).

    `published` is the name of torchvision's file that is meant, for messages.

    Raises MissingDataError or UnreachableError with what to do instead.
    """
    if not re.match(r"https?://", source):
        if not Path(source).is_file():
            raise MissingDataError(
                f"model.backbone.init_cfg.checkpoint={source}: no such file. Give the path of "
                f"torchvision's {published}. {WITHOUT}"
            )
        return load_checkpoint_file(source)
    try:
        return load_checkpoint_file(download(source))
    except UnreachableError as error:
        raise UnreachableError(f"{error}. {WITHOUT}") from None
