"""Weights run as the network they were trained as: test, --resume and load_from under configs that
compute something else, and under those that do not."""

import functools
import itertools
import json
import re
from types import SimpleNamespace

import pytest

from mmdet_ext.checkpoint import CheckpointError, load_checkpoint_file
from mmdet_ext.config.network import TRAINED_AS, differences, network_of, of_training
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.run import test as run_test
from mmdet_ext.engine.trained_as import TrainedAsHook, check_network

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


@pytest.fixture
def load(trained, repository, phantom, tmp_path):
    """What the runner of a config does with a checkpoint before its weights are loaded, and the
    warnings."""

    def load(checkpoint, testing=True, resume=False, accept=False, **options):
        warnings = []
        runner = SimpleNamespace(
            cfg=configuration(repository, phantom, tmp_path, **options),
            _load_from="weights.pth",
            _strict=testing,
            _resume=resume,
            logger=SimpleNamespace(warning=warnings.append),
        )
        TrainedAsHook(accept).after_load_checkpoint(runner, checkpoint)
        return warnings

    return load


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_is_refused_by_name_with_both_values(trained, load, name):
    options, said = OTHERS[name]
    checkpoint = load_checkpoint_file(trained / "epoch_1.pth")
    for use in (dict(testing=True), dict(testing=False, resume=True)):
        with pytest.raises(CheckpointError, match=said) as refused:
            load(checkpoint, **use, **options)
        assert "weights.pth" in str(refused.value)
        assert "--accept-differences" in str(refused.value)
    (warning,) = load(checkpoint, accept=True, **options)
    assert re.search(said, warning)


def test_nothing_is_tested_or_resumed_as_another_network(trained, repository, phantom, tmp_path):
    """Through the doors of the commands."""
    options, said = OTHERS["operator"]
    with pytest.raises(CheckpointError, match=said):
        apply(repository, phantom, tmp_path, trained, **options)
    assert not (tmp_path / "results.json.gz").exists()
    with pytest.raises(CheckpointError, match=said):
        run(repository, phantom, tmp_path, str(trained / "epoch_1.pth"), **options)
    with pytest.raises(CheckpointError, match=said):
        run(repository, phantom, tmp_path, load_from=str(trained / "epoch_1.pth"), **options)
    with pytest.raises(CheckpointError, match=said):  # a first start that may be resumed later
        run(
            repository, phantom, tmp_path, "auto", load_from=str(trained / "epoch_1.pth"),
            **FIRST, **options,
        )  # fmt: skip
    assert not list(tmp_path.glob("*.pth"))


def test_what_is_meant_runs_with_a_warning(trained, repository, phantom, tmp_path):
    apply(repository, phantom, tmp_path, trained, accept=True, **OTHERS["window"][0])
    assert (tmp_path / "results.json.gz").exists()
    assert "WARNING" in log(tmp_path) and "low: trained with -250" in log(tmp_path)


def test_what_may_differ_passes_without_a_word(trained, load):
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
    checkpoint = load_checkpoint_file(trained / "epoch_1.pth")
    assert load(checkpoint) == load(checkpoint, **options) == []
    # What only training reads may change between two parts of one, but not without a word.
    assert load(checkpoint, testing=False, resume=True) == []
    assert load(checkpoint, testing=False, resume=True, **options) == [
        "weights.pth, model.roi_head.bbox_head.loss_cls.loss_weight: trained with 1.0, the config "
        "says 2.0",
        "weights.pth, model.train_cfg.rcnn.sampler.num: trained with 32, the config says 8",
    ]


def test_weights_to_start_from_are_compared_as_far_as_they_go(trained, load):
    whole = load_checkpoint_file(trained / "epoch_1.pth")
    weights = whole["state_dict"]
    backbone = {k: v for k, v in weights.items() if k.startswith("backbone.")}
    part = dict(state_dict=backbone, meta=whole["meta"])
    start = dict(testing=False)
    for name in ("operator", "window", "anchors", "coder"):
        with pytest.raises(CheckpointError, match=OTHERS[name][1]):
            load(whole, **start, **OTHERS[name][0])
    for name in ("operator", "window"):
        with pytest.raises(CheckpointError, match=OTHERS[name][1]):
            load(part, **start, **OTHERS[name][0])
    # Other data, brought to the network in another way, with another number of classes.
    for name in ("policy", "size"):
        (warning,) = load(whole, **start, **OTHERS[name][0])
        assert re.search(OTHERS[name][1], warning)
    assert len(load(whole, **start, **{"model.rpn_head.num_classes": 2})) == 1
    assert len(load(part, **start, **OTHERS["anchors"][0])) == 1


@pytest.mark.parametrize(
    "experiment, parts, refused",
    [
        ("alignshift", ["backbone"], False),
        ("alignshift", ["backbone", "neck"], True),
        ("a3d", ["backbone"], True),  # its matrices are D x D
        ("25d", ["backbone"], True),  # its slices are channels
        ("volumetric_attention/faster_rcnn_r50", ["backbone", "neck"], False),
        (
            "volumetric_attention/faster_rcnn_r50",
            ["backbone", "neck", "rpn_head", "roi_head"],
            True,
        ),
    ],
)
def test_weights_that_do_not_know_the_number_of_slices_start_with_another(
    repository, experiment, parts, refused
):
    """As the table of docs/training.md has it: a whole detector, or parts of one."""
    name = experiment if "/" in experiment else f"{experiment}_3slice"
    trained, config = (
        load_config(str(repository / f"configs/{name}.py"), {"stack.num_slices": n}) for n in (3, 9)
    )
    checkpoint = dict(
        meta={TRAINED_AS: [network_of(trained)]},
        state_dict={f"{part}.weight": None for part in parts},
    )
    start = functools.partial(check_network, "a.pth", checkpoint, config, False, testing=False)
    if refused:
        with pytest.raises(CheckpointError, match="num_slices: trained with 3, the config says 9"):
            start(start=True)
    else:
        assert any("num_slices: trained with 3" in warning for warning in start(start=True))


def test_a_checkpoint_without_the_record_is_warned_of(trained, load):
    content = load_checkpoint_file(trained / "epoch_1.pth")
    del content["meta"][TRAINED_AS]
    for checkpoint in (content, dict(state_dict=content["state_dict"])):
        (warning,) = load(checkpoint, **OTHERS["window"][0])
        assert "weights.pth does not say what network it was trained as" in warning


# The record


@pytest.mark.parametrize(
    "which",
    [pytest.param("**/*_3slice.py", marks=pytest.mark.slow), "volumetric_attention/*.py"],
)
def test_every_two_experiments_differ_and_each_equals_itself(repository, which):
    files = sorted((repository / "configs").glob(which))
    networks = {str(file): network_of(load_config(str(file))) for file in files}
    for one, network in networks.items():
        assert json.loads(json.dumps(network)) == network, "plain data"
        assert differences(network, network_of(load_config(one))) == []
    for one, other in itertools.combinations(networks, 2):
        assert differences(networks[one], networks[other]), (one, other)


def test_where_and_how_attention_is_paid_is_of_the_network_its_gradients_are_not(repository):
    path = str(repository / "configs/volumetric_attention/faster_rcnn_r50_va.py")
    network = network_of(load_config(path))

    def found(**options):
        overrides = {f"model.{name.replace('__', '.')}": value for name, value in options.items()}
        return differences(network, network_of(load_config(path, overrides)))

    assert found(attention__scale="sqrt", attention__reduction=16) == [], "their defaults"
    assert found(attention__scale="none") == [("model.attention.scale", "sqrt", "none")]
    assert found(attention_location="rcnn") == [("model.attention_location", "rpn", "rcnn")]
    assert found(data_preprocessor__divisor=1.0) == [("model.data_preprocessor.divisor", 57.6, 1.0)]
    assert all(map(of_training, found(attention__detach_context=True, attention__initial_gate=0.9)))


def test_what_of_dino_only_training_sees(repository):
    path = str(repository / "configs/demo/dino_3slice.py")
    layer = "model.encoder.layer_cfg"
    of_training_alone = {
        "model.dn_cfg.group_cfg.num_dn_queries": 40,
        f"{layer}.ffn_cfg.ffn_drop": 0.1,
        f"{layer}.self_attn_cfg.dropout": 0.1,
        "model.bbox_head.loss_iou.loss_weight": 1.0,
    }
    network = network_of(load_config(path))
    found = differences(network, network_of(load_config(path, of_training_alone)))
    assert len(found) == 4 and all(map(of_training, found))
    (fewer,) = differences(network, network_of(load_config(path, {"model.num_queries": 40})))
    assert not of_training(fewer)


def test_how_a_segmentor_of_volumes_is_trained_is_not_of_its_network(repository):
    path = str(repository / "configs/acs_volumes/shapes_acs.py")
    network = network_of(load_config(path))
    training = {"model.loss.smooth": 1.0, "model.init": "kaiming"}
    assert all(map(of_training, differences(network, network_of(load_config(path, training)))))
    (found,) = differences(network, network_of(load_config(path, {"model.fusion.type": "I3DConv"})))
    assert found == ("model.fusion.type", "ACSConv", "I3DConv") and not of_training(found)


def test_an_option_that_the_record_does_not_know_is_taken_for_its_default(repository):
    config = load_config(str(repository / "configs/alignshift_3slice.py"))
    old = network_of(config)
    del old["model"]["backbone"]["fusion"]["zero_padding"], old["stack"]["target_mm"]
    assert differences(old, network_of(config)) == []
    config.model.backbone.fusion.zero_padding = False
    (found,) = differences(old, network_of(config))
    assert found == ("model.backbone.fusion.zero_padding", True, False)
