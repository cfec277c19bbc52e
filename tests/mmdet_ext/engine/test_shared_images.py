"""Detectors with attention between images over a whole volume: the same detections as from stacks
one after the other, each image through the backbone once, and no more kept than a stack reaches."""

from functools import partial

import pytest
import torch

from ct_volumes.stacks import plan_volume_stack
from mmdet_ext.engine.predict import LesionDetector
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.shared_images import SharedImages

from ..small_detector import ROOT, body_of, volume_of, write_checkpoint
from .test_predict import same

CHANNELS = 16
SMALL = {
    "resize.size": 128,
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": [8, 16, 32, 64],
    "model.neck.out_channels": CHANNELS,
    "model.rpn_head.in_channels": CHANNELS,
    "model.rpn_head.feat_channels": CHANNELS,
    "model.roi_head.bbox_roi_extractor.out_channels": CHANNELS,
    "model.roi_head.bbox_head.in_channels": CHANNELS,
    "model.roi_head.bbox_head.fc_out_channels": 32,
    "model.test_cfg.rpn.max_per_img": 30,
    "model.test_cfg.rcnn.max_per_img": 8,
}
MASKS = {
    "model.type": "SliceGroupMaskRCNN",
    "model.roi_head.mask_roi_extractor": dict(
        type="SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=2),
        out_channels=CHANNELS,
        featmap_strides=[4, 8, 16, 32],
    ),
    "model.roi_head.mask_head": dict(
        type="FCNMaskHead",
        num_convs=1,
        in_channels=CHANNELS,
        conv_out_channels=CHANNELS,
        num_classes=1,
        loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
    ),
    "model.test_cfg.rcnn.mask_thr_binary": 0.5,
}
CASES = {
    "before the RPN": {},
    "on RoI features": {"model.attention_location": "rcnn"},
    "with masks": MASKS,
    "bag of 9": {"stack.num_slices": 27},
}
UNEVEN = [1.0] * 9 + [2.0] * 5 + [7.0] + [0.7] * 4 + [5.0] * 2  # a gap of 7 mm


def detector_of(folder, **options):
    path = str(ROOT / "configs/demo/volumetric_attention.py")
    config = load_config(path, {**SMALL, **options})
    return LesionDetector(config, write_checkpoint(config, folder / "epoch_1.pth"), "cpu")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return detector_of(tmp_path_factory.mktemp("weights"))


def images_seen(detector, run):
    """How many images go through the backbone."""
    counts = []
    hook = detector.model.backbone.register_forward_pre_hook(
        lambda _, inputs: counts.append(len(inputs[0]))
    )
    result = run()
    hook.remove()
    return result, sum(counts)


def images_of(detector, volume, keys):
    """The different images that there are in the stacks around slices."""
    plans = [plan_volume_stack(volume.positions_mm, key, **detector.stack)[0] for key in keys]
    return {tuple(plan[n : n + 3]) for plan in plans for n in range(0, len(plan), 3)}


def one_after_the_other(detector, volume, interval_mm):
    """The stacks of `detect_slices` written out, each by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LesionDetector, "_shared_images", lambda *_: None)
        return detector.detect_slices(volume, interval_mm, batch_size=1, progress=False)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_detections_are_those_of_stacks_one_after_the_other(options, tmp_path):
    detector = detector_of(tmp_path, **options)
    volume = volume_of(body_of(13), 1.0, (3.0, 3.0))
    expected, written_out = images_seen(
        detector, lambda: one_after_the_other(detector, volume, 2.0)
    )
    assert sum(len(found.boxes) for found in expected) > 20
    assert written_out == 7 * detector.model.num_images
    for batch_size in (3, 7):
        run = partial(detector.detect_slices, volume, 2.0, batch_size, progress=False)
        found, seen = images_seen(detector, run)
        assert same(found, expected, 1e-3)
        assert seen == len(images_of(detector, volume, range(0, 13, 2)))


@pytest.mark.parametrize("interval_mm", [None, 3.0])
def test_of_uneven_slices_and_a_gap(detector, interval_mm):
    volume = volume_of(body_of(len(UNEVEN) + 1), UNEVEN, (3.0, 3.0))
    expected = one_after_the_other(detector, volume, interval_mm)
    assert sum(len(found.boxes) for found in expected) > 20
    assert same(detector.detect_slices(volume, interval_mm, 2, progress=False), expected, 1e-3)


def test_what_is_kept_does_not_grow_with_the_scan(detector, monkeypatch):
    kept = []
    features = SharedImages.features

    def counted(self, stacks):
        result = features(self, stacks)
        kept.append(len(self.known))
        return result

    monkeypatch.setattr(SharedImages, "features", counted)

    def most(slices):
        kept.clear()
        detector.detect_slices(volume_of(body_of(slices), 1.0, (3.0, 3.0)), 1.0, 2, progress=False)
        assert len(kept) == slices // 2
        return max(kept)

    # A stack reaches 8 mm to both sides, two of them one mm further; images begin every mm.
    assert most(24) == most(40) <= 2 * 8 + 1 + 1
    assert kept[-1] < max(kept), "less where the scan ends"


def test_slices_without_a_body_are_left_out_and_their_images_are_not(detector):
    hu = body_of(9)
    hu[4] = -1000
    volume = volume_of(hu, 2.0, (3.0, 3.0))
    found, seen = images_seen(detector, lambda: detector.detect_slices(volume, None, 1, False))
    assert not len(found[4].boxes) and seen == len(images_of(detector, volume, range(9)))
    assert same(found, one_after_the_other(detector, volume, None), 1e-3)


def test_what_may_look_at_a_whole_stack_or_batch_is_not_shared(detector, monkeypatch):
    volume = volume_of(body_of(2), 1.0, (3.0, 3.0))
    assert detector._shared_images(volume) is not None
    with monkeypatch.context() as patch:  # steps of a pipeline of the user's
        patch.setattr(detector, "slice_by_slice", False)
        assert detector._shared_images(volume) is None
    norm = next(m for m in detector.model.backbone.modules() if hasattr(m, "running_mean"))
    norm.train()
    assert detector._shared_images(volume) is None
    norm.eval()

    class Custom(type(detector.model)):
        def extract_feat(self, inputs):
            return super().extract_feat(inputs)

    monkeypatch.setattr(detector.model, "__class__", Custom)
    assert detector._shared_images(volume) is None


def test_a_single_image_has_nothing_to_share(tmp_path):
    detector = detector_of(tmp_path, **{"stack.num_slices": 3, "model.attention": None})
    assert detector._shared_images(volume_of(body_of(2), 1.0, (3.0, 3.0))) is None


def test_batches_of_known_images_alone(detector):
    """A stack between two known ones, whatever the order; and one image written out of slices."""
    volume = volume_of(body_of(12), 2.0, (3.0, 3.0))
    images = detector._shared_images(volume)
    stacks = [plan_volume_stack(volume.positions_mm, k, **detector.stack)[0] for k in (4, 4, 7)]
    with torch.no_grad():
        (first, sample), seen = images_seen(detector, lambda: images.features(stacks[:1]))
        assert seen == 3
        (again, other), seen = images_seen(detector, lambda: images.features(stacks[:2]))
        assert seen == 0 and other is sample
        inputs, _ = detector._inputs_of(volume, stacks[:1], [2.0])
        expected = detector.model.extract_feat(inputs)
    for one, two, three in zip(first, again, expected, strict=True):
        assert one.shape[0] == 1 and two.shape[0] == 2
        torch.testing.assert_close(two, one.expand_as(two), rtol=0, atol=0)
        torch.testing.assert_close(one, three, rtol=0, atol=1e-5 * three.abs().max().item())
