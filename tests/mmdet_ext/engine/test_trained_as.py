"""Weights run as the network they were trained as: test, --resume and load_from under configs that
compute something else, and under those that do not."""

import json

import pytest

from mmdet_ext.checkpoint import load_checkpoint_file, save_checkpoint_file
from mmdet_ext.config.network import TRAINED_AS, differences, network_of
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.run import test as run_test

from ..small_training import configuration, log, run

FIRST = {"train_cfg.max_epochs": 1}


@pytest.fixture(scope="module")
def trained(repository, phantom, tmp_path_factory):
    """The work directory of an AlignShift detector on 3 slices."""
    return run(repository, phantom, tmp_path_factory.mktemp("trained"), **FIRST)


def apply(repository, phantom, folder, checkpoint, accept=False, **options):
    config = configuration(repository, phantom, folder, **options)
    return run_test(config, str(checkpoint), accept_differences=accept)


# Options of another experiment whose weights have the same names and shapes, and what is said.
OTHERS = {
    "operator": (
        {"model.backbone.fusion._delete_": True, "model.backbone.fusion.type": "TSMConv"},
        r"model\.backbone\.fusion\.type: trained with 'AlignShiftConv', the config says 'TSMConv'",
    ),
    "option of the operator": (
        {"model.backbone.fusion.ref_thickness": 5.0},
        r"fusion\.ref_thickness: trained with 2\.0, the config says 5\.0",
    ),
    "its default": (
        {"model.backbone.fusion.zero_padding": False},
        r"fusion\.zero_padding: trained with True, the config says False",
    ),
    "window": (
        {"model.data_preprocessor.low": -1024},
        r"model\.data_preprocessor\.low: trained with -250, the config says -1024",
    ),
    "policy": (
        {"stack.policy": "normalize"},
        r"stack\.policy: trained with 'keep_thick', the config says 'normalize'",
    ),
    "anchors": (
        {"model.rpn_head.anchor_generator.scales": [2, 3, 4, 6]},
        r"scales: trained with \[4, 6, 8, 12\], the config says \[2, 3, 4, 6\]",
    ),
    "coder": (
        {"model.roi_head.bbox_head.bbox_coder.target_stds": [1.0, 1.0, 1.0, 1.0]},
        r"target_stds: trained with \[0\.1, 0\.1, 0\.2, 0\.2\], the config says \[1\.0",
    ),
    "size": (
        {"resize.size": 128},
        r"RandomAffineResize\.size: trained with 96, the config says 128",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_is_refused_by_name_with_both_values(
    trained, repository, phantom, tmp_path, name
):
    options, said = OTHERS[name]
    with pytest.raises(SystemExit, match=said) as refused:
        apply(repository, phantom, tmp_path, trained, **options)
    assert "best_FROC" in str(refused.value) or "epoch_1.pth" in str(refused.value)
    assert "--accept-differences" in str(refused.value)
    assert not (tmp_path / "results.json.gz").exists()


def test_what_is_meant_runs_with_a_warning(trained, repository, phantom, tmp_path):
    apply(repository, phantom, tmp_path, trained, accept=True, **OTHERS["window"][0])
    assert (tmp_path / "results.json.gz").exists()
    assert "WARNING" in log(tmp_path) and "low: trained with -250" in log(tmp_path)


def test_what_may_differ_runs_without_a_word(trained, repository, phantom, tmp_path):
    options = {
        "model.test_cfg.rcnn.score_thr": 0.1,
        "model.test_cfg.rpn.nms_pre": 50,
        "model.train_cfg.rcnn.sampler.num": 8,
        "model.roi_head.bbox_head.loss_cls.loss_weight": 2.0,
        "model.backbone.with_cp": True,
        "model.backbone.fusion.n_fold": 8,
        "resize.size": [96, 96],
        "resize.prob": 0.1,
        "test_dataloader.batch_size": 2,
        "test_dataloader.num_workers": 2,
    }
    apply(repository, phantom, tmp_path, trained, **options)
    assert "trained with" not in log(tmp_path)


def test_resuming_needs_the_same_network_too(trained, repository, phantom, tmp_path):
    last = str(trained / "epoch_1.pth")
    for name in ("operator", "window", "policy", "anchors"):
        options, said = OTHERS[name]
        with pytest.raises(SystemExit, match=said):
            run(repository, phantom, tmp_path, last, **options)
    assert not list(tmp_path.glob("*.pth"))
    # What only training reads may change, but not without a word.
    options = {**FIRST, "model.train_cfg.rcnn.sampler.num": 8}
    run(repository, phantom, tmp_path, last, **options)
    said = "model.train_cfg.rcnn.sampler.num: trained with 32, the config says 8"
    assert said in log(tmp_path)


def test_weights_to_start_from_are_compared_as_far_as_they_go(
    trained, repository, phantom, tmp_path
):
    whole = str(trained / "epoch_1.pth")
    with pytest.raises(SystemExit, match=OTHERS["operator"][1]):
        run(repository, phantom, tmp_path / "a", load_from=whole, **FIRST, **OTHERS["operator"][0])
    # Other data, brought to the network in another way, with another number of classes.
    free = {**OTHERS["policy"][0], **OTHERS["size"][0], "model.rpn_head.num_classes": 1}
    run(repository, phantom, tmp_path / "b", load_from=whole, **FIRST, **free)
    assert "stack.policy: trained with 'keep_thick'" in log(tmp_path / "b")

    content = load_checkpoint_file(trained / "epoch_1.pth")
    backbone = {k: v for k, v in content["state_dict"].items() if k.startswith("backbone.")}
    part = tmp_path / "backbone.pth"
    save_checkpoint_file(dict(state_dict=backbone, meta=content["meta"]), part)
    run(repository, phantom, tmp_path / "c", load_from=str(part), **FIRST, **OTHERS["anchors"][0])
    with pytest.raises(SystemExit, match=OTHERS["operator"][1]):
        run(repository, phantom, tmp_path / "d", load_from=str(part), **OTHERS["operator"][0])


def test_a_checkpoint_without_the_record_is_warned_of(trained, repository, phantom, tmp_path):
    content = load_checkpoint_file(trained / "epoch_1.pth")
    del content["meta"][TRAINED_AS]
    save_checkpoint_file(content, tmp_path / "old.pth")
    apply(repository, phantom, tmp_path, tmp_path / "old.pth", **OTHERS["window"][0])
    assert "old.pth does not say what network it was trained as" in log(tmp_path)


# The record


def experiments(repository):
    configs = repository / "configs"
    return sorted([*configs.glob("*.py"), *configs.glob("*/*.py")])


def test_every_two_experiments_differ_and_each_equals_itself(repository):
    names = [f for f in experiments(repository) if f.parent.name != "_base_"]
    networks = {file: network_of(load_config(str(file))) for file in names}
    for one in names:
        assert json.loads(json.dumps(networks[one])) == networks[one], "plain data"
        for other in names:
            found = differences(networks[one], networks[other])
            assert bool(found) == (one != other), (one, other)


def test_an_option_that_the_record_does_not_know_is_taken_for_its_default(repository):
    config = load_config(str(repository / "configs/alignshift_3slice.py"))
    old = network_of(config)
    del old["model"]["backbone"]["fusion"]["zero_padding"], old["stack"]["target_mm"]
    assert differences(old, network_of(config)) == []
    config.model.backbone.fusion.zero_padding = False
    (found,) = differences(old, network_of(config))
    assert found == ("model.backbone.fusion.zero_padding", True, False)
