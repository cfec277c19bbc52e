"""An exported detector finds what `LesionDetector` does, with any operator, in torch and in
onnxruntime; what cannot be exported is refused by name; an export is there whole or not at all."""

import numpy as np
import pytest
import torch

from ct_volumes.export_format import read_manifest
from ct_volumes.exported import ExportedDetector
from deeplesion.errors import DataError, UserError
from mmdet_ext.engine import export as module
from mmdet_ext.engine.export import OPENS, export
from mmdet_ext.engine.exportable import check_exportable
from mmdet_ext.engine.predict import LesionDetector

from ..small_detector import (
    ROOT,
    body_of,
    config_of,
    phantom_series,
    volume_of,
    without_masks,
    write_checkpoint,
)
from .test_predict import images_of

NO_FUSION = ROOT / "configs/demo/nofusion_3slice.py"
OPERATORS = [
    "A3DConv", "ACSConv", "AlignA3DConv", "AlignACSConv", "AlignShiftConv", "I3DConv",
    "MeanACSConv", "P3DConv", "SliceConv", "SoftACSConv", "TSMConv",
]  # fmt: skip
OTHERS = {name: {"path": NO_FUSION, "model.backbone.fusion": dict(type=name)} for name in OPERATORS}
OTHERS["25d"] = {"path": NO_FUSION, "model.backbone.slices_as_channels": True}
OTHERS["boxes alone"] = without_masks()
OTHERS["windows and attention"] = {
    "path": NO_FUSION,
    "model.data_preprocessor.windows": [(-1024, 2050), (-160, 240)],
    "model.neck.attention": dict(type="SliceAttention", embed=32, heads=2, feedforward=32),
}
OTHERS["as the scan is"] = {"test_dataloader.dataset.pipeline": [dict(type="PackCTInputs")]}
KINDS = ["torch-export", "onnx"]


def need(kind):
    if kind == "onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name, reason=f"needs {name}, docs/export.md")


def detector_of(folder, seed=3, **options):
    config = config_of(**options)
    return LesionDetector(config, write_checkpoint(config, folder / "epoch_1.pth", seed), "cpu")


def let_scores_differ(detector, volume, key):
    """Scales the layers of the scores to logits whose deviation is 1: where many scores are 1 to
    the last bit, as random weights make them, any of the boxes may come first."""
    for layer in (detector.model.rpn_head.rpn_cls, detector.model.roi_head.bbox_head.fc_cls):
        seen = []
        hook = layer.register_forward_hook(lambda *_, seen=seen: seen.append(_[-1]))
        with torch.no_grad(), hook:
            detector._detect_batch(volume, [key])
            layer.weight /= seen[0].std()


def exported(detector, folder, kind, size=()):
    export(detector, folder, kind, size)
    return ExportedDetector(folder, OPENS[kind])


def assert_same(found, expected):
    """Boxes to 0.01 pixel, scores to 0.001, and masks but for a pixel at their edges."""
    assert [each.index for each in found] == [each.index for each in expected]
    for one, other in zip(found, expected):
        assert one.boxes.dtype == other.boxes.dtype == np.float32
        np.testing.assert_allclose(one.boxes, other.boxes, atol=0.01)
        np.testing.assert_allclose(one.scores, other.scores, atol=0.001)
        assert (one.masks is None) == (other.masks is None)
        for a, b in zip(one.masks or (), other.masks or (), strict=True):
            grid = np.zeros((2, 600, 600), bool)
            a.paint(grid[0]), b.paint(grid[1])
            assert (grid[0] != grid[1]).sum() <= max(2, 0.01 * grid[1].sum())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return detector_of(tmp_path_factory.mktemp("weights"), seed=0)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "torch-export"
    export(small, folder, "torch-export", (96, 96))  # of any size it takes four times as long
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return ExportedDetector(folder, OPENS["torch-export"])


def test_an_export_finds_what_the_detector_does(small, found):
    """On thin and thick slices, that are not square; from a score on."""
    hu = body_of(4)[:, :, :100]
    for interval_mm in (1.0, 5.0):
        volume = volume_of(hu, interval_mm, (3.0, 3.0))
        expected = small.detect_slices(volume, None, progress=False)
        assert sum(len(each.masks) for each in expected) > 8
        assert_same(found.detect_slices(volume, None, progress=False), expected)
        assert_same(found.detect_slices(volume, None, 1, progress=False), expected)
        least = float(np.median(np.concatenate([each.scores for each in expected]))) + 1e-4
        some = small.detect_slices(volume, None, progress=False, least_score=least)
        assert 0 < sum(len(e.scores) for e in some) < sum(len(e.scores) for e in expected)
        assert_same(found.detect_slices(volume, None, progress=False, least_score=least), some)
    assert found.key(volume, 1.0, False) != small.key(volume, 1.0, False)
    assert found.algorithm({}).options == {"exported": "torch-export"}
    for name in ("name", "checkpoint_sha256", "network_sha256", "software", "size", "stack"):
        assert getattr(found, name) == getattr(small, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_any_operator_on_ten_slices_of_the_phantom(options, kind, phantom, tmp_path):
    need(kind)
    # So that of an untrained detector's boxes, which lie near each other, more than a few are left.
    options = {"model.test_cfg.rcnn.nms.iou_threshold": 0.9, **options}
    detector = detector_of(tmp_path, **options)
    images = images_of(phantom)[:5]
    let_scores_differ(detector, *phantom_series(phantom, images[0]))
    found = exported(detector, tmp_path / "export", kind)
    number = 0
    for image in images:
        volume, key = phantom_series(phantom, image)
        with torch.no_grad():
            expected = detector._detect_batch(volume, [key - 1, key])
        looking = found.looking(volume, False, 0.0)
        with looking as look:
            assert_same(look([key - 1, key]), expected)
        number += sum(len(each.boxes) for each in expected)
    assert number > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["alignshift_3slice", "25d_3slice"])
def test_a_released_detector(name, kind, tmp_path):
    """Its anchors and masks lie on whole pixels, its boxes are half a pixel smaller."""
    need(kind)
    channels = {
        "neck.out_channels": 32, "rpn_head.in_channels": 32, "rpn_head.feat_channels": 32,
        "roi_head.bbox_roi_extractor.out_channels": 32, "roi_head.bbox_head.in_channels": 32,
        "roi_head.mask_roi_extractor.out_channels": 32, "roi_head.mask_head.in_channels": 32,
        "roi_head.bbox_head.fc_out_channels": 64, "neck.in_channels": (36, 30, 27),
        "backbone.growth": 12, "backbone.bn_size": 2, "backbone.stem_channels": 24,
        "backbone.init_cfg": None, "test_cfg.rcnn.max_per_img": 30,
    }  # fmt: skip
    options = {f"model.{path}": value for path, value in channels.items()}
    options["path"] = ROOT / f"configs/released/{name}.py"
    detector = detector_of(tmp_path, seed=0, **options)
    found = exported(detector, tmp_path / "export", kind, (96, 96))
    for interval_mm in (1.0, 5.0):
        volume = volume_of(body_of(4)[:, :, :100], interval_mm, (3.0, 3.0))
        expected = detector.detect_slices(volume, None, progress=False)
        assert sum(len(each.scores) for each in expected) > 10
        assert_same(found.detect_slices(volume, None, progress=False), expected)


def test_what_cannot_be_exported_is_named(small, tmp_path, monkeypatch):
    attention = LesionDetector.__new__(LesionDetector)
    attention.name, attention.model = "faster_rcnn_r50_va", type("SliceGroupFasterRCNN", (), {})()
    with pytest.raises(UserError, match="a SliceGroupFasterRCNN cannot be exported"):
        check_exportable(attention)
    with monkeypatch.context() as patch:
        head = small.model.roi_head.bbox_head
        patch.setattr(head, "__class__", type("Other", (type(head),), {}))
        with pytest.raises(UserError, match=r"its roi_head.bbox_head is a Other"):
            check_exportable(small)
    with monkeypatch.context() as patch:
        patch.setitem(small.model.test_cfg.rcnn.nms, "type", "soft_nms")
        with pytest.raises(UserError, match=r"test_cfg.rcnn.nms is .*soft_nms"):
            check_exportable(small)
    with monkeypatch.context() as patch:
        patch.setattr(small.model.data_preprocessor, "pad_size_divisor", 64)
        with pytest.raises(UserError, match="padded to multiples of 64 pixels, not of 32"):
            check_exportable(small)
    for option, value in (("clip_border", False), ("add_ctr_clamp", True)):
        with monkeypatch.context() as patch:
            patch.setattr(small.model.rpn_head.bbox_coder, option, value)
            with pytest.raises(UserError, match=r"its rpn_head.bbox_coder has another clip_border"):
                check_exportable(small)
    with monkeypatch.context() as patch:
        patch.setitem(small.model.roi_head._modules, "shared_head", torch.nn.Identity())
        with pytest.raises(UserError, match="its roi_head has a shared_head"):
            check_exportable(small)
    with monkeypatch.context() as patch:
        patch.setattr(small, "steps", [dict(type="RandomFlip")])
        with pytest.raises(UserError, match="its test pipeline has RandomFlip"):
            check_exportable(small)
    for size in ((96, 100), (96,), (0, 32), (64, 64)):
        with pytest.raises(UserError, match="--size"):
            export(small, tmp_path / "export", "torch-export", size)
    assert not (tmp_path / "export").exists()


def test_programs_that_find_something_else_are_not_kept(small, tmp_path, monkeypatch):
    def of_another(path):
        return lambda *inputs: [np.float32([each.mean()]) for each in inputs]

    monkeypatch.setattr(module, "traced", lambda *_: b"a program")
    monkeypatch.setitem(OPENS, "torch-export", of_another)
    with pytest.raises(UserError, match="the program features does not give what the network"):
        export(small, tmp_path / "export", "torch-export")
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize("looks", [lambda t: float(t.min()) > 2, lambda t: 1 in t.tolist()])
def test_an_operator_that_looks_at_values_is_refused(looks, small, tmp_path, monkeypatch, capfd):
    operator = next(part for part in small.model.backbone.modules() if hasattr(part, "fuse"))
    monkeypatch.setattr(operator, "fuse", lambda x, thickness: x if looks(thickness) else 2 * x)
    with pytest.raises(UserError, match="the program features cannot be written as torch-export"):
        export(small, tmp_path / "export", "torch-export", (96, 96))
    assert not (tmp_path / "export").exists() and len(capfd.readouterr().err) < 1000


def test_a_program_of_one_size_refuses_another(folder):
    manifest = read_manifest(folder)
    assert manifest["input"]["program_size"] == [96, 96]
    volume = volume_of(body_of(2), 1.0, (3.0, 3.0))
    places = [(0, 0, 0.0)]
    one = ExportedDetector(folder, lambda path: None, manifest)
    assert one.slices(volume, places)[0].shape == (1, 96, 96)
    one.size = (100, 96)  # padded to 128
    with pytest.raises(DataError, match="takes images of 96 x 96 pixels alone"):
        one.slices(volume, places)


def test_a_damaged_program_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / read_manifest(tmp_path)["programs"]["boxes"]["file"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged"):
        ExportedDetector(tmp_path, lambda path: None)
    for kind, content in (("torch-export", b"no program"), ("onnx", b"no program")):
        path.write_bytes(content)
        need(kind)
        with pytest.raises(DataError, match="cannot read"):
            OPENS[kind](path)
