"""Slices of a whole scan through LesionDetector, against one stack after the other with mmcv's
RoIAlign; what the stages of both take; attention between images of which stacks have some in
common; and RoIAlign on regions of lesions' sizes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import inference, plain, roi_align
from benchmarks.measure import Case
from ct_volumes.lesions import SliceDetections
from ct_volumes.slice_detector import at_least
from ct_volumes.volume import CTVolume, Source
from deeplesion.phantom.body import BODY_LENGTH, Body
from mmdet_ext.checkpoint import save_checkpoint_file
from mmdet_ext.engine.predict import LesionDetector
from mmdet_ext.engine.run import load_config
from mmdet_ext.models.roi_align import InferenceRoIAlign
from mmdet_ext.models.rpn import InferenceRPNHead
from mmdet_ext.models.winograd import InferenceConv2d

EXPERIMENT = "alignshift_3slice"
INTERVAL_MM = 2.0  # of the slices looked at; those of the scan are 1 mm apart
BODY_MM = 400.0  # of the phantom from side to side of a slice
# How many boxes a slice has, and how many of them score enough for linking: the demo's model on its
# scan, on the average. Boxes of random weights lie on one another: without NMS and without a
# threshold there are always as many as a detector may return.
BOXES, LINKED = 26, 4
ALL_BOXES = {"model.test_cfg.rcnn.score_thr": 0.0, "model.test_cfg.rcnn.nms.iou_threshold": 1.0}
SPREAD = 10.0  # times the weights that scores come from, since random ones make them much alike
REGIONS = 300
# Of detectors with attention between images: how many, slices looked at, pixels of a side.
BAGS = (3, 9)
ATTENTION_SLICES, ATTENTION_SIZE = 30, 128
# One thread's own time, as others may use the machine; it does not say what several have waited.
ONE_THREAD = plain.DEVICE == "cpu" and torch.get_num_threads() == 1
CLOCK = time.process_time if ONE_THREAD else time.perf_counter


def cases(
    size: int = 512,
    slices: int = 4,
    boxes: tuple[int, ...] = (BOXES,),
    overrides: dict | None = None,
    bags: tuple[int, ...] = BAGS,
) -> list[Case]:
    """Times are of `slices` / 2 slices looked at, one batch by default; those of stages, of one."""
    volume = scan(slices, size)
    network = [_network(volume, number, size, overrides or {}) for number in boxes]
    network += [_attention(images) for images in bags]
    number = REGIONS if size == 512 else 20
    return network + [replace(_roi_align(n, size, number), clock=CLOCK) for n in (7, 14)]


def _network(volume: CTVolume, boxes: int, size: int, overrides: dict) -> Case:
    options = {**ALL_BOXES, "model.test_cfg.rcnn.max_per_img": boxes}
    detector = random_detector(volume, {"resize.size": size, **options, **overrides})
    with plain_path(detector):
        found = detector.detect_slices(volume, INTERVAL_MM, progress=False)
    looked_at = len(found)
    least = score_between(found, min(LINKED, boxes // 2) * looked_at)
    times: dict[str, list[dict[str, float]]] = {"ours": [], "baseline": []}

    def ours() -> list[SliceDetections]:
        def run() -> list[SliceDetections]:
            return detector.detect_slices(volume, INTERVAL_MM, progress=False, least_score=least)

        result, seconds = stages(detector, run)
        times["ours"].append(seconds)
        return result

    def baseline() -> list[SliceDetections]:
        def run() -> list[SliceDetections]:
            found = detector.detect_slices(volume, INTERVAL_MM, batch_size=1, progress=False)
            return [at_least(each, least) for each in found]

        with plain_path(detector):
            result, seconds = stages(detector, run)
        times["baseline"].append(seconds)
        return result

    def parts() -> dict[str, float]:
        """Without the first, which was a warm-up."""
        return {
            f"{name}, {side}": statistics.median(each[name] for each in found[1:] or found)
            for side, found in times.items()
            for name in found[0]
        }

    name = f"{looked_at} slices of {size}, {boxes} boxes each"
    return Case(name, ours, baseline, same_scores, parts=parts, clock=CLOCK)


def score_between(found: list[SliceDetections], number: int) -> float:
    """A score that about `number` detections reach, in a wide gap, so that no rounding matters."""
    scores = np.sort(np.concatenate([each.scores for each in found]).astype(float))[::-1]
    first, last = max(1, number * 3 // 4), min(len(scores) - 1, number * 5 // 4 + 1)
    at = first + int(np.argmax(scores[first - 1 : last] - scores[first : last + 1]))
    return float((scores[at - 1] + scores[at]) / 2)


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
    return Case(name, ours, baseline, same_scores, clock=CLOCK)


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
    """Stacks written out, maps in NCHW memory, mmcv's RoIAlign and NMS, torch's convolution."""

    def written_out(slices: Tensor, stacks: Tensor, thickness: Tensor) -> tuple[Tensor, Tensor]:
        return slices[stacks].transpose(1, 2), thickness

    with (
        mock.patch.object(detector, "_inputs", written_out),
        mock.patch.object(detector.model.neck, "any_layout", False),
        mock.patch.object(InferenceRoIAlign, "is_faster", lambda *_: False),
        mock.patch.object(InferenceConv2d, "is_faster", lambda *_: False),
        mock.patch.object(InferenceRPNHead, "ends_early", lambda *_: False),
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
        with torch.no_grad():
            model.roi_head.bbox_head.fc_cls.weight *= SPREAD
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
    assert sum(len(found.scores) for found in ours) > 0
    for one, other in zip(ours, baseline, strict=True):
        assert one.index == other.index
        assert len(one.scores) == len(other.scores)
        assert one.masks is None or len(one.masks) == len(one.scores)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=0.01)


def stages(
    detector: LesionDetector, run: Callable[[], list[SliceDetections]]
) -> tuple[list[SliceDetections], dict[str, float]]:
    """The result of `run`, and the seconds a slice of its stages."""
    model, seconds = detector.model, Counter()
    measured = {
        "stem": (model.backbone, "root"),
        "features": (model, "extract_feat"),
        "RPN's convolutions": (model.rpn_head, "forward"),
        "RPN": (model.rpn_head, "predict"),
        "box head": (model.roi_head, "predict_bbox"),
        "mask head": (model.roi_head, "predict_mask"),
    }
    with ExitStack() as stack:
        for name, place in measured.items():
            stack.enter_context(inference.timed(seconds, name, *place, CLOCK))
        start = CLOCK()
        result = run()
        total = CLOCK() - start
    found = {"stem": seconds["stem"], "blocks and neck": seconds["features"] - seconds["stem"]}
    found["RPN's convolutions"] = seconds["RPN's convolutions"]
    found["proposals"] = seconds["RPN"] - seconds["RPN's convolutions"]
    found |= {name: seconds[name] for name in ("box head", "mask head")}
    found["reading, resizing, the rest"] = total - sum(found.values())
    return result, {name: value / len(result) for name, value in found.items()}


def _roi_align(bins: int, size: int, number: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, size // 4, size // 4, generator=generator)
    # A median of 25 px, two thirds within a factor of 1.65.
    sides = 25 * torch.exp(0.5 * torch.randn(number, 2, generator=generator))
    rois = roi_align.of_sides(sides, size, generator)
    return roi_align.case(f"{number} RoIs about 25 px, {bins} x {bins}", x, rois, bins, 2)
