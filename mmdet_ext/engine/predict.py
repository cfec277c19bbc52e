"""LesionDetector: a trained detector run over a whole CT volume, slice by slice, in the way it is
tested on key slices; and what it found linked to lesions in 3D."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from torch import Tensor
from tqdm import tqdm

from ct_volumes.lesions import Algorithm, Lesion, SliceDetections
from ct_volumes.linking import MIN_SCORE as LEAST_SCORE
from ct_volumes.linking import link
from ct_volumes.stacks import has_body, key_slices, plan_volume_stack, slice_of
from ct_volumes.volume import CTVolume
from deeplesion.errors import UserError
from mmdet_ext.config.check import ConfigError, refused_by_parts
from mmdet_ext.engine.run import find_checkpoint, load_config
from mmdet_ext.engine.shared_images import SharedImages
from mmdet_ext.engine.slice_detections import at_least, detections, nothing_on, only_above
from mmdet_ext.engine.slice_results import SliceResults
from mmdet_ext.engine.trained_detector import (
    load_weights,
    software_version,
    test_data,
    usable_device,
)

# Of a lesion's best slice. No operating point is published for whole scans; this is where a
# detector calls it more likely than not.
MIN_SCORE = 0.5
AIR_HU = -1000
SAME_ASPECT = 0.01  # pixels whose sides differ by less are square
# Those that treat each slice of a stack alike, whatever the others are.
SLICE_BY_SLICE = ("RandomAffineResize", "PackCTInputs")
BATCH_SIZE = {"cpu": 4, "cuda": 8}

OUT_OF_MEMORY = """out of memory on {device}, {size} slices at a time. What lowers it:
  --batch-size {less}     fewer slices at once (the result is the same)
  --amp               half precision (GPU)
  --device cpu        a CPU, slower
The message of torch: {error}"""


class LesionDetector:
    """A detector of this project with its weights, ready for CT volumes.

    Args:
        config: the experiment: a file, the name of one that comes along such as
            'alignshift_3slice', or a config that `load_config` read.
        checkpoint: a .pth file, or a work directory, whose best one is taken.
        device: such as 'cpu' or 'cuda:1'; default: a GPU if there is one.
        accept_differences: run weights that were trained as another network than the config's.
        overrides: options of the config, as of `--cfg-options`.

    Raises:
        ConfigError: a config that cannot be used; MissingConfigError if there is none.
        CheckpointError: weights that do not fit, are damaged, or of another network.
        MissingDataError: no checkpoint.
        UserError: a device that is not there.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path,
        device: str | torch.device | None = None,
        accept_differences: bool = False,
        overrides: dict | None = None,
    ) -> None:
        self.config = config if isinstance(config, Config) else load_config(str(config), overrides)
        self.name = Path(self.config.filename or "unnamed").stem
        self.checkpoint = Path(find_checkpoint(str(checkpoint)))
        self.device = usable_device(device)
        init_default_scope(self.config.get("default_scope", "mmdet"))
        self.stack, self.steps = test_data(self.config)
        with refused_by_parts():
            self.pipeline = Compose(self.steps)
            # Pretrained weights, which `init_cfg` may name, are fetched by init_weights alone.
            self.model = MODELS.build(self.config.model)
        self.slice_by_slice = all(s.get("type") in SLICE_BY_SLICE for s in self.steps)
        self.size = next((s.size for s in self.pipeline.transforms if hasattr(s, "size")), None)
        with open(self.checkpoint, "rb") as file:
            self.checkpoint_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        load_weights(self.model, self.checkpoint, self.config, accept_differences)
        self.model.to(self.device).eval()

    def detect(
        self,
        volume: CTVolume,
        interval_mm: float | None = 2.0,
        min_score: float = MIN_SCORE,
        *,
        batch_size: int | None = None,
        amp: bool = False,
        progress: bool = True,
        store: Path | None = None,
        **linking,
    ) -> list[Lesion]:
        """The lesions of a volume, by falling score.

        `detect_slices`, then `ct_volumes.linking.link` with `linking`; `min_score` is of a lesion's
        best slice (`lesion_score` there).
        """
        found = self.detect_slices(
            volume, interval_mm, batch_size, amp, progress, store, LEAST_SCORE
        )
        return link(found, volume, lesion_score=min_score, **linking)

    def detect_slices(
        self,
        volume: CTVolume,
        interval_mm: float | None = 2.0,
        batch_size: int | None = None,
        amp: bool = False,
        progress: bool = True,
        store: Path | None = None,
        least_score: float = 0.0,
    ) -> list[SliceDetections]:
        """What the detector finds on every slice that it looks at, by default whatever its score.

        Each is looked at with the stack around it (`plan_volume_stack`) as the experiment's test
        data are. Where the network's input has another shape than the slice, air is added on the
        right or below so that nothing is distorted; pixels that are not square become so there.

        Args:
            volume: the scan.
            interval_mm: distance of the slices looked at (`key_slices`); None is every slice.
            batch_size: slices at a time; default 4, on a GPU 8. Changes no result.
            amp: half precision, on a GPU.
            progress: show a bar with the time that is left.
            store: file in which results are kept as they come; from one of an interrupted call of
                the same scan, network and options it goes on (`SliceResults`).
            least_score: what scores less is left out, before it gets a mask; the others are the
                same. `link` leaves out what scores less than `ct_volumes.linking.MIN_SCORE`.

        Returns one entry a slice looked at, head to feet. Slices without a body (`has_body`) are
        not given to the network: nothing is found there. Coordinates are pixel centres.

        Raises:
            UserError: half precision without a GPU, a lack of memory.
            ConfigError: the experiment cannot take pixels that are not square.
            ValueError: an interval, a batch size or a score that cannot be.
        """
        if batch_size is None:
            batch_size = BATCH_SIZE.get(self.device.type, 1)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= least_score <= 1:
            raise ValueError(f"least_score must be between 0 and 1, got {least_score}")
        if amp and self.device.type == "cpu":
            raise UserError("half precision (--amp) is for a GPU: leave it out on a CPU")
        self.field(volume)  # refuses what the network cannot take, before the work
        keys = key_slices(volume, interval_mm)
        key = self.key(volume, interval_mm, amp, least_score) if store else {}
        results = SliceResults(store, key)
        images = self._shared_images(volume)
        waiting: list[int] = []
        bar = tqdm(
            total=len(keys), initial=len(results.found), unit="slice", desc="detecting",
            disable=not progress, leave=False,
        )  # fmt: skip
        half = torch.autocast(self.device.type, enabled=amp)
        with bar, torch.no_grad(), half, only_above(self.model, least_score):
            for number, key in enumerate(keys, 1):
                new = []
                if key not in results.found:
                    if has_body(volume.hu[key], volume.spacing_mm):
                        waiting.append(key)
                    else:
                        new = [nothing_on(key, bool(self.model.with_mask))]
                if waiting and (len(waiting) == batch_size or number == len(keys)):
                    found = self._detect_batch(volume, waiting, images)
                    new += [at_least(each, least_score) for each in found]
                    waiting = []
                results.add(new)
                bar.update(len(new))
        return [results.found[key] for key in keys]

    def key(
        self, volume: CTVolume, interval_mm: float | None, amp: bool, least_score: float = 0.0
    ) -> dict:
        """What decides the detections of slices, as JSON can hold it."""
        return dict(
            network=self.network_sha256,
            checkpoint=self.checkpoint_sha256,
            software=software_version(),
            volume=volume.sha256,
            interval_mm=interval_mm,
            amp=amp,
            least_score=least_score,
        )

    @property
    def network_sha256(self) -> str:
        """Hash of what the config says of the network, its thresholds, and its input."""
        steps = [dict(step) for step in self.steps]
        network = json.dumps([self.config.model.to_dict(), self.stack, steps], default=str)
        return hashlib.sha256(network.encode()).hexdigest()

    def algorithm(self, options: dict) -> Algorithm:
        """What is written of this detector into every file; `options` are the caller's."""
        return Algorithm(self.name, software_version(), self.checkpoint_sha256, options)

    def field(self, volume: CTVolume) -> tuple[int, int]:
        """(rows, columns) of a slice with the air that gives it the shape of the network's input.

        Raises ConfigError if that would have pixels that are not square.
        """
        rows, columns = volume.hu.shape[1:]
        row_mm, column_mm = volume.spacing_mm
        if self.size is None:
            if abs(row_mm / column_mm - 1) > SAME_ASPECT:
                raise ConfigError(
                    f"the scan's pixels are {row_mm:g} x {column_mm:g} mm and the config's test"
                    " pipeline has no RandomAffineResize(augment=False), which makes them square:"
                    " add one"
                )
            return rows, columns
        aspect = self.size[0] / self.size[1]  # height over width
        height_mm = max(rows * row_mm, columns * column_mm * aspect)
        width_mm = height_mm / aspect
        return max(rows, round(height_mm / row_mm)), max(columns, round(width_mm / column_mm))

    def _detect_batch(
        self, volume: CTVolume, keys: Sequence[int], images: SharedImages | None = None
    ) -> list[SliceDetections]:
        plans = [plan_volume_stack(volume.positions_mm, key, **self.stack) for key in keys]
        stacks = [plan for plan, _ in plans]
        thickness_mm = [mm for _, mm in plans]
        try:
            if images is None:
                inputs, sample = self._inputs_of(volume, stacks, thickness_mm)
                predict = self.model.predict
            else:
                inputs, sample = images.features(stacks)
                predict = self.model.predict_features
            samples = [DetDataSample(metainfo=sample.metainfo) for _ in keys]
            for each, mm in zip(samples, thickness_mm):
                each.set_metainfo(dict(thickness_mm=mm))
            predicted = predict(inputs, samples, rescale=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size, less = len(keys), max(1, len(keys) // 2)
            text = OUT_OF_MEMORY.format(device=self.device, size=size, less=less, error=error)
            raise UserError(text) from error
        found = [each.pred_instances for each in predicted]
        shape = volume.hu.shape[1:]
        return [detections(key, each, shape) for key, each in zip(keys, found, strict=True)]

    def _shared_images(self, volume: CTVolume) -> SharedImages | None:
        """For a model that takes images of several slices which stacks have in common, if each
        slice is made ready without a look at its stack."""
        if not (self.slice_by_slice and getattr(self.model, "shares_images", False)):
            return None
        return SharedImages(self.model, partial(self._slices, volume))

    def _inputs_of(
        self, volume: CTVolume, plans: list[list], thickness_mm: list[float]
    ) -> tuple[tuple[Tensor, ...], DetDataSample]:
        """What the detector's `extract_feat` takes of stacks, and the sample of their slices."""
        places, stacks = self._places(plans)
        slices, sample = self._slices(volume, places)
        thickness = torch.tensor(thickness_mm, device=slices.device)
        return self._inputs(slices, stacks.to(slices.device), thickness), sample

    def _inputs(self, slices: Tensor, stacks: Tensor, thickness: Tensor) -> tuple[Tensor, ...]:
        """What the detector's `extract_feat` takes, of (S, 1, H, W) windowed slices, (N, D) indices
        of those of each stack, and its (N,) thickness in mm."""
        if hasattr(self.model, "inputs_of"):
            return self.model.inputs_of(slices, stacks, thickness)
        return slices[stacks].transpose(1, 2), thickness

    def _places(self, plans: list[list]) -> tuple[list[tuple[int, int, float]], Tensor]:
        """Each different slice of several stacks once, and (N, D) their numbers in each stack."""
        if not self.slice_by_slice:
            places = [place for plan in plans for place in plan]
            return places, torch.arange(len(places)).reshape(len(plans), -1)
        numbers: dict[tuple[int, int, float], int] = {}
        stacks = [[numbers.setdefault(place, len(numbers)) for place in plan] for plan in plans]
        return list(numbers), torch.tensor(stacks)

    def _slices(
        self, volume: CTVolume, places: list[tuple[int, int, float]]
    ) -> tuple[Tensor, DetDataSample]:
        """(S, 1, H, W) windowed slices as the network takes them, and a sample that says how they
        were made."""
        height, width = self.field(volume)
        rows, columns = volume.hu.shape[1:]
        image = np.full((height, width, len(places)), AIR_HU, np.int16)
        for number, place in enumerate(places):
            image[:rows, :columns, number] = slice_of(volume.hu, place)
        # As one stack, or one stack at a time for a pipeline that may look at several slices.
        size = len(places) if self.slice_by_slice else self.stack["num_slices"]
        parts, sample = [], None
        for first in range(0, len(places), size):
            stack = image[..., first : first + size]
            results = dict(
                img=np.ascontiguousarray(stack),
                img_shape=(height, width),
                ori_shape=(height, width),
                img_path="the scan",
                thickness_mm=1.0,  # each stack's own is set later
            )
            packed = self.pipeline(results)
            data = dict(inputs=[packed["inputs"]], data_samples=[packed["data_samples"]])
            data = self.model.data_preprocessor(data, False)
            (images, _), (sample,) = data["inputs"], data["data_samples"]
            parts.append(images[0].transpose(0, 1))
        return torch.cat(parts), sample


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
