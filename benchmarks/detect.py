"""Slices of a whole scan through LesionDetector, against one stack after the other with mmcv's
RoIAlign; what the stages of both take; attention between images of which stacks have some in
common; and RoIAlign on regions of lesions' sizes."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import inference, plain, roi_align
from benchmarks.measure import Case
from ct_volumes.lesions import SliceDetections
from ct_volumes.volume import CTVolume, Source
from deeplesion.phantom.body import BODY_LENGTH, Body
from mmdet_ext.checkpoint import save_checkpoint_file
from mmdet_ext.engine.predict import LesionDetector
from mmdet_ext.engine.run import load_config
from mmdet_ext.models.roi_align import InferenceRoIAlign

EXPERIMENT = "alignshift_3slice"
INTERVAL_MM = 2.0  # of the slices looked at; those of the scan are 1 mm apart
BODY_MM = 400.0  # of the phantom from side to side of a slice
# How many boxes of a slice get a mask. Those of random weights lie on one another: without NMS and
# without a threshold there are always as many as a detector may return.
MASKS = (10, 100)
ALL_BOXES = {"model.test_cfg.rcnn.score_thr": 0.0, "model.test_cfg.rcnn.nms.iou_threshold": 1.0}
REGIONS = 1000
# Of detectors with attention between images: how many, slices looked at, pixels of a side.
BAGS = (3, 9)
ATTENTION_SLICES, ATTENTION_SIZE = 30, 128


def cases(
    size: int = 512,
    slices: int = 8,
    masks: tuple[int, ...] = MASKS,
    overrides: dict | None = None,
    bags: tuple[int, ...] = BAGS,
) -> list[Case]:
    """Times are of `slices` / 2 slices looked at, one batch by default; those of stages, of one."""
    volume = scan(slices, size)
    network = [_network(volume, number, size, overrides or {}) for number in masks]
    network += [_attention(images) for images in bags]
    return network + [_roi_align(bins, size, REGIONS if size == 512 else 20) for bins in (7, 14)]


def _network(volume: CTVolume, masks: int, size: int, overrides: dict) -> Case:
    boxes = {**ALL_BOXES, "model.test_cfg.rcnn.max_per_img": masks}
    detector = random_detector(volume, {"resize.size": size, **boxes, **overrides})

    def ours() -> list[SliceDetections]:
        return detector.detect_slices(volume, INTERVAL_MM, progress=False)

    def baseline() -> list[SliceDetections]:
        with plain_path(detector):
            return detector.detect_slices(volume, INTERVAL_MM, batch_size=1, progress=False)

    def parts() -> dict[str, float]:
        return {
            f"{stage}, {side}": seconds
            for side, run in (("ours", ours), ("baseline", baseline))
            for stage, seconds in stages(detector, run).items()
        }

    looked_at = len(detector.detect_slices(volume, INTERVAL_MM, progress=False))
    name = f"{looked_at} slices of {size}, {masks} masks each"
    return Case(name, ours, baseline, same_scores, parts=parts)


def _attention(images: int) -> Case:
    """Attention between images, each through the backbone once, or once in every stack."""
    volume = scan(2 * ATTENTION_SLICES, ATTENTION_SIZE)
    options = {"stack.num_slices": 3 * images, "model.test_cfg.rcnn.score_thr": 0.0}
    detector = random_detector(volume, options, "demo/volumetric_attention")

    def ours() -> list[SliceDetections]:
        return detector.detect_slices(volume, INTERVAL_MM, progress=False)

    def baseline() -> list[SliceDetections]:
        with mock.patch.object(detector, "_shared_images", lambda *_: None):
            return detector.detect_slices(volume, INTERVAL_MM, progress=False)

    through = [_images(detector, run) for run in (ours, baseline)]
    name = f"bag of {images}, {ATTENTION_SLICES} slices: {through[0]} and {through[1]} images"
    return Case(name, ours, baseline, same_scores)


def _images(detector: LesionDetector, run: Callable[[], list]) -> int:
    """How many images go through the backbone."""
    seen = []
    hook = detector.model.backbone.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    run()
    hook.remove()
    return sum(seen)


@contextmanager
def plain_path(detector: LesionDetector) -> Iterator[None]:
    """Stacks written out, maps in NCHW memory and mmcv's RoIAlign."""

    def written_out(slices: Tensor, stacks: Tensor, thickness: Tensor) -> tuple[Tensor, Tensor]:
        return slices[stacks].transpose(1, 2), thickness

    with (
        mock.patch.object(detector, "_inputs", written_out),
        mock.patch.object(detector.model.neck, "any_layout", False),
        mock.patch.object(InferenceRoIAlign, "is_faster", lambda *_: False),
    ):
        yield


def random_detector(
    volume: CTVolume, overrides: dict, experiment: str = EXPERIMENT
) -> LesionDetector:
    """From random weights, with norms that fit the first slices of a scan."""
    config = load_config(experiment, {"model.backbone.init_cfg": None, **overrides})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        model = inference.build(config)
        batch = inference.volume(model.num_slices, volume.hu.shape[1])
        batch["inputs"] = [torch.from_numpy(volume.hu[None, : model.num_slices])]
        inference.calibrate(model, batch)
        save_checkpoint_file(dict(state_dict=model.state_dict()), path)
        return LesionDetector(config, path, plain.DEVICE, accept_differences=True)


def scan(slices: int, size: int) -> CTVolume:
    """Noisy slices of the phantom's body, 1 mm apart."""
    rng = np.random.default_rng(0)
    spacing = BODY_MM / size
    body = Body(rng, size, spacing)
    first = (BODY_LENGTH - slices) / 2
    planes = [body.plane(first + k)[0] + rng.normal(0, 15, (size, size)) for k in range(slices)]
    hu = np.rint(planes).astype(np.int16)
    origins = np.zeros((slices, 3))
    origins[:, 2] = -np.arange(slices, dtype=float)
    source = Source(Path("phantom"), "nifti", hu.shape, affine=np.eye(4))
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), (spacing, spacing), source)


def same_scores(ours: list[SliceDetections], baseline: list[SliceDetections]) -> None:
    """As many detections on every slice, and their scores to 0.01: see `inference.close`."""
    for one, other in zip(ours, baseline, strict=True):
        assert one.index == other.index
        assert len(one.scores) == len(other.scores) > 0
        assert one.masks is None or len(one.masks) == len(one.scores)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=0.01)


def stages(detector: LesionDetector, run: Callable[[], list]) -> dict[str, float]:
    """Seconds a slice of the stages of `run`."""
    model, seconds = detector.model, Counter()
    measured = {
        "stem": (model.backbone, "root"),
        "features": (model, "extract_feat"),
        "RPN": (model.rpn_head, "predict"),
        "box head": (model.roi_head, "predict_bbox"),
        "mask head": (model.roi_head, "predict_mask"),
    }
    with ExitStack() as stack:
        for name, place in measured.items():
            stack.enter_context(inference._timed(seconds, name, *place))
        start = time.perf_counter()
        number = len(run())
        total = time.perf_counter() - start
    features = seconds.pop("features")
    found = {"stem": seconds.pop("stem")}
    found["blocks and neck"] = features - found["stem"]
    found |= seconds
    found["reading, resizing, the rest"] = total - sum(found.values())
    return {name: value / number for name, value in found.items()}


def _roi_align(bins: int, size: int, number: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, size // 4, size // 4, generator=generator)
    # A median of 25 px, two thirds within a factor of 1.65.
    sides = 25 * torch.exp(0.5 * torch.randn(number, 2, generator=generator))
    rois = roi_align.of_sides(sides, size, generator)
    return roi_align.case(f"{number} RoIs about 25 px, {bins} x {bins}", x, rois, bins, 2)
