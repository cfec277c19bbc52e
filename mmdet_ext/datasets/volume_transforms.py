"""What training and testing do to a volume and its labels, by MONAI's transforms: crops, turns,
flips and the HU window.

A sample is a dict with `volume` (1, D, H, W) and, of a segmentation, `labels` (1, D, H, W) uint8.
What is drawn comes from numpy's global generator, which the data set seeds for each sample
(`mmdet_ext.random_states.seeded`). MONAI, the extra `[volumes]`, is imported when one is built.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmengine.structures import BaseDataElement

from ct_volumes.optional import need
from deeplesion.errors import DataError

KEYS = ("volume", "labels")
META_KEYS = ("img_path", "index", "name", "patient")


class MonaiTransform(BaseTransform):
    """MONAI's dictionary transforms, one after the other, on `volume` and on `labels`, if there are
    any; a subclass lists them."""

    def __init__(self) -> None:
        need("crops and augmentation of volumes need", "monai", extra="volumes")
        from monai.transforms import Compose, Randomizable

        steps = self.transforms()
        self.steps = Compose(steps)
        self.draws = any(isinstance(step, Randomizable) for step in steps)

    def transforms(self) -> list:
        """Of MONAI, with `allow_missing_keys`."""
        raise NotImplementedError

    def transform(self, results: dict) -> dict:
        if self.draws:  # each of MONAI's transforms from a generator of its own
            seed = np.random.randint(2**32, dtype=np.uint32)  # noqa: NPY002
            self.steps.set_random_state(seed=int(seed))
        moved = self.steps({key: results[key] for key in KEYS if key in results})
        plain = {
            key: torch.as_tensor(value).as_subclass(torch.Tensor) for key, value in moved.items()
        }
        return {**results, **plain}


@TRANSFORMS.register_module()
class CropVolume(MonaiTransform):
    """A box about the middle of the volume.

    Args:
        size: voxels, one number or (D, H, W).
        shift: voxels that the box is moved by, drawn from -shift to shift along each axis; the
            volume must be as much larger to both sides.
    """

    def __init__(self, size: int | Sequence[int], shift: int = 0) -> None:
        sizes = (size,) * 3 if isinstance(size, int) else tuple(size)
        if len(sizes) != 3 or min(sizes) < 1 or shift < 0:
            raise ValueError(f"size must be 1 or more and shift 0 or more, got {size} and {shift}")
        self.size, self.shift = sizes, shift
        super().__init__()

    def transforms(self) -> list:
        from monai.transforms import CenterSpatialCropd, RandSpatialCropd

        around = tuple(size + 2 * self.shift for size in self.size)
        steps = [CenterSpatialCropd(KEYS, around, allow_missing_keys=True)]
        if self.shift:
            steps.append(
                RandSpatialCropd(KEYS, self.size, random_size=False, allow_missing_keys=True)
            )
        return steps

    def transform(self, results: dict) -> dict:
        """Raises DataError if the volume is too small, which MONAI would pass over."""
        shape = results["volume"].shape[1:]
        if any(have < size + 2 * self.shift for have, size in zip(shape, self.size, strict=True)):
            name = results.get("img_path", "a volume")
            raise DataError(
                f"{name}: {tuple(shape)} voxels are too few for a crop of {self.size} that moves "
                f"by {self.shift}. Set size and shift of CropVolume in the pipeline"
            )
        return super().transform(results)


@TRANSFORMS.register_module()
class RandomQuarterTurns(MonaiTransform):
    """Turns a cube by 0 to 3 quarters about each axis in turn, then flips one of its axes or none,
    each with the same chance (the ACS paper's "random-axis rotation and flipping", as coded)."""

    def transforms(self) -> list:
        from monai.transforms import RandAxisFlipd, RandRotate90d

        options = dict(prob=0.75, allow_missing_keys=True)  # three in four; none is the fourth
        turns = [
            RandRotate90d(KEYS, max_k=3, spatial_axes=axes, **options)
            for axes in ((0, 1), (0, 2), (1, 2))
        ]
        return [*turns, RandAxisFlipd(KEYS, **options)]


@TRANSFORMS.register_module()
class WindowHU(MonaiTransform):
    """`low` to `high` HU, and what lies beyond, to the numbers of `to`; float32."""

    def __init__(self, low: float, high: float, to: Sequence[float] = (0, 1)) -> None:
        if not low < high or len(to) != 2:
            raise ValueError(f"low < high and two numbers `to`, got {low}, {high} and {to}")
        self.low, self.high, self.to = low, high, tuple(to)
        super().__init__()

    def transforms(self) -> list:
        from monai.transforms import ScaleIntensityRanged

        # MONAI subtracts before it converts: whole numbers would overflow in a volume of int16.
        low, high = float(self.low), float(self.high)
        return [ScaleIntensityRanged("volume", low, high, *self.to, clip=True, dtype=np.float32)]


@TRANSFORMS.register_module()
class PackVolume(BaseTransform):
    """`inputs` (1, D, H, W) float32, and `data_samples` with `labels` (D, H, W) uint8 of a
    segmentation or `label` of a classification."""

    def transform(self, results: dict) -> dict:
        sample = BaseDataElement(metainfo={k: results[k] for k in META_KEYS if k in results})
        if "labels" in results:
            sample.labels = torch.as_tensor(results["labels"])[0].to(torch.uint8).contiguous()
        if "label" in results:
            sample.label = torch.tensor(results["label"])
        inputs = torch.as_tensor(results["volume"]).to(torch.float32).contiguous()
        return dict(inputs=inputs, data_samples=sample)
