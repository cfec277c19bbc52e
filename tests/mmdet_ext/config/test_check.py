"""Configs and --cfg-options: what is valid passes, what nothing would read is refused by name."""

import argparse
import contextlib
import copy
import functools
import operator
import re
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from torch import nn

from mmdet_ext.config.check import RUNNER, ConfigError, check_option_names, misspells
from mmdet_ext.config.overrides import apply_overrides
from mmdet_ext.config.signatures import arguments

from ...run_command import command

ROOT = Path(__file__).resolve().parents[3]
ALIGNSHIFT = ROOT / "configs/alignshift_7slice.py"
DEMO = ROOT / "configs/demo/alignshift_3slice.py"  # init_cfg=None, AdamW


@pytest.mark.parametrize(
    "path",
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("configs/**/*.py")
        if "_base_" not in path.parts
    ),
)
def test_configs_pass(path):
    check_option_names(Config.fromfile(ROOT / path))


# Of MMDetection's config folders: other data sets, trackers, and training recipes.
NO_MODEL_FAMILIES = {
    "_base_", "common", "albu_example", "bytetrack", "cityscapes", "crowddet", "deepfashion",
    "deepsort", "dsdl", "instaboost", "legacy_1.x", "lvis", "mask2former_vis", "masktrack_rcnn",
    "misc", "objects365", "ocsort", "openimages", "pascal_voc", "qdtrack", "reid", "scratch",
    "selfsup_pretrain", "simple_copy_paste", "soft_teacher", "sort", "strong_baselines",
    "strongsort", "timm_example", "v3det", "wider_face",
}  # fmt: skip
# Twins of other files, with a deeper backbone or a longer schedule.
TWIN = re.compile("(?!.*(dconv|dcn)).*([rx]101|[23]x_)")


@pytest.mark.slow
def test_every_model_of_mmdetection_that_builds_passes():
    models, refused = {}, {}
    root = Path(mmdet.__file__).parent / ".mim/configs"
    for path in sorted(root.glob("*/*.py")):
        if path.parent.name in NO_MODEL_FAMILIES or TWIN.match(path.name):
            continue
        with contextlib.suppress(ImportError):  # of mmpretrain, which is not installed
            if model := Config.fromfile(path).get("model"):
                models.setdefault(str(model), (path, model))
    assert len(models) > 261
    for path, model in models.values():
        try:
            check_option_names(Config(dict(model=model)))
        except ConfigError as error:
            refused[path] = error, model
    for path, (error, model) in refused.items():
        mmdet_scope = DefaultScope.overwrite_default_scope("mmdet")
        # A TypeError is of an argument that a class does not have.
        with mmdet_scope, torch.device("meta"), contextlib.suppress(TypeError):
            MODELS.build(model)
            pytest.fail(f"{path} builds, but is refused: {error}")


def options_of(value, path=""):
    """The dotted paths of all options in a config."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        here = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield here
        if isinstance(item, (dict, list, tuple)):
            yield from options_of(item, here)


NAMED_BY_USER = ("default_hooks", "data_prefix", "custom_keys")


@pytest.mark.parametrize("path", [ALIGNSHIFT, DEMO], ids=lambda path: path.parent.name)
@pytest.mark.parametrize("slip", [lambda n: n + n[-1], lambda n: n[1] + n[0] + n[2:]])
def test_each_option_of_our_experiments_is_refused_when_misspelt(path, slip):
    config = read(path).to_dict()
    config["val_evaluator"] = [config["val_evaluator"]]
    count = 0
    for option in options_of({key: config[key] for key in RUNNER & {*config}}):
        first, *between = [int(p) if p.isdigit() else p for p in option.split(".")]
        if not between:
            continue
        name = between.pop()
        by_user = [first, *between][-1] in NAMED_BY_USER
        misspelt = slip(name) if len(name) > 2 else name
        if by_user or name == "type" or misspelt == name:
            continue
        wrong = {first: copy.deepcopy(config[first])}
        holder = functools.reduce(operator.getitem, between, wrong[first])
        holder[misspelt] = holder.pop(name)
        with pytest.raises(ConfigError, match=re.escape(f".{misspelt}: ")):
            check_option_names(Config(wrong))
            pytest.fail(f"{option} as {misspelt} passes")
        count += 1
    assert count > 150


class Builder(nn.Module):
    """Takes its dict apart itself."""

    def __init__(self, layer, **kwargs):
        super().__init__()
        self.kind = layer.pop("type")


MODELS.register_module(name="BuilderOfTheTests", module=Builder)
OTHER_HEAD = dict(type="Mask2FormerHead", in_channels=[1], feat_channels=1, out_channels=1)


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(type="BuilderOfTheTests", layer=dict(type="any-layer")), "'any-layer' is not reg"),
        (dict(type="RPN", rpn_head=dict(**OTHER_HEAD, strides=[4])), "no argument 'strides'"),
        (dict(type="RPN", train_cfg=dict(rpn=dict(zzz=1))), "no option 'zzz'"),
    ],
)
def test_what_may_be_read_is_warned_of(model, message):
    with pytest.warns(UserWarning, match=message):
        check_option_names(Config(dict(model=model)))


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(type="BuilderOfTheTests", layer=dict(type="ResNet-")), "did you mean 'ResNet'"),
        (dict(type="BuilderOfTheTests", layr=1), "did you mean model.layer"),
        (dict(type="ResNet", depth=50, dcn=dict(type="DCN", fallback_on_strid=1)), "fallback_on_"),
        (dict(type="RPN", rpn_head=dict(type="RPNHead"), train_cfg=dict(rpn=dict(allowed_borde=1))),
         "did you mean model.train_cfg.rpn.allowed_border"),
        (dict(type="RetinaNet", test_cfg=dict(score_th=1), bbox_head=dict(type="RetinaHead")),
         "did you mean model.test_cfg.score_thr"),
        (dict(type=MODELS.get("FPN"), out_chanels=1), "did you mean model.out_channels"),
        (dict(type="mmdet.FPN", out_chanels=1), "did you mean model.out_channels"),
        (dict(type="FPN", _scope_="mmdet", out_chanels=1), "did you mean model.out_channels"),
    ],
)  # fmt: skip
def test_near_misses_are_refused_in_other_detectors(model, message):
    with pytest.raises(ConfigError, match=message):
        check_option_names(Config(dict(model=model)))


def test_a_base_may_be_computed(tmp_path):
    """Failed before."""
    file = tmp_path / "mine.py"
    file.write_text(f"_base_ = {str(ROOT)!r} + '/configs/a3d_3slice.py'\ndata_root = 'x'\n")
    with pytest.raises(ConfigError, match="data_root is read while the base config is loaded"):
        check_option_names(Config.fromfile(file))
    file.write_text(f"_base_ = ['/'.join([{str(ROOT)!r}, 'configs/a3d_3slice.py'])]\n")
    check_option_names(Config.fromfile(file))


@pytest.mark.parametrize("lr, error", [("lr", None), ("lrr", "did you mean .*optimizer.lr")])
def test_lazy_configs(tmp_path, lr, error):
    """MMEngine's newer format: classes in place of their names."""
    file = tmp_path / "lazy.py"
    file.write_text(
        "from mmengine.config import read_base\n"
        "from mmengine.optim import OptimWrapper\nfrom torch.optim import SGD\n"
        f"optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, {lr}=0.1))\n"
    )
    with pytest.raises(ConfigError, match=error) if error else contextlib.nullcontext():
        check_option_names(Config.fromfile(file))


@pytest.mark.parametrize(
    "name, valid, expected",
    [
        ("score_th", "score_thr", True),
        ("scores_thr", "score_thr", True),
        ("scare_thr", "score_thr", True),
        ("socre_thr", "score_thr", True),
        ("isr", "score_thr", False),
        ("pos_weight", "loss_weight", False),
        ("soer_thr", "score_thr", False),
    ],
)
def test_a_misspelling_is_one_slip(name, valid, expected):
    assert misspells(name, valid) == misspells(valid, name) == expected


def test_a_config_passes_as_a_run_has_dumped_it(tmp_path):
    Config.fromfile(DEMO).dump(tmp_path / "dumped.py")
    check_option_names(Config.fromfile(tmp_path / "dumped.py"))


@functools.cache
def read(path):
    return Config.fromfile(path)


def override(path, *options):
    """A config with options as they are typed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    config = copy.deepcopy(read(path))
    apply_overrides(config, parser.parse_args(["--cfg-options", *options]).cfg_options)
    check_option_names(config)
    return config


@pytest.mark.parametrize(
    "options",
    [
        ["model.backbone.init_cfg=None"],
        ["model.backbone.growth=16"],  # an argument that the config leaves out
        ["model.backbone.fusion._delete_=True", "model.backbone.fusion.type=TSMConv"],
        ["model.neck.norm_cfg.type=BN", "model.neck.norm_cfg.requires_grad=False"],
        ["model.train_cfg.rpn.sampler.num=64", "model.train_cfg.rpn.sampler.rng=3"],
        ["model.test_cfg.rcnn.nms.type=soft_nms", "model.test_cfg.rcnn.nms.class_agnostic=True"],
        ["train_dataloader.batch_size=2", "train_dataloader.pin_memory=True"],
        ["resize.size=256", "stack.target_mm=1.0"],
        ["resize.size=[256,128]", "randomness.seed=None"],
        ["train_dataloader.dataset.indices=10"],
        ["optim_wrapper.accumulative_counts=4", "optim_wrapper.clip_grad.type=value"],
        ["optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult=0.1"],
        [f"optim_wrapper.optimizer.{o}" for o in ("_delete_=True", "type=AdamW", "lr=1e-3")],
        ["param_scheduler.1.milestones=[3,4]", "param_scheduler.0.convert_to_iter_based=False"],
        ["default_hooks.stop.type=EarlyStoppingHook", "default_hooks.stop.monitor=FROC/average"],
        ["work_dir=/x", "resume=True", "randomness.deterministic=True"],
        ["env_cfg.dist_cfg.timeout=100", "sync_bn=torch", "auto_scale_lr.enable=True"],
    ],
    ids=lambda options: options[0],
)
def test_valid_options_are_set(options):
    config = override(ALIGNSHIFT, *options)
    for option in options:
        path, _, text = option.partition("=")
        value = config
        if path.endswith("_delete_"):
            continue
        for part in path.split("."):
            value = value[int(part) if part.isdigit() else part]
        assert str(value).replace(" ", "") in (text, text.replace("1e-3", "0.001"))
    assert "_delete_" not in str(config)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            "model.backbne.fusion=1",
            "has no argument 'backbne'; did you mean model.backbone.fusion?",
        ),
        ("model.backbone.fusion.n_fld=4", "did you mean model.backbone.fusion.n_fold?"),
        ("model.backbone.fusion.type=TSMCnv", "'TSMCnv' is not registered; did you mean 'TSMConv'"),
        # It is there, as another kind of part.
        (
            "model.backbone.fusion.type=KeySliceFPN",
            r"'KeySliceFPN' is not registered(;| \(a class)",
        ),
        # What the old type had is still there.
        ("model.backbone.fusion.type=TSMConv", r"ref_thickness: TSMConv .* _delete_=True"),
        ("optim_wrapper.optimizer.type=AdamW", r"optimizer.momentum: AdamW has no argument"),
        ("optim_wrapper.optimizer.type=AdamWW", "did you mean 'AdamW'"),
        # Nothing in mmdet would notice these two: **kwargs swallows them.
        ("model.rpn_head.bbox_coder.target_std=1", "did you mean .*bbox_coder.target_stds"),
        ("model.train_cfg.rcnn.sampler.nm=1", "did you mean model.train_cfg.rcnn.sampler.num"),
        ("model.test_cfg.rcnn.score_th=0.1", "did you mean model.test_cfg.rcnn.score_thr"),
        ("model.test_cfg.rcnn.nms.iou_thr=0.1", "did you mean .*nms.iou_threshold"),
        ("model.neck.norm_cfg.type=BNN", "'BNN' is not registered; did you mean 'BN'"),
        ("train_dataloader.batchsize=2", "did you mean train_dataloader.batch_size"),
        ("train_dataloader.dataset.pipeline.9.size=2", "is a list with the indices 0 to 3"),
        ("train_dataloader.dataset.pipeline.-1.size=2", "is a list with the indices 0 to 3"),
        ("train_dataloader.dataset.pipeline.2.sise=2", r"did you mean .*pipeline.2.size"),
        ("default_hooks.checkpoint.max_keep=2", "did you mean .*checkpoint.max_keep_ckpts"),
        ("default_hooks.chekpoint.interval=2", "did you mean default_hooks.checkpoint.interval"),
        ("custom_hooks.0.type=EMAHook", "custom_hooks is None"),
        ("train_cfg.max_epoch=2", "did you mean train_cfg.max_epochs"),
        ("param_scheduler.1.milestone=2", "did you mean param_scheduler.1.milestones"),
        ("test_evaluator.pixeloffset=0", "did you mean test_evaluator.pixel_offset"),
        ("env_cfg.cudnn_benchmrk=0", "did you mean env_cfg.cudnn_benchmark"),
        ("randomness.sed=0", "did you mean randomness.seed"),
        ("wrk_dir=0", "did you mean work_dir"),
        ("zzz=0", "a config has no option 'zzz'"),
        # Values
        ("train_dataloader.batch_size=two", "expected a number, such as the config's 8, got 'two'"),
        ("model.backbone.with_cp=yes", "expected True or False"),
        ("model.backbone.with_cp=1", "expected True or False"),
        ("model.backbone.with_cp=None", "expected True or False"),
        ("train_dataloader.num_workers=True", "expected a number, .* got True"),
        ("resize.size=[512,wide]", r"expected a number, .* got \[512, 'wide'\]"),
        ("stack.num_slices.x=3", "is 7, which has no options"),
        ("model.backbone.block_config.1=3", r"by default \(6, 12, 24\): give all of it"),
        # Variables of the config file have been read by now.
        ("stack.num_slice=3", "did you mean stack.num_slices"),
        ("num_slices=3", "a config has no option 'num_slices'"),
        ("data_root=x", "changes nothing.*Set .*train_dataloader.dataset.data_root"),
        ("train_pipeline.2.type=Resize", r"Set train_dataloader.dataset.pipeline.2.type"),
        ("custom_imports.imports=[mine]", "custom_imports is read while the config file is loaded"),
        ("launcher=pytorch", "--launcher"),
        ("test_evaluator.result_file=x", "--out"),
    ],
)
def test_an_option_that_nothing_reads_is_refused_with_what_was_meant(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        override(ALIGNSHIFT, options)
    assert options.partition("=")[0].rpartition(".")[0] in str(error.value)


def test_options_of_what_is_none_need_its_type():
    checkpoint = "model.backbone.init_cfg.checkpoint=/a.pth"
    with pytest.raises(ConfigError, match=r"init_cfg is None.*give model.backbone.init_cfg.type"):
        override(DEMO, checkpoint)
    config = override(DEMO, "model.backbone.init_cfg.type=Pretrained", checkpoint)
    assert config.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="/a.pth")


def test_a_user_names_parameter_groups():
    option = "optim_wrapper.paramwise_cfg.custom_keys.fc_cls.lr_mult=0.1"
    groups = override(DEMO, option).optim_wrapper.paramwise_cfg.custom_keys
    assert groups.fc_cls == dict(lr_mult=0.1) and "neck" in groups


def test_parameter_groups_take_what_mmengine_reads():
    group = "optim_wrapper.paramwise_cfg.custom_keys.neck"
    config = override(DEMO, f"{group}.decay_mult=0", f"{group}.betas=[0.9,0.99]")
    groups = config.optim_wrapper.paramwise_cfg.custom_keys
    assert groups.neck == dict(lr_mult=0.5, decay_mult=0, betas=[0.9, 0.99])
    check_option_names(config)
    with pytest.raises(
        ConfigError, match=r"no option 'decay_mul'; did you mean .*neck.decay_mult\?"
    ):
        override(DEMO, f"{group}.decay_mul=0")
    groups["backbone.conv0"] = dict(lr_mul=0.1)
    with pytest.raises(ConfigError, match=r"no option 'lr_mul'; did you mean .*conv0.lr_mult\?"):
        check_option_names(config)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model = dict(neck=dict(num_slice=3))", "model.neck.num_slice: .*model.neck.num_slices"),
        ("model = dict(backbone=dict(fusion=dict(type='Tsm')))", "fusion.type: 'Tsm' is not"),
        ("custom_hooks = [dict(type='EarlyStoppingHook', monitr=1)]", "custom_hooks.0.monitr: "),
        ("train_dataloader = dict(num_worker=1)", "train_dataloader.num_worker:"),
        ("param_schedulers = []", "param_schedulers .* did you mean param_scheduler"),
        ("wrok_dir = 'x'", "nothing reads it; did you mean work_dir"),
        # Read in the base, which is done by then.
        ("data_root = 'x'", "data_root is read while the base config is loaded"),
    ],
)
def test_files_are_checked(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(f"_base_ = '{ALIGNSHIFT}'\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        check_option_names(Config.fromfile(file))


@pytest.mark.parametrize(
    "text",
    [
        "width = 256\nprint_it = [width]",
        "note = 'second try'",
        "model = dict(neck=dict(_delete_=True, type='FPN', in_channels=[1], out_channels=1,"
        " num_outs=1))",
        "custom_hooks = [dict(type='EMAHook', momentum=0.1)]",
        "train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=3)",
        "root = '{{fileDirname}}'\nwidth = {{_base_.data_root}}",
    ],
)
def test_files_of_users_pass(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(f"_base_ = '{ALIGNSHIFT}'\n{text}\n")
    check_option_names(Config.fromfile(file))


class Parent:
    def __init__(self, a, b=2):
        pass


class Passes(Parent):
    def __init__(self, c, *args, **kwargs):
        kwargs.setdefault("looked_up", 1)
        super().__init__(*args, **kwargs)


class Swallows(Parent):
    def __init__(self, c, **kwargs):
        super().__init__(c)


class LooksUp(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.size = options.get("size", 3)


class Keeps:
    def __init__(self, c, **kwargs):
        self.options = kwargs


class SkipsAParent(Passes):
    def __init__(self, d, **kwargs):
        super(Passes, self).__init__(1, **kwargs)


@pytest.mark.parametrize(
    "function, expected, others",
    [
        (Parent, {"a", "b"}, "refused"),
        (Passes, {"a", "b", "c", "looked_up"}, "refused"),
        (SkipsAParent, {"a", "b", "d"}, "refused"),
        (Swallows, {"c"}, "lost"),
        (LooksUp, {"size"}, "lost"),
        (Keeps, {"c"}, "kept"),
        (type("Child", (Passes,), {}), {"a", "b", "c", "looked_up"}, "refused"),
        (lambda x, y=1: 0, {"x", "y"}, "refused"),
        (lambda **k: 0, set(), "kept"),
        (object, set(), "refused"),
    ],
)
def test_arguments_follow_kwargs_to_where_they_go(function, expected, others):
    found = arguments(function)
    assert (set(found.defaults), found.others) == (expected, others)


def test_defaults_come_with_the_arguments():
    assert arguments(Passes).defaults["b"] == 2
    assert arguments(MODELS.get("TruncatedDenseNet3D")).defaults["growth"] == 32


def test_modules_that_a_list_of_ones_own_leaves_out_are_named(repository, tmp_path):
    """Failed before: a class of MMDetection was named as what had been meant."""
    (tmp_path / "own.py").write_text(
        f"_base_ = {str(ALIGNSHIFT)!r}\ncustom_imports = dict(imports=['json'])\n"
    )
    output = command(repository, "tools/complexity.py", tmp_path / "own.py", expect=1)
    found = re.search(r"type: '(\w+)' is not registered: it is in (\S+), which", output)
    assert f"class {found[1]}(" in (repository / f"{found[2].replace('.', '/')}.py").read_text()
    assert "dict(imports=[*_base_.custom_imports.imports, ...])" in output
