"""Segmentation of whole volumes by windows that slide over them, with MONAI (extra `[volumes]`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from mmdet.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor

from deeplesion.errors import UserError, install
from mmdet_ext.models.segmentors import VolumeSegmentor
from mmdet_ext.models.volume_network import finite

NO_MONAI = f"sliding windows need monai: {install('volumes')}"


def slide(
    network: Callable[[Tensor], Tensor],
    volume: Tensor,
    window: Sequence[int],
    step: Sequence[int],
    batch: int = 1,
) -> Tensor:
    """Each voxel's mean over all windows that hold it of the probabilities that `network` gives.

    A window begins every `step` voxels, the last one where it ends with the volume. A volume that
    is smaller than a window is padded with 0 to both sides.

    Args:
        network: (B, C, *window) -> logits (B, classes, *window).
        volume: (C, D, H, W).
        window, step: (depth, height, width) in voxels.
        batch: windows at once.

    Returns:
        (classes, D, H, W).
    """
    from monai.inferers import sliding_window_inference

    # MONAI takes the overlap as a fraction and cuts the step off to whole voxels: half a voxel
    # more, and that is the step whatever the fraction's rounding.
    overlap = [max(0.0, 1 - (s + 0.5) / w) for s, w in zip(step, window, strict=True)]
    probabilities = sliding_window_inference(
        volume[None], tuple(window), batch, lambda x: network(x).softmax(1), overlap
    )
    return probabilities[0]


@MODELS.register_module()
class SlidingWindowSegmentor(VolumeSegmentor):
    """A `VolumeSegmentor` that learns from crops and predicts whole volumes by `slide`.

    Args:
        test_cfg: `window`, `step` and `batch` of `slide`. They may be others than in training.
        options: of `VolumeSegmentor`.

    Raises:
        UserError: MONAI is not installed.
        ValueError: a step that is not within 1 and its window, or other than three of each; other
            options in `test_cfg`.
    """

    def __init__(self, *, test_cfg: dict, **options) -> None:
        super().__init__(**options)
        if find_spec("monai") is None:
            raise UserError(NO_MONAI)
        given = dict(test_cfg)
        window, step = given.pop("window", ()), given.pop("step", ())
        batch = given.pop("batch", 1)
        if given:
            raise ValueError(f"test_cfg takes window, step and batch, got also {', '.join(given)}")
        if len(window) != 3 or len(step) != 3 or batch < 1:
            raise ValueError(
                "test_cfg takes window and step, (depth, height, width) each, and batch from 1 on, "
                f"got {window}, {step} and {batch}"
            )
        if any(not 1 <= s <= w for s, w in zip(step, window)):
            raise ValueError(f"step must be from 1 to window={tuple(window)}, got {tuple(step)}")
        self.window, self.step, self.batch = tuple(window), tuple(step), batch

    def add_predictions(self, inputs: Sequence[Tensor], samples: Sequence[BaseDataElement]) -> None:
        """As a `VolumeSegmentor`'s; volumes (1, D, H, W) may differ in size."""
        for volume, sample in zip(inputs, samples, strict=True):
            found = finite(slide(self.network, volume, self.window, self.step, self.batch))
            # Slice by slice: whole, the numbers of the classes would take 8 bytes a voxel.
            slices = [p.argmax(0).to(torch.uint8) for p in found.unbind(1)]
            sample.prediction = torch.stack(slices)
