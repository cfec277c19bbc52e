"""LesionDetector: a trained detector run over a whole CT volume, slice by slice, in the way it is
tested on key slices."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
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

from ct_volumes.lesions import SliceDetections
from ct_volumes.slice_detector import Look, SliceDetector
from ct_volumes.stacks import plan_volume_stack
from ct_volumes.volume import CTVolume
from deeplesion.errors import UserError
from deeplesion.files import file_sha256
from mmdet_ext.config.check import ConfigError, refused_by_parts
from mmdet_ext.engine.run import find_checkpoint, load_config
from mmdet_ext.engine.shared_images import SharedImages
from mmdet_ext.engine.slice_detections import detections, only_above
from mmdet_ext.engine.trained_detector import (
    load_weights,
    software_version,
    test_data,
    usable_device,
)

# Those that treat each slice of a stack alike, whatever the others are.
SLICE_BY_SLICE = ("RandomAffineResize", "PackCTInputs")
BATCH_SIZE = {"cpu": 4, "cuda": 8}

OUT_OF_MEMORY = """out of memory on {device}, {size} slices at a time. What lowers it:
  --batch-size {less}     fewer slices at once (the result is the same)
  --amp               half precision (GPU)
  --device cpu        a CPU, slower
The message of torch: {error}"""


class LesionDetector(SliceDetector):
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

    not_square = ConfigError

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
        self.checkpoint_sha256 = file_sha256(self.checkpoint)
        load_weights(self.model, self.checkpoint, self.config, accept_differences)
        self.model.to(self.device).eval()
        self.with_masks = bool(self.model.with_mask)
        self.batch_size = BATCH_SIZE.get(self.device.type, 1)
        self.software = software_version()

    @contextlib.contextmanager
    def looking(self, volume: CTVolume, amp: bool, least_score: float) -> Iterator[Look]:
        images = self._shared_images(volume)
        half = torch.autocast(self.device.type, enabled=amp)
        with torch.no_grad(), half, only_above(self.model, least_score):
            yield lambda keys: self._detect_batch(volume, keys, images)

    def check_amp(self, amp: bool) -> None:
        super().check_amp(amp and self.device.type == "cpu")

    @property
    def network_sha256(self) -> str:
        """Hash of what the config says of the network, its thresholds, and its input."""
        steps = [dict(step) for step in self.steps]
        network = json.dumps([self.config.model.to_dict(), self.stack, steps], default=str)
        return hashlib.sha256(network.encode()).hexdigest()

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
        slices, sample = self._slices(volume, places, thickness_mm)
        thickness = torch.tensor(thickness_mm, device=slices.device)
        return self._inputs(slices, stacks.to(slices.device), thickness), sample

    def _inputs(self, slices: Tensor, stacks: Tensor, thickness: Tensor) -> tuple[Tensor, ...]:
        """What the detector's `extract_feat` takes, of (S, windows, H, W) slices, (N, D) numbers of
        those of each stack, and its (N,) thickness in mm."""
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
        self,
        volume: CTVolume,
        places: list[tuple[int, int, float]],
        thickness_mm: Sequence[float] = (1.0,),
    ) -> tuple[Tensor, DetDataSample]:
        """(S, windows, H, W) slices as the network takes them, and a sample that says how they were
        made. Where the pipeline sees a stack at a time it also sees the stack's `thickness_mm`."""
        image = self.with_air(volume, places)
        height, width = image.shape[:2]
        # As one stack, or one stack at a time for a pipeline that may look at several slices.
        size = len(places) if self.slice_by_slice else self.stack["num_slices"]
        parts, sample = [], None
        for first, mm in zip(range(0, len(places), size), thickness_mm):
            stack = image[..., first : first + size]
            results = dict(
                img=np.ascontiguousarray(stack),
                img_shape=(height, width),
                ori_shape=(height, width),
                img_path="the scan",
                thickness_mm=float(mm),  # of slices alone any: each stack's own is set later
            )
            packed = self.pipeline(results)
            data = dict(inputs=[packed["inputs"]], data_samples=[packed["data_samples"]])
            data = self.model.data_preprocessor(data, False)
            (images, _), (sample,) = data["inputs"], data["data_samples"]
            parts.append(images[0].transpose(0, 1))
        return torch.cat(parts), sample


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
