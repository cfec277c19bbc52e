"""DeepLesionDataset: the COCO files of tools/prepare_data.py as an mmdet dataset."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.logging import print_log

from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.data.annotation_check import is_ignored
from deeplesion.data.coco import (
    encode_mask,
    image_folders,
    lesion_of,
    mask_kind,
    read_annotations,
    table_key_slices,
)
from deeplesion.data.locate import ANNOTATIONS
from deeplesion.data.slices import SliceFolder, plan_stack
from deeplesion.errors import CacheError, DataError, MissingDataError
from mmdet_ext.datasets.sampler import SampleKey, index_and_key, run_pipeline

# So many bad samples one after another are no accident.
MOST_REPLACED = 10

NO_DATA = (
    "{path} does not exist. Point DEEPLESION_ROOT at DeepLesion and run `python "
    "tools/prepare_data.py $DEEPLESION_ROOT{options}` first (the README says how to get the data "
    "from NIH; if it was prepared with --out DIR, DEEPLESION_ROOT is DIR), "
    "or make a synthetic one: `python tools/make_phantom.py data/phantom`, then prepare that."
)


@DATASETS.register_module()
class DeepLesionDataset(CocoDataset):
    """DeepLesion key slices (or a phantom's) with lesion boxes, masks and RECIST diameters.

    Takes what mmdet's `CocoDataset` takes. Beyond its fields a sample carries `file_name`,
    `file_thickness_mm`, `slice_range`, `spacing_mm`, `patient`, `study`, `series` and `lesions`:
    the annotations as the file has them (pixel-centre coordinates), for evaluation. Annotations of
    training with `iscrowd` 1 are no lesions but regions to ignore (`ignore_flag`).

    Args:
        ann_file: an annotation file, or for training a list of them whose key slices are taken
            together, such as those of train and val.
        stack: which slices around a key slice are looked at, what `load_slices` takes: `num_slices`
            (D, odd), `policy`, `target_mm`, `interpolation`.
        cache: folder, maybe below `data_root`, that `tools/prepare_data.py --cache` wrote; where it
            is there, slices are read from it instead of from their PNGs.
        on_bad_slice: what a slice that is missing, damaged or of the wrong size does in training:
            'stop' ends the run; 'skip' logs the sample once and replaces it by another.

    Raises:
        MissingDataError: the annotation file is missing, with how to get or make the data.
        DataError: it is not as `read_annotations` wants it, or, of training, has no lesions; a key
            slice is in two files.
        ValueError: a `stack` that is missing or out of its range; an `on_bad_slice` that is
            neither, or 'skip' in testing; several annotation files in testing, or none.
    """

    METAINFO: ClassVar = {"classes": ("lesion",), "palette": [(220, 20, 60)]}
    NO_DATA: ClassVar = NO_DATA

    def __init__(
        self,
        *args,
        stack: Mapping | None = None,
        cache: str | None = None,
        on_bad_slice: str = "stop",
        **kwargs,
    ) -> None:
        self.stack = dict(stack or {})
        if "num_slices" not in self.stack:
            raise ValueError(
                "DeepLesionDataset needs stack=dict(num_slices=...). Read an experiment by "
                "mmdet_ext.config.experiment.read_experiment(path), which writes its stack to all "
                "parts; mmengine's Config.fromfile does not"
            )
        try:  # refuses a bad option before the first sample
            plan_stack(0, None, (0, 0), **self.stack)
        except (TypeError, ValueError) as error:
            raise ValueError(f"stack={self.stack}: {error}") from None
        if on_bad_slice not in ("stop", "skip"):
            raise ValueError(f"on_bad_slice must be 'stop' or 'skip', got {on_bad_slice!r}")
        if on_bad_slice == "skip" and kwargs.get("test_mode"):
            raise ValueError("on_bad_slice='skip' is for training: a test is of all its images")
        self.cache = cache
        self.on_bad_slice = on_bad_slice
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict]:
        if not isinstance(self.ann_file, (list, tuple)):
            return self._load_file()
        files, samples, kinds, regions = self.ann_file, [], [], 0
        try:
            for self.ann_file in files:
                samples += self._load_file()
                kinds.append(self._metainfo["masks"])
                regions += self._metainfo["ignored_regions"]
        finally:
            self.ann_file = files
        names = Counter(sample["file_name"] for sample in samples)
        if twice := [name for name, number in names.items() if number > 1]:
            raise DataError(
                f"{' and '.join(files)} share {len(twice)} key slices, such as {twice[0]}: a key "
                "slice is learnt from once"
            )
        for i, sample in enumerate(samples, 1):  # each file counts from 1
            sample["img_id"] = i
        with_lesions = [sample["img_id"] for sample in samples if sample["instances"]]
        self.cat_img_map = {self.cat_ids[0]: with_lesions}  # what a filter_cfg looks at
        self._metainfo["table_key_slices"] = None  # of a test set
        self._metainfo["ignored_regions"] = regions
        self._metainfo["masks"] = " and ".join(dict.fromkeys(kinds)) if all(kinds) else None
        self._reported = torch.zeros(len(samples), dtype=torch.bool).share_memory_()
        return samples

    def _load_file(self) -> list[dict]:
        if not Path(self.ann_file).is_file():
            released = Path(self.ann_file).parent.name == ANNOTATIONS["released"]
            options = " --masks released" if released else ""
            raise MissingDataError(self.NO_DATA.format(path=self.ann_file, options=options))
        content = self._read_file()
        self._check_use(content)
        folders = image_folders(content, self.data_root or "", self.data_prefix["img"])
        self._slices = SliceFolder(*folders)
        # For the metric: a table of a part of the test set says so.
        self._metainfo["table_key_slices"] = table_key_slices(content)
        # Whether the detector must leave regions out, and how many there are.
        self._metainfo["ignored_regions"] = sum(map(is_ignored, content["annotations"]))
        # How the masks were drawn, for the run card.
        self._metainfo["masks"] = mask_kind(content)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints that it indexes
            samples = super().load_data_list()
        # Which were logged as bad; workers share it.
        self._reported = torch.zeros(len(samples), dtype=torch.bool).share_memory_()
        print_log(f"{self.ann_file}: slices come from {self.cache or 'PNGs'}", "current")
        return samples

    def _read_file(self) -> dict:
        training = not self.test_mode
        return read_annotations(self.ann_file, need_lesions=training, regions=training)

    def _check_use(self, content: dict) -> None:
        """Says at the start what the annotations lack for what is going to be done with them."""
        without = sum(
            not (annotation.get("segmentation") or is_ignored(annotation))
            for annotation in content["annotations"]
        )
        steps = getattr(self.pipeline, "transforms", ())
        if without and any(getattr(step, "with_mask", False) for step in steps):
            raise DataError(
                f"{self.ann_file}: {without} of {len(content['annotations'])} annotations have no"
                " mask, which this config's mask head learns from. Train on boxes alone"
                " (model.roi_head.mask_head=None, and with_mask=False in LoadAnnotations of the"
                " training pipeline), or draw masks with tools/prepare_data.py"
            )
        if not content["annotations"]:
            print_log(
                f"{self.ann_file} holds no lesions: false positives are reported, sensitivity is"
                " undefined, and no checkpoint can be chosen as the best by it",
                "current",
                logging.WARNING,
            )

    def _join_prefix(self) -> None:
        files = self.ann_file
        if isinstance(files, (list, tuple)):
            if self.test_mode or not files:
                raise ValueError(
                    f"ann_file={files}: several files are for training, of which there must be one "
                    "at least"
                )
            joined = [str(Path(self.data_root or "", file)) for file in files]
            self.ann_file = ""  # mmengine joins one
            super()._join_prefix()
            self.ann_file = joined
        else:
            super()._join_prefix()
        if self.cache:
            folder = Path(self.data_root or "", self.cache)
            self.cache = str(folder) if folder.is_dir() else None

    def parse_data_info(self, raw_data_info: dict) -> dict:
        image, annotations = raw_data_info["raw_img_info"], raw_data_info["raw_ann_info"]
        prefix = str(self._slices.root_of(image["file_name"]))
        thickness = image.get("thickness_mm")
        found = [lesion_of(annotation, image) for annotation in annotations]
        ignored = [is_ignored(annotation) for annotation in annotations]
        return dict(
            img_id=image["id"],
            img_prefix=prefix,
            cache_prefix=self.cache,
            file_name=image["file_name"],
            img_path=str(Path(prefix) / image["file_name"]),
            height=image["height"],
            width=image["width"],
            file_thickness_mm=math.nan if thickness is None else float(thickness),
            # Unknown in the files of others: None.
            spacing_mm=image.get("spacing_mm"),
            slice_range=tuple(image["slice_range"]) if image.get("slice_range") else None,
            patient=image.get("patient"),
            study=image.get("study"),
            series=image.get("series"),
            lesions=[each for each, crowd in zip(found, ignored) if not crowd],
            instances=[
                dict(
                    bbox=[v + PIXEL_CENTRE for v in each["bbox"]],
                    bbox_label=0,
                    # Of a region to ignore no mask is learnt, but mmdet loads one for each box.
                    mask=each["mask"] or (filled(each["bbox"], image) if crowd else None),
                    ignore_flag=int(crowd),
                    recist=each["recist"],
                )
                for each, crowd in zip(found, ignored)
            ],
        )

    def prepare_data(self, idx: int | SampleKey) -> dict:
        """Runs the pipeline on one sample; a `SampleKey` fixes its augmentation.

        With `on_bad_slice='skip'` a sample that cannot be read is replaced by another, which is a
        function of `idx` too.
        """
        index, key = index_and_key(idx)
        first = index
        for replaced in itertools.count(1):
            try:
                return self._run_pipeline(index, key)
            except CacheError:
                raise  # the data is sound: write the cache anew
            except DataError as error:
                if self.on_bad_slice == "stop":
                    raise
                if replaced == MOST_REPLACED:
                    raise DataError(f"{replaced} bad samples in a row, the last: {error}") from None
                self._report(index, error)
            index = int(np.random.default_rng((*(key or (first,)), replaced)).integers(len(self)))

    def _run_pipeline(self, index: int, key: SampleKey | None) -> dict:
        sample = self.get_data_info(index)
        sample["stack"] = self.stack
        if key:
            sample["augmentation_key"] = key
        recist = [instance["recist"] for instance in sample["instances"]]
        if any(recist):
            ends = np.array([each or [math.nan] * 8 for each in recist], np.float64)
            sample["gt_recist"] = ends.reshape(-1, 4, 2) + PIXEL_CENTRE
        return run_pipeline(self.pipeline, sample, key)

    def _report(self, index: int, error: DataError) -> None:
        """Logs a bad sample the first time that one of this process' workers meets it."""
        if self._reported[index]:
            return
        self._reported[index] = True
        print_log(
            f"{error}. Replaced in training by another sample, as on_bad_slice='skip' says: "
            f"{int(self._reported.sum())} of {len(self)} key slices so far",
            "current",
            logging.ERROR,  # what processes other than the first show
        )


def filled(bbox: Sequence[float], image: dict) -> dict:
    """A mask of all pixels in a box of pixel centres."""
    mask = np.zeros((image["height"], image["width"]), bool)
    x1, y1, x2, y2 = (max(round(v), 0) for v in bbox)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return encode_mask(mask)
