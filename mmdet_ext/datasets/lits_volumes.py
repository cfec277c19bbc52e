"""LiTSVolumes: whole cases of LiTS for segmentation, and what training draws of them. MONAI, the
extra `[volumes]`, resamples, turns and flips."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.dataset import Compose
from mmengine.logging import print_log
from torch.utils.data import Dataset

from ct_volumes.optional import module, need
from deeplesion.errors import DataError, UserError
from mmdet_ext.datasets.sampler import SampleKey, index_and_key, run_pipeline
from mmdet_ext.datasets.volume_transforms import KEYS, MonaiTransform

CLASSES = ("background", "liver", "lesion")
AIR = {"volume": -1024, "labels": 0}  # beyond the scan
SPLITS = ("train", "val")


@DATASETS.register_module()
class LiTSVolumes(Dataset):
    """The cases of LiTS (or a phantom's), straight from its NIfTI files.

    The pipeline gets `volume` (1, S, H, W) int16 HU and `labels` (1, S, H, W) uint8, 0, 1 liver, 2
    lesion, in training perhaps mapped from a file: to be read, not written to. With them come
    `name`, `patient` (the number of the case), `index` and `img_path`.

    Args:
        data_root: folder of volume-N.nii and segmentation-N.nii.
        split: 'train' or 'val', as `ct_volumes.lits.split` says.
        pipeline: see `volume_transforms`.
        cache: folder for arrays of the cases (`ct_volumes.lits_arrays`), or None.
        test_mode: leave out the labels; the metric reads them itself.
        cases: numbers, instead of all of the split that are there.

    Raises:
        ValueError: another split; a case of `cases` that is not one of it.
        MissingDataError, DataError: the folder or a case of the split is not there.
    """

    def __init__(
        self,
        data_root: str,
        split: str,
        pipeline: Sequence[dict] = (),
        cache: str | None = None,
        test_mode: bool = False,
        cases: Sequence[int] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        lits = module("lits", "reading LiTS")
        self.arrays_of = module("lits_arrays", "reading LiTS").arrays_of
        numbers = lits.split()[SPLITS.index(split)]
        if cases is not None and (other := {*cases} - {*numbers}):
            raise ValueError(f"cases {sorted(other)} are not in the split {split}")
        found = lits.find_cases(data_root).cases
        wanted = numbers if cases is None else sorted({*cases})
        self.files = [found[n] for n in wanted if n in found]
        if cases is not None and (gone := [n for n in wanted if n not in found]):
            raise DataError(f"{data_root} has no files of cases {gone}")
        if not self.files:
            raise DataError(f"{data_root} has no case of the split {split}: copy more of LiTS")
        if len(self.files) < len(wanted):
            print_log(
                f"{data_root} has {len(self.files)} of the {len(wanted)} cases of the split "
                f"{split}; the others are left out",
                "current",
                logging.WARNING,
            )
        self.cache, self.test_mode = cache, test_mode
        self.metainfo = dict(classes=CLASSES, lits=dict(folder=str(data_root)))
        self.pipeline = Compose([TRANSFORMS.build(step) for step in pipeline])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | SampleKey) -> dict:
        """A `SampleKey` fixes what is drawn."""
        index, key = index_and_key(index)
        files = self.files[index]
        hu, labels = self.arrays_of(files, self.cache)
        if self.test_mode:  # training copies what it crops
            hu = np.array(hu)
        results = dict(
            volume=hu[None],
            name=f"lits_{files.number:03d}",
            patient=files.number,
            index=index,
            img_path=str(files.volume),
        )
        if not self.test_mode:
            results["labels"] = labels[None]
        return run_pipeline(self.pipeline, results, key)


@TRANSFORMS.register_module()
class RandomScaledCrop(BaseTransform):
    """A box of `size`, of the volume enlarged or shrunk by up to `scale`. Beyond the volume is air.

    Args:
        size: (D, H, W) in voxels of the result.
        scale: the factor is drawn from 1 - scale to 1 + scale, the same for all axes.
        around: how often the box lies around a voxel of the liver, and of a lesion, drawn from all
            of the case; otherwise, or if there is none, anywhere in it.
    """

    def __init__(
        self,
        size: Sequence[int],
        scale: float = 0.25,
        around: Sequence[float] = (1 / 3, 1 / 3),
    ) -> None:
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"size must be three numbers from 1 on, got {size}")
        if not 0 <= scale < 1:
            raise ValueError(f"scale must be at least 0 and below 1, got {scale}")
        if len(around) != 2 or min(around) < 0 or sum(around) > 1 + 1e-9:
            raise ValueError(f"around must be two parts of 1, got {around}")
        need("resampling of volumes needs", "monai", extra="volumes")
        self.size, self.scale, self.around = tuple(size), scale, tuple(around)

    def transform(self, results: dict) -> dict:
        seed = np.random.randint(2**32, dtype=np.uint32)  # noqa: NPY002
        rng = np.random.default_rng(int(seed))
        factor = rng.uniform(1 - self.scale, 1 + self.scale)
        box = tuple(max(1, round(size / factor)) for size in self.size)
        start = self.draw(rng, results["labels"][0], box)
        cut = {key: self.cut(results[key][0], start, box, AIR[key])[None] for key in KEYS}
        return {**results, **(self.resampled(cut) if box != self.size else cut)}

    def draw(
        self, rng: np.random.Generator, labels: np.ndarray, box: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Where the box begins. Along an axis on which it is longer than the volume, the volume is
        in its middle."""
        room = np.array(labels.shape) - box
        start = np.array([rng.integers(max(r, 0) + 1) for r in room])
        choice = rng.random()
        for label, until in zip((1, 2), np.cumsum(self.around)):
            if choice < until:
                voxels = np.flatnonzero(labels == label)
                if len(voxels):
                    voxel = np.unravel_index(voxels[rng.integers(len(voxels))], labels.shape)
                    start = np.clip(voxel - np.array(box) // 2, 0, np.maximum(room, 0))
                break
        return tuple(int(s) for s in np.where(room < 0, -(-room // 2), start))

    @staticmethod
    def cut(array: np.ndarray, start: Sequence[int], box: Sequence[int], fill: int) -> np.ndarray:
        """A copy of the box, `fill` where it is beyond the array."""
        made = np.full(box, fill, array.dtype)
        source, target = [], []
        for begin, length, size in zip(start, box, array.shape):
            low, high = max(begin, 0), min(begin + length, size)
            source.append(slice(low, high))
            target.append(slice(low - begin, high - begin))
        made[tuple(target)] = array[tuple(source)]
        return made

    def resampled(self, cut: dict) -> dict:
        """HU linearly, labels from the nearest voxel."""
        from monai.transforms import Resized

        moved = Resized(KEYS, self.size, mode=("trilinear", "nearest-exact"))(cut)
        return {key: value.numpy() for key, value in moved.items()}


@TRANSFORMS.register_module()
class RandomFlipsAndTurns(MonaiTransform):
    """Turns slices by 0 to 3 quarters, and flips each axis or not, all with the same chance. Height
    and width must be equal."""

    def transforms(self) -> list:
        from monai.transforms import RandFlipd, RandRotate90d

        missing = dict(allow_missing_keys=True)
        turn = RandRotate90d(KEYS, prob=0.75, max_k=3, spatial_axes=(1, 2), **missing)
        return [turn, *(RandFlipd(KEYS, prob=0.5, spatial_axis=a, **missing) for a in range(3))]

    def transform(self, results: dict) -> dict:
        if results["volume"].shape[2] != results["volume"].shape[3]:
            raise UserError(
                f"{type(self).__name__} turns slices of equal height and width alone, got "
                f"{tuple(results['volume'].shape[2:])}"
            )
        return super().transform(results)
