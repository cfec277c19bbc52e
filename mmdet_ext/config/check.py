"""Refuses what a config says but nothing reads: misspelt options, unknown types, variables set too
late. mmengine passes many of them over in silence. `config_overrides` does so for --cfg-options."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mmcv.ops
import mmdet.registry as registries
from mmengine.config import Config
from mmengine.registry import FUNCTIONS, Registry
from mmengine.runner import Runner
from torch.distributed import init_process_group
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from deeplesion.data.slices import plan_stack
from mmdet_ext.config.signatures import arguments
from mmdet_ext.ops import OPERATORS

# What a `type` may name, by the part of the config that it stands in ...
LOADER = ("DATASETS", "DATA_SAMPLERS", "TRANSFORMS")
PARTS = {
    "model": ("MODELS", "TASK_UTILS"),
    "data_preprocessor": ("MODELS",),
    "train_dataloader": LOADER,
    "val_dataloader": LOADER,
    "test_dataloader": LOADER,
    "train_cfg": ("LOOPS",),
    "val_cfg": ("LOOPS",),
    "test_cfg": ("LOOPS",),
    "val_evaluator": ("METRICS", "EVALUATOR"),
    "test_evaluator": ("METRICS", "EVALUATOR"),
    "optim_wrapper": ("OPTIM_WRAPPERS", "OPTIMIZERS"),
    "param_scheduler": ("PARAM_SCHEDULERS",),
    "default_hooks": ("HOOKS",),
    "custom_hooks": ("HOOKS",),
    "visualizer": ("VISUALIZERS", "VISBACKENDS"),
    "log_processor": ("LOG_PROCESSORS",),
    "model_wrapper_cfg": ("MODEL_WRAPPERS",),
}
# ... or, before that, by the option whose value it is.
OPTIONS = {
    "fusion": OPERATORS,
    "init_cfg": ("WEIGHT_INITIALIZERS",),
    "override": ("WEIGHT_INITIALIZERS",),
    "nms": vars(mmcv.ops),
    "roi_layer": vars(mmcv.ops),
    "collate_fn": FUNCTIONS,
    "worker_init_fn": FUNCTIONS,
}
# Options that the framework takes out before it calls the class, by the option they stand in.
TAKEN_OUT = {
    "optim_wrapper": {"constructor", "paramwise_cfg"},
    "param_scheduler": {"convert_to_iter_based"},
    "norm_cfg": {"requires_grad"},
    "upsample_cfg": {"scale_factor"},
    "init_cfg": {"override", "layer"},
    "nms": {"class_agnostic", "split_thr"},
}


def _names(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


# The options of dicts whose type, if they have one, names no class, by where they stand.
LOADER_OPTIONS = _names(DataLoader) | {"num_batch_per_epoch", "disable_subprocess_warning"}
PROPOSALS = {"nms_pre", "max_per_img", "nms", "min_bbox_size"}
UNTYPED = {
    "train_dataloader": LOADER_OPTIONS,
    "val_dataloader": LOADER_OPTIONS,
    "test_dataloader": LOADER_OPTIONS,
    "optim_wrapper.clip_grad": _names(clip_grad_norm_) | {"type", "clip_value"},
    "optim_wrapper.paramwise_cfg": {
        "custom_keys", "lr_mult", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult",
        "dwconv_decay_mult", "flat_decay_mult", "dcn_offset_lr_mult", "bypass_duplicate",
    },
    "stack": _names(plan_stack) - {"key_slice", "thickness_mm", "slice_range"},
    "resize": {  # RandomAffineResize's
        "size", "prob", "shift", "scale", "rotation", "flip_prob", "box_from", "interpolation",
        "augment",
    },
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
    "env_cfg.mp_cfg": {"mp_start_method", "opencv_num_threads"},
    "env_cfg.dist_cfg": _names(init_process_group),
    "randomness": _names(Runner.set_randomness) - {"self"},
    "auto_scale_lr": {"enable", "base_batch_size"},
    "custom_imports": {"imports", "allow_failed_imports"},
    "model.train_cfg": {"rpn", "rpn_proposal", "rcnn"},
    "model.train_cfg.rpn": {"assigner", "sampler", "allowed_border", "pos_weight", "debug"},
    "model.train_cfg.rpn_proposal": PROPOSALS,
    "model.train_cfg.rcnn": {"assigner", "sampler", "mask_size", "pos_weight", "debug"},
    "model.test_cfg": {"rpn", "rcnn"},
    "model.test_cfg.rpn": PROPOSALS,
    "model.test_cfg.rcnn": {"score_thr", "nms", "max_per_img", "mask_thr_binary"},
}  # fmt: skip
# Dicts whose keys the user chooses.
NAMED_BY_USER = {"optim_wrapper.paramwise_cfg.custom_keys"}
# The top level: what the runner is made of, and what it looks up in the config later.
RUNNER = (_names(Runner.__init__) - {"self", "cfg"}) | {
    "custom_imports",
    "model_wrapper_cfg",
    "stack",
    "resize",
    "find_unused_parameters",
    "sync_bn",
    "compile",
    "activation_checkpointing",
    "efficient_conv_bn_eval",
}


class ConfigError(ValueError):
    """A config, or an option of the command line, that says what nothing reads."""


def check_config(config: Config) -> None:
    """Checks names and types of the whole config, and what its files assign at the top level.

    Raises ConfigError for the first that is unknown, with its path and the nearest valid name.
    """
    if config.filename:
        _check_file(Path(config.filename))
    for key, value in config.to_dict().items():
        if key in RUNNER:
            _check_values(value, key)


def _check_values(value: Any, path: str) -> None:
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_values(item, f"{path}.{i}")
    if not isinstance(value, Mapping):
        return
    valid = valid_names(value, path)
    for key, item in value.items():
        if valid is not None and key not in valid:
            raise ConfigError(f"{path}.{key}: {unknown_name(f'{path}.{key}', value, valid)}")
        _check_values(item, f"{path}.{key}")


def unknown_name(path: str, holder: Mapping, valid: Iterable[str], rest: str = "") -> str:
    """The message for a name, the last of `path`, that its holder does not have; `rest` is what
    follows it in an override."""
    parent, _, name = path.rpartition(".")
    kind = holder.get("type")
    if kind is None:
        message = f"{parent} has no option {name!r}"
    else:
        message = f"{getattr(kind, '__name__', kind)} has no argument {name!r}"
    close = difflib.get_close_matches(name, valid, 1, cutoff=0.5)
    if close:
        return f"{message}; did you mean {parent}.{close[0]}{rest}?"
    message += f"; valid are {', '.join(sorted({*valid} - {'type', '_scope_'})) or 'none'}"
    if kind is not None:
        message += (
            f". To replace a type and its options as well: --cfg-options {parent}._delete_=True "
            f"{parent}.type=... (in a file: _delete_=True)"
        )
    return message


def valid_names(holder: Mapping, path: str) -> set[str] | None:
    """The options that the dict at `path` may have; None if that is not known."""
    if "type" not in holder or path in UNTYPED:
        names = UNTYPED.get(path)
        if names and path.startswith("model.") and not names & {*holder}:
            return None  # another detector's
        return names
    names = arguments(resolve(holder["type"], path))
    if names is None:
        return None
    return {*names, "type", "_scope_"} | TAKEN_OUT.get(_option(path), set())


def _option(path: str) -> str:
    """The option whose value, or element of whose value, stands at `path`."""
    return [part for part in path.split(".") if not part.isdigit()][-1]


def resolve(kind: Any, path: str) -> Any:
    """The class or function that a `type` names where it stands."""
    if not isinstance(kind, str):
        return kind
    places = OPTIONS.get(_option(path)) or PARTS.get(path.partition(".")[0], ())
    if isinstance(places, Mapping):
        if kind in places:
            return places[kind]
        known = [name for name, value in places.items() if callable(value)]
    else:
        places = [places] if isinstance(places, Registry) else [_registry(p) for p in places]
        for registry in places:
            with contextlib.suppress(RuntimeError):
                if found := registry.get(kind):
                    return found
        known = [name for registry in places for name in _registered(registry)]
    close = difflib.get_close_matches(kind, known, 1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"{path}.type: {kind!r} is not registered{hint} (a class of your own is registered when "
        "its module is in custom_imports)"
    )


def _registry(name: str) -> Registry:
    return getattr(registries, name)


def _registered(registry: Registry | None) -> Iterator[str]:
    while registry is not None:
        yield from registry.module_dict
        registry = registry.parent


def _check_file(path: Path) -> list[set[str]]:
    """Checks what a config file assigns at its top level; returns the names that it and its bases
    read, a set each."""
    if path.suffix != ".py":
        return []
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:  # mmengine's own placeholders, {{fileDirname}} and the like
        return []
    assigned: dict[str, ast.expr] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    assigned[target.id] = statement.value
    bases: list[set[str]] = []
    if "_base_" in assigned:
        names = ast.literal_eval(assigned["_base_"])
        for name in [names] if isinstance(names, str) else names:
            if "::" not in name:  # a config of another package
                bases += _check_file(path.parent / name)
    read = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    for name in assigned:
        if name in RUNNER or name in read or name.startswith("_"):
            continue
        if name in UNTYPED["stack"]:
            raise ConfigError(
                f"{path}: nothing reads {name} here; did you mean stack = dict({name}=...)?"
            )
        if any(name in base for base in bases):
            raise ConfigError(
                f"{path}: {name} is read while the base config is loaded; assigned here it changes "
                "nothing. Set the options that are made from it."
            )
        close = difflib.get_close_matches(name, RUNNER, 1, cutoff=0.8)
        if close:
            raise ConfigError(
                f"{path}: {name} is no option of the runner and nothing reads it; did you mean "
                f"{close[0]}?"
            )
    return [*bases, read]
