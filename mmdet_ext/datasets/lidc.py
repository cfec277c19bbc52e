"""LIDCDataset: the nodules of tools/prepare_data.py --lidc for segmentation and classification."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.dataset import Compose
from mmengine.logging import print_log
from torch.utils.data import Dataset

from ct_volumes.lidc_samples import INDEX, SPLITS, crop_path, read_crop, read_samples
from deeplesion.errors import DataError
from mmdet_ext.datasets.sampler import SampleKey, index_and_key, run_pipeline

CLASSES = {
    "segmentation": ("background", "nodule"),
    "classification": ("benign", "malignant"),
}
UNDECIDED = 3  # of 1 to 5: below it is benign, above it malignant


@DATASETS.register_module()
class LIDCDataset(Dataset):
    """Nodules of LIDC-IDRI (or a phantom's), a cube of 58 mm about each.

    The pipeline gets `volume` (1, 58, 58, 58) int16 HU, and of a segmentation `labels` of the same
    shape, uint8 0 and 1, of a classification `label`, 1 if it is malignant; with them `name`,
    `patient`, `index` and `img_path`.

    Args:
        data_root: folder that tools/prepare_data.py --lidc wrote.
        task: 'segmentation', of all nodules, or 'classification', of those rated 1, 2 or 4, 5.
        split: 'train' or 'test'.
        pipeline: see `volume_transforms`.

    Raises:
        ValueError: another task or split.
        MissingDataError, DataError: the data is not there or not as it should be; no nodule for
            this task and split.
    """

    def __init__(
        self, data_root: str, task: str, split: str, pipeline: Sequence[dict] = ()
    ) -> None:
        if task not in CLASSES:
            raise ValueError(f"task must be one of {', '.join(CLASSES)}, got {task!r}")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.root, self.task = Path(data_root), task
        self.ann_file = str(self.root / INDEX)
        info, samples = read_samples(self.root)
        self.size = info["size"]
        self.samples = [
            s for s in samples if s.split == split and (task == "segmentation" or s.is_rated)
        ]
        if not self.samples:
            raise DataError(
                f"{self.ann_file} has no nodules for {task} in {split}: prepare more of the scans"
            )
        if info["leaking_patients"]:
            print_log(
                f"{self.ann_file} is split by {info['split_by']}: {info['leaking_patients']} "
                "patients of the data set are in training and in test, so scores come out too high",
                "current",
                logging.WARNING,
            )
        self.metainfo = dict(
            classes=CLASSES[task],
            masks=info["masks"] if task == "segmentation" else None,
            split_by=info["split_by"],
        )
        self.pipeline = Compose([TRANSFORMS.build(step) for step in pipeline])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | SampleKey) -> dict:
        """A `SampleKey` fixes what is drawn. Raises MissingDataError or DataError for a crop that
        is gone or damaged."""
        index, key = index_and_key(index)
        sample = self.samples[index]
        hu, mask = read_crop(self.root, sample.name, self.size)
        results = dict(
            volume=hu[None],
            name=sample.name,
            patient=sample.patient,
            index=index,
            img_path=str(crop_path(self.root, sample.name)),
        )
        if self.task == "segmentation":
            results["labels"] = mask[None].view("uint8")
        else:
            results["label"] = int(sample.malignancy > UNDECIDED)
        return run_pipeline(self.pipeline, results, key)
