"""DeepLesionDataset: the COCO files of tools/prepare_data.py as an mmdet dataset."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.registry import DATA_SAMPLERS, DATASETS
from mmengine.dataset import DefaultSampler
from mmengine.logging import print_log

from deeplesion.random_states import seeded

# Files count pixel centres, mmdet pixel edges. Added here, taken off in metric.py.
PIXEL_CENTRE = 0.5

NO_DATA = (
    "{path} does not exist. Point DEEPLESION_ROOT at DeepLesion and run `python "
    "tools/prepare_data.py $DEEPLESION_ROOT` first (the README says how to get the data from NIH), "
    "or make a synthetic one: `python tools/make_phantom.py data/phantom`, then prepare that."
)


class SampleKey(NamedTuple):
    """What a training sample's augmentation is a function of."""

    seed: int
    epoch: int
    index: int


@DATA_SAMPLERS.register_module()
class EpochSampler(DefaultSampler):
    """mmengine's DefaultSampler that hands every sample its `SampleKey`.

    Augmentation then depends on (seed, epoch, sample) alone: not on the worker that happens to
    draw it, and it differs between epochs, in each of which mmengine seeds its workers alike.
    """

    # How many of this process' samples are left out: an epoch resumed in its middle goes on here.
    start = 0

    def __iter__(self) -> Iterator[SampleKey]:
        for index in itertools.islice(super().__iter__(), self.start, None):
            yield SampleKey(self.seed, self.epoch, index)


@DATASETS.register_module()
class DeepLesionDataset(CocoDataset):
    """DeepLesion key slices (or a phantom's) with lesion boxes, masks and RECIST diameters.

    Takes what mmdet's `CocoDataset` takes. Beyond its fields a sample carries `file_name`,
    `file_thickness_mm`, `slice_range`, `spacing_mm`, `patient`, `study`, `series` and `lesions`:
    the annotations as the file has them (pixel-centre coordinates), for evaluation.

    Args:
        cache: folder, maybe below `data_root`, that `tools/prepare_data.py --cache` wrote; where it
            is there, slices are read from it instead of from their PNGs.

    Raises:
        FileNotFoundError: the annotation file is missing, with how to get or make the data.
        ValueError: it has no images, or a box without extent.
    """

    METAINFO: ClassVar = {"classes": ("lesion",), "palette": [(220, 20, 60)]}

    def __init__(self, *args, cache: str | None = None, **kwargs) -> None:
        self.cache = cache
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict]:
        if not Path(self.ann_file).is_file():
            raise FileNotFoundError(NO_DATA.format(path=self.ann_file))
        samples = super().load_data_list()
        if not samples:
            raise ValueError(
                f"{self.ann_file} holds no key slices. A partial download may have none of this "
                "split: tools/prepare_data.py says which splits it found."
            )
        print_log(f"{self.ann_file}: slices come from {self.cache or 'PNGs'}", "current")
        return samples

    def _join_prefix(self) -> None:
        super()._join_prefix()
        if self.cache:
            folder = Path(self.data_root or "", self.cache)
            self.cache = str(folder) if folder.is_dir() else None

    def parse_data_info(self, raw_data_info: dict) -> dict:
        image, annotations = raw_data_info["raw_img_info"], raw_data_info["raw_ann_info"]
        prefix = self.data_prefix["img"]
        thickness = image["thickness_mm"]
        lesions = [self._lesion(image, annotation) for annotation in annotations]
        return dict(
            img_id=image["id"],
            img_prefix=prefix,
            cache_prefix=self.cache,
            file_name=image["file_name"],
            img_path=str(Path(prefix) / image["file_name"]),
            height=image["height"],
            width=image["width"],
            file_thickness_mm=math.nan if thickness is None else float(thickness),
            spacing_mm=image["spacing_mm"],
            slice_range=tuple(image["slice_range"]),
            patient=image["patient"],
            study=image["study"],
            series=image["series"],
            lesions=lesions,
            instances=[
                dict(
                    bbox=[v + PIXEL_CENTRE for v in lesion["bbox"]],
                    bbox_label=0,
                    mask=lesion["mask"],
                    ignore_flag=0,
                )
                for lesion in lesions
            ],
        )

    def _lesion(self, image: dict, annotation: dict) -> dict:
        x, y, width, height = annotation["bbox"]
        if width <= 0 or height <= 0:
            raise ValueError(
                f"{self.ann_file}: annotation {annotation['id']} of {image['file_name']} has a box "
                f"without extent, bbox={annotation['bbox']}. Run tools/prepare_data.py again."
            )
        return dict(
            bbox=[x, y, x + width, y + height],
            mask=annotation["segmentation"],
            recist=annotation.get("recist"),
            diameters_mm=annotation.get("diameters_mm"),
            lesion_type=annotation.get("lesion_type", -1),
        )

    def prepare_data(self, idx: int | SampleKey) -> dict:
        """Runs the pipeline on one sample; a `SampleKey` fixes its augmentation."""
        key = idx if isinstance(idx, SampleKey) else None
        sample = self.get_data_info(key.index if key else idx)
        if key:
            sample["augmentation_key"] = key
        if sample["lesions"] and all(lesion["recist"] for lesion in sample["lesions"]):
            recist = np.array([lesion["recist"] for lesion in sample["lesions"]], np.float64)
            sample["gt_recist"] = recist.reshape(-1, 4, 2) + PIXEL_CENTRE
        if key is None:
            return self.pipeline(sample)
        with seeded(key):  # for transforms that draw from the global generators, as mmdet's do
            return self.pipeline(sample)
