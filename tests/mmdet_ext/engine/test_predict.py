"""A detector over a whole volume: the boxes, scores and masks of a test on key slices; the same
whatever the batch; slices without a body, pixels and sizes of any shape; what is refused."""

import json
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from pycocotools import mask as coco_mask

from ct_volumes.lesions import Patch
from ct_volumes.linking import link
from ct_volumes.slice_detector import at_least
from ct_volumes.stacks import plan_volume_stack
from deeplesion.data.coco import encode_mask
from deeplesion.errors import MissingDataError, UserError
from deeplesion.evaluation.results import read_results
from mmdet_ext.checkpoint import CheckpointError
from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.predict import LesionDetector
from mmdet_ext.engine.run import test as run_test
from mmdet_ext.engine.slice_detections import patches

from ..small_detector import (
    ROOT,
    body_of,
    config_of,
    phantom_series,
    volume_of,
    without_masks,
    write_checkpoint,
)

NO_FUSION = ROOT / "configs/demo/nofusion_3slice.py"
RELEASED = {
    "path": ROOT / "configs/released/alignshift_3slice.py",
    "model.backbone.init_cfg": None,
    "model.backbone.growth": 4,
    "model.backbone.stem_channels": 8,
    "model.backbone.block_config": (1, 1, 1),
    "model.neck.in_channels": (12, 10, 9),
    "model.neck.out_channels": 16,
    "model.rpn_head.in_channels": 16,
    "model.rpn_head.feat_channels": 16,
    "model.roi_head.bbox_roi_extractor.out_channels": 16,
    "model.roi_head.mask_roi_extractor.out_channels": 16,
    "model.roi_head.bbox_head.in_channels": 16,
    "model.roi_head.bbox_head.fc_out_channels": 16,
    "model.roi_head.mask_head.in_channels": 16,
}
OTHERS = {
    "a3d": {"path": NO_FUSION, "model.backbone.fusion": dict(type="A3DConv")},
    "25d": {"path": NO_FUSION, "model.backbone.slices_as_channels": True},
    "7 slices": {"stack.num_slices": 7},
    "boxes alone": without_masks(),
    "released experiment": RELEASED,
    # Of 3 slices both interpolations take the same.
    "released weights": {
        "stack.policy": "normalize",
        "stack.interpolation": "released",
        "stack.num_slices": 7,
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(config_of(), tmp_path_factory.mktemp("weights") / "epoch_1.pth")


@pytest.fixture(scope="module")
def detector(checkpoint):
    return LesionDetector(config_of(), checkpoint, "cpu")


def same(found, expected, tolerance=0.0):
    """Whether two lists of SliceDetections are equal."""
    assert [f.index for f in found] == [e.index for e in expected]
    for one, other in zip(found, expected):
        assert one.boxes.shape == other.boxes.shape and one.boxes.dtype == np.float32
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=tolerance)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=tolerance)
        assert (one.masks is None) == (other.masks is None)
        for a, b in zip(one.masks or (), other.masks or (), strict=True):
            grid = np.zeros((2, 600, 600), bool)
            a.paint(grid[0]), b.paint(grid[1])
            assert (grid[0] != grid[1]).sum() <= (2 if tolerance else 0)
    return True


def found_by_test(phantom, config, checkpoint, work_dir):
    """What tools/test.py finds on the key slices."""
    config.work_dir, config.launcher = str(work_dir), "none"
    config.experiment_name = f"test_predict_{work_dir.name}"
    config.visualizer.vis_backends = []
    config.test_dataloader.num_workers = 0
    config.test_dataloader.persistent_workers = False
    config.test_dataloader.dataset.data_root = str(phantom)
    return read_results(Path(run_test(config, str(checkpoint)))).records


def assert_found(found, boxes, scores, masks):
    """`boxes`: pixel centres; `masks`: run-length encoded, none of a detector without masks."""
    # Files of results round boxes to 0.001.
    np.testing.assert_allclose(found.boxes, boxes, atol=6e-4)
    np.testing.assert_allclose(found.scores, scores, atol=2e-6)
    for patch, mask in zip(found.masks or (), masks, strict=True):
        whole = np.zeros(mask["size"], bool)
        patch.paint(whole)
        assert (whole != coco_mask.decode(mask)).sum() <= 1


def images_of(phantom):
    return json.loads((phantom / "annotations/test.json").read_text())["images"]


def test_a_volume_gives_what_the_test_of_key_slices_gives(detector, checkpoint, phantom, tmp_path):
    records = found_by_test(phantom, config_of(), checkpoint, tmp_path)
    for image, record in zip(images_of(phantom), records, strict=True):
        volume, key = phantom_series(phantom, image)
        found = detector.detect_slices(volume, None, batch_size=1, progress=False)
        assert [each.index for each in found] == list(range(len(volume.hu)))
        assert_found(found[key], record["boxes"], record["scores"], record["masks"])
    assert sum(len(record["masks"]) for record in records) > 4


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_any_detector_finds_what_it_finds_in_the_data_set(options, phantom, tmp_path):
    config = config_of(**options)
    path = write_checkpoint(config, tmp_path / "epoch_1.pth", seed=3)
    detector = LesionDetector(config, path, "cpu")
    config.test_dataloader.dataset.data_root = str(phantom)
    dataset = DATASETS.build(config.test_dataloader.dataset)
    number = 0
    for image, sample in zip(images_of(phantom), (dataset[i] for i in range(len(dataset)))):
        batch = dict(inputs=[sample["inputs"]], data_samples=[sample["data_samples"]])
        with torch.no_grad():
            expected = detector.model.test_step(batch)[0].pred_instances
            # Boxes without area are left out of a scan's.
            expected = expected[(expected.bboxes[:, 2:] > expected.bboxes[:, :2]).all(1)]
            volume, key = phantom_series(phantom, image)
            (found,) = detector._detect_batch(volume, [key])
        masks = [encode_mask(mask.numpy()) for mask in expected.get("masks", ())]
        assert_found(found, expected.bboxes.numpy() - 0.5, expected.scores.numpy(), masks)
        assert (found.masks is None) == ("model.roi_head.mask_head" in options)
        number += len(found.boxes)
    assert number > 4


def test_the_batch_does_not_matter(detector):
    volume = volume_of(body_of(11), 1.0, (3.0, 3.0))
    alone = detector.detect_slices(volume, 1.0, batch_size=1, progress=False)
    assert sum(len(found.boxes) for found in alone) > 20
    for batch_size in (2, 3, 11, 100):
        found = detector.detect_slices(volume, 1.0, batch_size=batch_size, progress=False)
        assert same(found, alone, 1e-3)


def test_what_scores_less_is_left_out_and_gets_no_mask(detector):
    volume = volume_of(body_of(6), 1.0, (3.0, 3.0))
    everything = detector.detect_slices(volume, 1.0, 2, progress=False)
    scores = np.sort(np.concatenate([found.scores for found in everything]))
    masks = []
    hook = detector.model.roi_head.mask_head.register_forward_pre_hook(
        lambda _, inputs: masks.append(len(inputs[0]))
    )
    # Scores that are there, in float32 and as written with fewer digits, and in between.
    for least in (float(scores[9]), float(f"{scores[20]:.6f}"), float(scores[-1]), 1.0):
        expected = [at_least(found, least) for found in everything]
        number = sum(len(found.boxes) for found in expected)
        assert number == (scores.astype(float) >= least).sum()
        masks.clear()
        found = detector.detect_slices(volume, 1.0, 2, progress=False, least_score=least)
        assert same(found, expected, 1e-4)
        assert number <= sum(masks) <= number + 1  # one may be equal in float32 and less
    hook.remove()
    assert same(detector.detect_slices(volume, 1.0, 2, progress=False), everything)
    with pytest.raises(ValueError, match="least_score must be between 0 and 1"):
        detector.detect_slices(volume, least_score=1.1)


def test_lesions_are_those_of_all_detections(detector):
    """Linking leaves out the same, so it needs no masks of it."""
    volume = volume_of(body_of(6), 1.0, (3.0, 3.0))
    found = detector.detect_slices(volume, 1.0, progress=False)
    scores = np.concatenate([each.scores for each in found])
    middle = float(np.median(scores))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ct_volumes.slice_detector.MIN_SLICE_SCORE", middle)
        patch.setattr("ct_volumes.slice_detector.link", partial(link, min_score=middle))
        with pytest.raises(ValueError, match="takes part in no lesion"):
            detector.detect(volume, 1.0, middle / 2, progress=False)
        lesions = detector.detect(volume, 1.0, middle, progress=False)
        expected = link(found, volume, min_score=middle)
    assert len(lesions) == len(expected) > 3
    for one, other in zip(lesions, expected, strict=True):
        assert one.score == pytest.approx(other.score) and len(one.slices) == len(other.slices)
        assert one.volume_mm3 == pytest.approx(other.volume_mm3, rel=1e-3)


def test_a_batch_sees_each_slice_once(detector):
    """Through the stem, of four stacks of three."""
    seen = []
    hook = detector.model.backbone.conv0.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[0] * inputs[0].shape[2])
    )
    volume = volume_of(body_of(4), 2.0, (3.0, 3.0))
    detector.detect_slices(volume, None, batch_size=4, progress=False)
    hook.remove()
    places = {
        place
        for key in range(4)
        for place in plan_volume_stack(volume.positions_mm, key, **detector.stack)[0]
    }
    assert sum(seen) == len(places) < 12


def test_a_pipeline_of_the_users_sees_one_stack_at_a_time(detector, checkpoint):
    """Its steps might look at several slices at once."""
    config = config_of()
    other = LesionDetector(config, checkpoint, "cpu")
    other.slice_by_slice = False
    seen = []
    other.pipeline.transforms.insert(
        0, lambda results: seen.append((results["img"].shape, results["thickness_mm"])) or results
    )
    volume = volume_of(body_of(5), 1.25, (3.0, 3.0))
    found = other.detect_slices(volume, None, progress=False)
    assert seen == [((128, 128, 3), 2.0)] * 5  # of a stack of 2 mm; before, 1 mm of any
    assert same(found, detector.detect_slices(volume, None, progress=False), 1e-3)


def test_slices_without_a_body_are_not_looked_at(detector, monkeypatch):
    hu = body_of(6)
    hu[[0, 3]] = -1000
    looked_at = []
    batch = LesionDetector._detect_batch
    monkeypatch.setattr(
        LesionDetector,
        "_detect_batch",
        lambda s, v, keys, *rest: looked_at.extend(keys) or batch(s, v, keys, *rest),
    )
    found = detector.detect_slices(volume_of(hu, 1.0, (3.0, 3.0)), None, progress=False)
    assert looked_at == [1, 2, 4, 5]
    assert [f.index for f in found] == list(range(6))
    assert not len(found[0].boxes) and not len(found[3].scores) and found[3].masks == ()


@pytest.mark.parametrize("times", [(1, 2), (2, 1), (4, 4), (4, 2)])
def test_pixels_of_any_size_become_those_of_the_network(times, checkpoint):
    """Each pixel is there several times, along one axis or both: the same places are found. At
    half-way between equal pixels the interpolation changes nothing."""
    detector = LesionDetector(config_of(**{"resize.size": 128}), checkpoint, "cpu", True)
    hu = body_of(4)
    plain = detector.detect_slices(volume_of(hu, 1.0, (3.0, 3.0)), None, progress=False)
    fine = np.repeat(np.repeat(hu, times[0], 1), times[1], 2)
    volume = volume_of(fine, 1.0, (3.0 / times[0], 3.0 / times[1]))
    assert detector.field(volume) == fine.shape[1:]
    scale = np.array(times[::-1] * 2)
    for one, other in zip(detector.detect_slices(volume, None, progress=False), plain):
        np.testing.assert_allclose((one.boxes + 0.5) / scale - 0.5, other.boxes, atol=1e-3)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
        for patch, coarse in zip(one.masks, other.masks, strict=True):
            whole, expected = np.zeros(fine.shape[1:], bool), np.zeros(hu.shape[1:], bool)
            patch.paint(whole), coarse.paint(expected)
            area = whole.sum() / np.prod(times)
            assert abs(area - expected.sum()) < 0.1 * area + 30


def test_a_slice_that_is_not_square_is_not_distorted(detector):
    """Air is added, as if the slice had been cut out of a square one."""
    hu = body_of(3)
    hu[:, 100:] = -1000
    whole = detector.detect_slices(volume_of(hu, 1.0, (3.0, 3.0)), None, progress=False)
    cut = volume_of(hu[:, :100], 1.0, (3.0, 3.0))
    found = detector.detect_slices(cut, None, progress=False)
    for one, other in zip(found, whole):
        kept = other.boxes[:, 1] < 99.5
        assert kept.sum() == len(one.boxes) > 0
        np.testing.assert_allclose(one.boxes, other.boxes[kept].clip(-0.5, (127.5, 99.5) * 2))
        np.testing.assert_allclose(one.scores, other.scores[kept])
        for patch in one.masks:
            assert patch.y + patch.mask.shape[0] <= 100


def test_patches_are_the_masks():
    rng = np.random.default_rng(0)
    masks = np.zeros((5, 40, 50), bool)
    for number in range(4):  # the last one is empty
        y, x = rng.integers(0, 30, 2)
        masks[number, y : y + 8, x : x + 12] = rng.random((8, 12)) < 0.6
    for patch, mask in zip(patches(torch.from_numpy(masks), (40, 50)), masks, strict=True):
        expected = Patch.of(mask)
        assert (patch.x, patch.y) == (expected.x, expected.y)
        assert np.array_equal(patch.mask, expected.mask)
    for patch, mask in zip(patches(torch.from_numpy(masks), (20, 25)), masks, strict=True):
        expected = Patch.of(mask[:20, :25])
        assert np.array_equal(patch.mask, expected.mask)


def test_a_longer_scan_takes_no_more_memory(detector):
    """Beside the volume and what was found; of what Python and NumPy hold at most at a time."""

    def peak(slices):
        volume = volume_of(np.repeat(body_of(2), slices // 2, 0), 1.0, (3.0, 3.0))
        detector.detect_slices(volume, None, batch_size=2, progress=False)  # warm
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        found = detector.detect_slices(volume, None, batch_size=2, progress=False)
        most = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert all(p.mask.base is None for f in found for p in f.masks)  # no view of a whole mask
        kept = sum(p.mask.nbytes for f in found for p in f.masks)
        return most - kept, len(found)

    short, long = peak(6), peak(24)
    assert (short[1], long[1]) == (6, 24)
    whole_mask = 128 * 128
    assert long[0] - short[0] < 18 * whole_mask  # a mask a slice, of eight found on each


def test_weights_of_another_network_are_refused(checkpoint, tmp_path):
    config = config_of(path=NO_FUSION, **{"model.backbone.fusion": dict(type="TSMConv")})
    with pytest.raises(CheckpointError, match=r"(?s)another network.*AlignShiftConv.*TSMConv"):
        LesionDetector(config, checkpoint, "cpu")
    LesionDetector(config, checkpoint, "cpu", accept_differences=True)
    with pytest.raises(CheckpointError, match="does not fit the config"):
        narrow = {"model.backbone.stem_channels": 12, "model.neck.in_channels": (24, 24, 24)}
        config = config_of(**narrow)
        LesionDetector(config, checkpoint, "cpu", accept_differences=True)


def test_what_is_not_there_is_refused(checkpoint, detector, tmp_path):
    with pytest.raises(ConfigError, match="no config file nothing"):
        LesionDetector("nothing", checkpoint)
    with pytest.raises(MissingDataError, match="no checkpoint file"):
        LesionDetector(config_of(), tmp_path / "epoch_1.pth")
    with pytest.raises(UserError, match="give cpu, cuda or cuda:NUMBER"):
        LesionDetector(config_of(), checkpoint, "gpu")
    with pytest.raises(UserError, match="needs a GPU"):
        LesionDetector(config_of(), checkpoint, "cuda:99")
    volume = volume_of(body_of(2), 1.0, (3.0, 3.0))
    with pytest.raises(UserError, match="half precision"):
        detector.detect_slices(volume, amp=True)
    with pytest.raises(ValueError, match="batch_size"):
        detector.detect_slices(volume, batch_size=0)
    with pytest.raises(ValueError, match="interval_mm"):
        detector.detect_slices(volume, interval_mm=0)


def test_the_detector_names_itself(detector, checkpoint):
    algorithm = detector.algorithm(dict(interval_mm=2.0))
    assert algorithm.name == "alignshift_3slice" and algorithm.options == dict(interval_mm=2.0)
    assert len(algorithm.checkpoint_sha256) == 64


def test_a_work_directory_will_do(checkpoint):
    assert LesionDetector(config_of(), checkpoint.parent, "cpu").checkpoint.suffix == ".pth"
