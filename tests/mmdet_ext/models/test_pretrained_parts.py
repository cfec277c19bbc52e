"""Parts of a detector from a checkpoint of another: those alone, and only if they are the same."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope, init_default_scope

from deeplesion.errors import MissingDataError, UserError
from mmdet_ext.checkpoint import CheckpointError, save_checkpoint_file
from mmdet_ext.config.check import ConfigError, refused_by_parts
from mmdet_ext.engine.run import load_config
from mmdet_ext.models.pretrained import copy_parts

SMALL = {
    "model.backbone.base_channels": 4,
    "model.roi_head.bbox_head.fc_out_channels": 16,
    "model.neck.in_channels": [4, 8, 16, 32],
}
PARTS = ["backbone", "neck", "rpn_head"]


def detector(repository, name, seed=0, build=True, **options):
    path = str(repository / f"configs/{name}.py")
    model = load_config(path, {**SMALL, **options}).model
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")
    torch.manual_seed(seed)
    model = MODELS.build(model)
    if build:
        model.init_weights()
    return model


@pytest.fixture(scope="module")
def of_deeplesion(repository, tmp_path_factory):
    """Faster R-CNN with attention and one class, as DeepLesion's are."""
    model = detector(repository, "demo/volumetric_attention", seed=1)
    path = tmp_path_factory.mktemp("pretrained") / "epoch_12.pth"
    save_checkpoint_file(dict(state_dict=model.state_dict(), meta={}), path)
    return path, model.state_dict()


def test_these_parts_are_copied_and_nothing_else(repository, of_deeplesion):
    path, weights = of_deeplesion
    plain = detector(repository, "demo/lits_va").state_dict()
    model = detector(
        repository, "demo/lits_va",
        **{"model.pretrained.checkpoint": str(path), "model.pretrained.parts": PARTS},
    )  # fmt: skip
    copied = {key for key in weights if key.partition(".")[0] in PARTS}
    assert {key.partition(".")[0] for key in copied} == {*PARTS}
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key] if key in copied else plain[key]), key
    assert any(not torch.equal(plain[key], weights[key]) for key in copied)


def test_the_report_names_every_key(repository, of_deeplesion):
    path, weights = of_deeplesion
    model = detector(repository, "demo/lits_va")
    first, left, fresh = copy_parts(model, path, PARTS).splitlines()
    copied = {key for key in weights if key.partition(".")[0] in PARTS}
    assert first.startswith(f"copied {len(copied)} tensors: backbone ")
    assert set(left.partition(": ")[2].split(", ")) == weights.keys() - copied
    assert set(fresh.partition(": ")[2].split(", ")) == model.state_dict().keys() - copied
    assert "roi_head.mask_head" in fresh and "roi_head.bbox_head" in left


def test_bare_weights_and_other_parts_do_too(repository, of_deeplesion, tmp_path):
    _, weights = of_deeplesion
    save_checkpoint_file(dict(weights), tmp_path / "weights.pth")
    model = detector(repository, "demo/lits_va")
    copy_parts(model, tmp_path / "weights.pth", [*PARTS, "attention"])
    for key, value in model.attention.state_dict().items():
        assert torch.equal(value, weights[f"attention.{key}"])


def test_what_does_not_fit_is_refused_by_name(repository, of_deeplesion, tmp_path):
    path, weights = of_deeplesion
    model = detector(repository, "demo/lits")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match="parts: the detector has no part 'attention'; it has back"):
        copy_parts(model, path, [*PARTS, "attention"])
    with pytest.raises(MissingDataError, match=r"none\.pth"):
        copy_parts(model, tmp_path / "none.pth", PARTS)
    for change, message in (
        (lambda w: w.pop("neck.lateral_convs.0.conv.weight"), "conv.weight is missing"),
        (lambda w: w.update({"backbone.other": torch.ones(1)}), "backbone.other is not in"),
        (lambda w: w.update({"rpn_head.rpn_cls.bias": torch.ones(9)}), r"has shape \(9,\), the"),
        (lambda w: [w.pop(k) for k in [*w] if k.startswith("neck")], "it has no neck, but att"),
    ):
        changed = dict(weights)
        change(changed)
        save_checkpoint_file(dict(state_dict=changed), tmp_path / "changed.pth")
        with pytest.raises(CheckpointError, match=message):
            copy_parts(model, tmp_path / "changed.pth", PARTS)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "what is refused changes nothing"
    with pytest.raises(ValueError, match="pretrained has no option 'path'"):
        detector(repository, "demo/lits", build=False, **{"model.pretrained.path": "x"})


def test_a_checkpoint_needs_the_parts_to_take_from_it(repository):
    options = {"model.pretrained.checkpoint": "x.pth"}
    with pytest.raises(ConfigError, match=r"needs pretrained\.parts"), refused_by_parts():
        detector(repository, "demo/volumetric_attention", build=False, **options)


def test_with_a_checkpoint_imagenet_is_not_fetched(repository):
    options = {"model.pretrained.checkpoint": "x.pth"}
    name = "volumetric_attention/lits_mask_rcnn_r50"
    small = {"model.backbone.depth": 18, "model.neck.in_channels": [64, 128, 256, 512]}
    model = detector(repository, name, build=False, **small)
    assert model.backbone.init_cfg["type"] == "Pretrained"
    model = detector(repository, name, build=False, **small, **options)
    assert "Pretrained" not in str(model.backbone.init_cfg)


@pytest.mark.parametrize("of", ["faster_rcnn_r50", "faster_rcnn_r50_va", "mask_rcnn_r50_va"])
def test_the_experiments_on_deeplesion_have_the_same_parts(repository, of):
    def parts(name):
        path = str(repository / f"configs/volumetric_attention/{name}.py")
        config = load_config(path, {"model.backbone.init_cfg": None})
        with torch.device("meta"):
            state = MODELS.build(config.model).state_dict()
        return {k: v.shape for k, v in state.items() if k.partition(".")[0] in PARTS}

    assert parts(of) == parts("lits_mask_rcnn_r50_va") != {}
