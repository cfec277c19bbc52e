"""LiTSDataset: the slices and instances of tools/prepare_data.py --lits as an mmdet dataset."""

from __future__ import annotations

from typing import ClassVar

import torch
from mmdet.registry import DATASETS

from ct_volumes.lits_samples import CLASSES, read_samples
from mmdet_ext.datasets.deeplesion import DeepLesionDataset


@DATASETS.register_module()
class LiTSDataset(DeepLesionDataset):
    """Slices of LiTS (or a phantom's) with instances of liver and lesions.

    Takes what `DeepLesionDataset` takes. The stack must not resample slices again: they are
    `step_mm` apart already, which is what `stack.target_mm` should say. A sample's `patient` is the
    number of the case and its `slice_range` all slices of that.

    Args:
        background_step, liver_step: in training, of the slices without liver, and of those with
            liver and no lesion, every so-manieth is learnt from. In testing every slice counts.

    Raises:
        ValueError: `stack.target_mm` is not the files' distance of slices; a step below 1. Others
            as `DeepLesionDataset`.
    """

    METAINFO: ClassVar = {"classes": CLASSES, "palette": [(178, 34, 34), (34, 139, 34)]}
    NO_DATA: ClassVar = (
        "{path} does not exist. Run `python tools/prepare_data.py FOLDER --lits --out $LITS_ROOT` "
        "first, FOLDER with LiTS's volume-N.nii and segmentation-N.nii, and point LITS_ROOT at "
        "it. To make a synthetic LiTS: `python tools/make_phantom.py --lits FOLDER`."
    )

    def __init__(self, *args, background_step: int = 1, liver_step: int = 1, **kwargs) -> None:
        if min(background_step, liver_step) < 1:
            raise ValueError(
                f"background_step={background_step} and liver_step={liver_step} must be at least 1"
            )
        self.steps = background_step, liver_step, 1  # of slices with neither, liver, and lesions
        super().__init__(*args, **kwargs)

    def _load_file(self) -> list[dict]:
        samples = super()._load_file()
        if self.test_mode:
            return samples
        seen, kept = [0, 0, 0], []
        for sample in samples:
            labels = (instance["bbox_label"] for instance in sample["instances"])
            kind = max(labels, default=-1) + 1
            if seen[kind] % self.steps[kind] == 0:
                kept.append(sample)
            seen[kind] += 1
        self._reported = torch.zeros(len(kept), dtype=torch.bool).share_memory_()
        return kept

    def _read_file(self) -> dict:
        content = read_samples(self.ann_file, need_instances=not self.test_mode)
        info = content["info"]
        step, target = info["step_mm"], self.stack.get("target_mm", 2.0)
        if target != step:
            raise ValueError(
                f"{self.ann_file} holds slices {step} mm apart, and stack.target_mm is {target}: "
                f"set it to {step}, or prepare the data anew"
            )
        # For the metric, which scores on the grid of the files that the slices were made of.
        self._metainfo["lits"] = dict(folder=info["lits"], step_mm=step)
        return content

    def parse_data_info(self, raw_data_info: dict) -> dict:
        sample = super().parse_data_info(raw_data_info)
        annotations = raw_data_info["raw_ann_info"]
        for instance, annotation in zip(sample["instances"], annotations, strict=True):
            instance["bbox_label"] = self.cat2label[annotation["category_id"]]
        # What result files of detection would carry along; none is written of these.
        return {**sample, "lesions": []}
