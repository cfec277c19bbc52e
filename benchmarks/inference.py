"""An image through the whole detector, from a volume of HU to run-length masks: ours against the
same with the papers' backbone and neck; and what its parts take."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.measure import Case
from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.evaluation.froc_metric import encode_mask

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ("alignshift_7slice", "a3d_7slice", "alignshift_3slice", "a3d_3slice")


def cases(size: int = 512, experiments: tuple[str, ...] = EXPERIMENTS) -> list[Case]:
    """From random weights, which find boxes everywhere, up to the 50 that the detector returns."""
    return [_case(name, size) for name in experiments]


def _case(name: str, size: int) -> Case:
    model = detector(name)
    batch = volume(model.neck.num_slices, size)
    calibrate(model, batch)

    def plain_features(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (plain.network(model.backbone, model.neck, *inputs),)

    def baseline() -> dict:
        with mock.patch.object(model, "extract_feat", plain_features):
            return detect(model, batch)

    def ours() -> dict:
        return detect(model, batch)

    return Case(f"{name}, {size} x {size}", ours, baseline, close, parts=lambda: parts(model, ours))


def detector(name: str) -> nn.Module:
    """An experiment's detector from random weights, ready to test."""
    return build(read_experiment(ROOT / "configs" / f"{name}.py"))


def build(config: Config) -> nn.Module:
    """The detector of a config, likewise."""
    import_modules_from_strings(**config.custom_imports)
    config.model.backbone.init_cfg = None
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config.model)
    return model.to(plain.DEVICE).eval()


@torch.no_grad()
def calibrate(model: nn.Module, batch: dict) -> None:
    """Gives the norms the statistics of a batch: maps of random weights would explode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    model.extract_feat(model.data_preprocessor(batch)["inputs"])
    for norm in norms:
        norm.eval()


def volume(slices: int, size: int) -> dict:
    """What a data loader hands on: one volume of noise, in HU."""
    generator = torch.Generator().manual_seed(0)
    hu = torch.randint(-1000, 1000, (1, slices, size, size), generator=generator)
    sample = DetDataSample(
        metainfo=dict(
            img_path="noise",
            img_shape=(size, size),
            ori_shape=(size, size),
            scale_factor=(1.0, 1.0),
            thickness_mm=5.0,
        )
    )
    return {"inputs": [hu.to(torch.int16)], "data_samples": [sample]}


def detect(model: nn.Module, batch: dict) -> dict:
    """Boxes, scores and run-length masks, as they go into a result file."""
    with torch.no_grad():
        (sample,) = model.test_step(batch)
    found = sample.pred_instances
    masks = run_lengths(found.masks)
    return dict(boxes=found.bboxes.cpu(), scores=found.scores.cpu(), masks=masks)


def run_lengths(masks: Tensor) -> list[dict]:
    return [encode_mask(mask.cpu().numpy()) for mask in masks]


def close(ours: dict, baseline: dict) -> None:
    """As many detections, and their scores to 0.01. Scores of random weights are so alike that
    rounding reorders boxes; that features agree is what the benchmark `backbone` checks."""
    assert len(ours["scores"]) == len(baseline["scores"]) == len(ours["masks"]) > 0
    torch.testing.assert_close(ours["scores"], baseline["scores"], rtol=0, atol=0.01)


def parts(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of `run` that go to the features, to the heads, and to post-processing: NMS, decoding
    of boxes, pasting of masks, run lengths."""
    seconds = Counter()
    heads = model.roi_head
    post = [
        (model.rpn_head, "predict_by_feat"),
        (heads.bbox_head, "predict_by_feat"),
        (heads.mask_head, "predict_by_feat"),
    ]
    with ExitStack() as stack:
        stack.enter_context(timed(seconds, "backbone and neck", model, "extract_feat"))
        for owner, method in post:
            stack.enter_context(timed(seconds, "post-processing", owner, method))
        this = sys.modules[__name__]
        stack.enter_context(timed(seconds, "post-processing", this, "run_lengths"))
        start = time.perf_counter()
        run()
        total = time.perf_counter() - start
    seconds["windowing, RoIAlign and heads"] = total - seconds.total()
    return dict(seconds)


@contextmanager
def timed(
    seconds: Counter,
    name: str,
    owner: object,
    method: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[None]:
    """Within it, what a method takes is added up."""
    original = getattr(owner, method)

    def timed(*args, **kwargs):
        start = clock()
        result = original(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] += clock() - start
        return result

    with mock.patch.object(owner, method, timed):
        yield
