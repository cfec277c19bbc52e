"""One training sample of 7 slices from disk to tensor, augmented: the pipeline of the experiments
against the straightforward way, one step and one slice after another."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope
from pycocotools import mask as coco_mask
from torch import Tensor

from benchmarks.measure import Case
from deeplesion.data.prepare import prepare
from deeplesion.data.slice_cache import fill_cache
from deeplesion.data.slices import plan_stack, slice_name
from deeplesion.phantom.make import make_phantom
from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.datasets.deeplesion import DeepLesionDataset
from mmdet_ext.datasets.sampler import SampleKey

ROOT = Path(__file__).resolve().parent.parent
POLICIES = {"keep_thick": "alignshift_7slice", "normalize": "a3d_7slice"}
NUM_SLICES, SAMPLES = 7, 8
# RandomAffineResize's defaults, drawn in its order.
PROB, SHIFT, SCALE, ROTATION, FLIP_PROB = 0.8, 0.04, 0.2, 15.0, 0.5


def cases(root: Path | None = None, size: int = 512) -> list[Case]:
    """Ours from PNG and from the slice cache, under both policies.

    `root`: a prepared data set with a slice cache, as `tools/prepare_data.py --cache` leaves it;
    by default a phantom made for the purpose, whose PNGs are a little larger than DeepLesion's and
    take as long to decode. `size`: pixels a side, of the phantom and of what the network is given.

    As in a worker process of training there is one thread, and files are in the page cache. Ours
    stops at Hounsfield units: the window is applied on the device, for all samples of a batch.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if root is None:
        root = _phantom(size)
    images, lesions = _training_set(root)
    keys = [SampleKey(0, 0, index) for index in range(min(SAMPLES, len(images)))]
    found = []
    for policy, config in POLICIES.items():
        plain = partial(_plain_samples, root, size, policy, images, lesions, keys)
        for source, cache in (("PNG", None), ("slice cache", "slice_cache")):
            found.append(
                Case(
                    name=f"{len(keys)} samples, {policy}, from {source}",
                    ours=partial(_our_samples, _dataset(root, size, config, cache), keys),
                    baseline=plain,
                    check=check,
                )
            )
    return found


def check(ours: list[dict], plain: list[tuple[Tensor, np.ndarray]]) -> None:
    """Equal but for the rounding to whole HU, 0.04 in units of the network's input.

    99 of 100 pixels differ by less than 0.1 (1.2 HU). More may those that the plain way mirrors
    exactly and ours on cv2's grid of 1/32 pixel, and those beside the -3024 HU outside a scanner's
    field of view, which the plain way clips first: the mean difference stays below 0.25 (3 HU).
    Masks differ in less than 1 % of their pixels.
    """
    for sample, (image, masks) in zip(ours, plain, strict=True):
        difference = np.abs(plain_window(sample["inputs"].numpy()) - image.numpy())
        assert difference.mean() < 0.25, difference.mean()
        assert np.quantile(difference, 0.99) < 0.1, np.quantile(difference, 0.99)
        moved = sample["data_samples"].gt_instances.masks.masks
        assert (moved != masks).sum() <= 0.01 * masks.sum()


def _phantom(size: int) -> Path:
    folder = tempfile.mkdtemp(prefix="phantom")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    root = Path(folder) / "DeepLesion"
    make_phantom(root, patients=6, size=size)
    prepare(root, workers=1)
    fill_cache(root, NUM_SLICES, workers=1)
    return root


def _training_set(root: Path) -> tuple[list[dict], dict[int, list[dict]]]:
    content = json.loads((root / "annotations" / "train.json").read_text())
    lesions = {image["id"]: [] for image in content["images"]}
    for lesion in content["annotations"]:
        lesions[lesion["image_id"]].append(lesion)
    return content["images"], lesions


def _dataset(root: Path, size: int, config: str, cache: str | None) -> DeepLesionDataset:
    init_default_scope("mmdet")
    options = read_experiment(ROOT / "configs" / f"{config}.py").train_dataloader.dataset
    options.update(data_root=str(root), cache=cache)
    for step in options.pipeline:
        if step.type == "RandomAffineResize":
            step.size = size
    dataset = DATASETS.build(options)
    assert bool(dataset.cache) == bool(cache), f"{root} has no slice cache: prepare_data.py --cache"
    return dataset


def _our_samples(dataset: DeepLesionDataset, keys: list[SampleKey]) -> list[dict]:
    return [dataset[key] for key in keys]


def _plain_samples(
    root: Path, size: int, policy: str, images: list[dict], lesions: dict, keys: list[SampleKey]
) -> list[tuple[Tensor, np.ndarray]]:
    return [
        plain_sample(root, size, policy, images[key.index], lesions[images[key.index]["id"]], key)
        for key in keys
    ]


def plain_sample(
    root: Path, size: int, policy: str, image: dict, lesions: list[dict], key: SampleKey
) -> tuple[Tensor, np.ndarray]:
    """(1, D, H, W) float32 windowed, and (n, H, W) uint8 masks; each slice goes through all steps.

    A slice that two positions need is read twice.
    """
    slices = [plain_window(hu) for hu in plain_stack(root, policy, image)]
    masks = [coco_mask.decode(lesion["segmentation"]) for lesion in lesions]
    for step in plain_steps(np.random.default_rng(key), image["height"], image["width"], size):
        slices = [step(one, cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101) for one in slices]
        masks = [step(one, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT) for one in masks]
    volume = np.stack(slices, axis=-1).transpose(2, 0, 1).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(volume))[None], np.stack(masks)


def plain_stack(root: Path, policy: str, image: dict) -> list[np.ndarray]:
    """The stack around a key slice: D arrays (H, W) float64 HU."""
    series, _, file = image["file_name"].partition("/")
    positions, _ = plan_stack(
        int(Path(file).stem), image["thickness_mm"], image["slice_range"], NUM_SLICES, policy
    )

    def read(index: int) -> np.ndarray:
        path = root / "Images_png" / slice_name(series, index)
        return cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.float64) - 32768

    return [
        read(near) if weight == 0 else (1 - weight) * read(near) + weight * read(far)
        for near, far, weight in positions
    ]


def plain_window(hu: np.ndarray) -> np.ndarray:
    return (np.clip(hu, -1024, 2050) + 1024) / (2050 + 1024) * 255 - 50


def plain_steps(rng: np.random.Generator, height: int, width: int, size: int) -> list[Callable]:
    """Shift, scale and rotation; flip; resize: each maps (image, interpolation, border) to it."""
    steps = []
    if rng.random() < PROB:
        shift = rng.uniform(-SHIFT, SHIFT, 2) * (width, height)
        zoom, angle = 1 + rng.uniform(-SCALE, SCALE), rng.uniform(-ROTATION, ROTATION)
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -angle, zoom)
        matrix[:, 2] += shift
        steps.append(
            lambda image, interpolation, border: cv2.warpAffine(
                image, matrix, (width, height), flags=interpolation, borderMode=border
            )
        )
    if rng.random() < FLIP_PROB:
        steps.append(lambda image, *_: cv2.flip(image, 1))
    steps.append(
        lambda image, interpolation, _: cv2.resize(image, (size, size), interpolation=interpolation)
    )
    return steps
