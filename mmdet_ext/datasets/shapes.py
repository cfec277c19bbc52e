"""ShapesDataset: the synthetic shapes of `ct_volumes.shapes` for the runner."""

from __future__ import annotations

import torch
from mmdet.registry import DATASETS
from mmengine.structures import BaseDataElement
from torch.utils.data import Dataset

from ct_volumes.shapes import SIZE, ShapeSet
from mmdet_ext.datasets.sampler import SampleKey, index_and_key


@DATASETS.register_module()
class ShapesDataset(Dataset):
    """Images (axes=2) or volumes (axes=3) of shapes, made when they are asked for.

    A sample: `inputs`, float32 (1, size, ...), and `data_samples` with `labels`, uint8 (size, ...),
    and `img_path`, which names the sample in messages: there is no such file.

    Args:
        axes, count, split, seed, size: as in `ShapeSet`.
    """

    def __init__(
        self, axes: int, count: int, split: str = "train", seed: int = 0, size: int = SIZE
    ) -> None:
        self.samples = ShapeSet(axes, count, split, seed, size)
        self.metainfo = dict(classes=self.samples.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | SampleKey) -> dict:
        index, _ = index_and_key(index)
        image, labels = self.samples[index]
        named = self.samples
        name = f"shapes_{named.axes}d/seed_{named.seed}/{named.split}/{index}"
        sample = BaseDataElement(
            metainfo=dict(img_path=name, index=index), labels=torch.from_numpy(labels)
        )
        return dict(inputs=torch.from_numpy(image)[None], data_samples=sample)
