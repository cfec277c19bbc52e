"""Refuses what a config says but nothing reads: misspelt options, unknown types, variables set too
late. mmengine passes many of them over in silence. `overrides` does so for --cfg-options.

What is provably unread is refused: an option that its class would not take, a type that no registry
has, a near-miss of a valid name. Where the code takes a dict apart itself, what it mentions by name
counts as read; what is left is not known to be read, and is warned of."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import itertools
import operator
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import mmcv.ops
import mmdet.registry as registries
from mmengine.config import Config
from mmengine.registry import FUNCTIONS, Registry, build_from_cfg
from mmengine.runner import Runner
from torch.distributed import init_process_group
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from deeplesion.data.slices import plan_stack
from deeplesion.errors import UserError
from mmdet_ext.config.signatures import arguments, mentions, names_used
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
    "custom_hooks": ("HOOKS", "TRANSFORMS"),
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
# Options that the framework takes out before it calls the class, by the option they stand in or
# the part of the config.
TAKEN_OUT = {
    "default_hooks": {"priority"},
    "custom_hooks": {"priority"},
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
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
    "env_cfg.mp_cfg": {"mp_start_method", "opencv_num_threads"},
    "env_cfg.dist_cfg": _names(init_process_group),
    "randomness": _names(Runner.set_randomness) - {"self"},
    "auto_scale_lr": {"enable", "base_batch_size"},
    "custom_imports": {"imports", "allow_failed_imports"},
}  # fmt: skip
# Dicts that a detector hands on to its parts, and what is in those of MMDetection's own configs
# though nothing reads it any more.
READ_BY_THE_MODEL = {"train_cfg", "test_cfg"}
LEFT_OVER = {"debug"}
# Options of groups of parameters, whose names the user chooses.
PARAMETER_GROUPS = "optim_wrapper.paramwise_cfg.custom_keys"
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


class ConfigError(UserError):
    """A config, or an option of the command line, that says what nothing reads."""


@contextlib.contextmanager
def refused_by_parts() -> Iterator[None]:
    """What the constructor of a config's part refuses, whenever it is built, is the config's fault.

    Raises ConfigError, with the class that refused it, instead of the constructor's ValueError,
    TypeError or AssertionError (with which mmdet's classes check what they are given). These
    errors pass where they do not come from a constructor.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, AssertionError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        parts = [
            getattr(frame.f_locals.get("obj_cls"), "__name__", "a part of the config")
            for frame in frames
            if frame.f_code is build_from_cfg.__code__
        ]
        if not parts:
            raise
        raise ConfigError(f"{parts[-1]}: {error}") from error


class Valid(NamedTuple):
    """The options that a dict may have.

    Attributes:
        names: those that are known.
        others: what becomes of others, as in `signatures.Arguments`.
        mentioned: not among the class's arguments, but the code there may take them out before it
            calls the class. (If it does not, the class raises a TypeError: none is lost.)
    """

    names: set[str]
    others: str
    mentioned: Set[str] = frozenset()


def check_option_names(config: Config) -> None:
    """Checks names and types of the whole config, and what its files assign at the top level.

    Raises ConfigError for the first that nothing reads, with its path and the nearest valid name.
    Warns of those of which that is not known.
    """
    if config.filename:
        _check_file(Path(config.filename))
    options = config.to_dict()
    for key, value in options.items():
        if key in RUNNER:
            _check_values(options, value, key)


def _check_values(config: Mapping, value: Any, path: str) -> None:
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_values(config, item, f"{path}.{i}")
    if not isinstance(value, Mapping):
        return
    valid = valid_names(config, value, path)
    for key in value:
        here = f"{path}.{key}"
        if key not in valid.names and key not in valid.mentioned and valid.others != "kept":
            message = f"{here}: {unknown_name(here, value, valid.names)}"
            if valid.others == "refused" or any(misspells(key, name) for name in valid.names):
                raise ConfigError(message)
            warnings.warn(f"nothing seems to read {message}", stacklevel=2)
    for key, item in value.items():
        _check_values(config, item, f"{path}.{key}")


def misspells(name: str, valid: str) -> bool:
    """Whether a name is a valid one with a letter too few, too many, another or two swapped."""
    same = sum(itertools.takewhile(bool, map(operator.eq, name, valid)))
    rest, expected = name[same:], valid[same:]
    return (
        rest == expected[1:]
        or rest[1:] == expected
        or rest[1:] == expected[1:]
        or (rest[:2] == expected[1::-1] and rest[2:] == expected[2:])
    )


def nearest(name: str, valid: Iterable[str], cutoff: float) -> str | None:
    """The valid name that is most like another, if it is like it at all."""
    close = difflib.get_close_matches(name, valid, 1, cutoff)
    return close[0] if close else None


def unknown_name(path: str, holder: Mapping, valid: Iterable[str], rest: str = "") -> str:
    """The message for a name, the last of `path`, that its holder does not have; `rest` is what
    follows it in an override."""
    parent, _, name = path.rpartition(".")
    kind = holder.get("type")
    if kind is None:
        message = f"{parent} has no option {name!r}"
    else:
        message = f"{getattr(kind, '__name__', kind)} has no argument {name!r}"
    known = sorted({*valid} - {"type", "_scope_"})
    few = len(known) < 50  # else all that the model's code mentions
    if close := nearest(name, valid, cutoff=0.5 if few else 0.8):
        return f"{message}; did you mean {parent}.{close}{rest}?"
    if few:
        message += f"; valid are {', '.join(known) or 'none'}"
    if kind is not None:
        message += (
            f". To replace a type and its options as well: --cfg-options {parent}._delete_=True "
            f"{parent}.type=... (in a file: _delete_=True)"
        )
    return message


def valid_names(config: Mapping, holder: Mapping, path: str) -> Valid:
    """The options that the dict at `path` of the config, `holder`, may have."""
    if path == "resize":  # goes to every RandomAffineResize
        taken = arguments(registries.TRANSFORMS.get("RandomAffineResize"))
        return Valid({*taken.defaults}, taken.others)
    if (known := "stack" if path.endswith(".dataset.stack") else path) in UNTYPED:
        return Valid(UNTYPED[known], "refused")
    if path.startswith(f"{PARAMETER_GROUPS}."):
        kind = config["optim_wrapper"].get("optimizer", {}).get("type")
        optimizer = find(kind, "optim_wrapper.optimizer") if kind else None
        taken = {*arguments(optimizer).defaults} if optimizer else set()
        return Valid({"lr_mult", "decay_mult"} | taken, "refused")
    if "type" not in holder:
        if not path.startswith("model.") or not READ_BY_THE_MODEL & {*path.split(".")}:
            return Valid(set(), "kept")
        read = {*LEFT_OVER}
        for part in _classes(config["model"], "model"):
            read |= names_used(part)
        return Valid(read, "lost")
    kind, parent = resolve(config, holder["type"], path), _holding_class(config, path)
    if kind is None:
        return Valid(set(), "kept")
    taken = arguments(kind)
    names = {*taken.defaults, "type", "_scope_"}
    for place in {_option(path), path.rpartition(".")[0]}:
        names |= TAKEN_OUT.get(place, set())
    if taken.others != "refused" or _option(path) in OPTIONS:
        return Valid(names, taken.others)
    return Valid(names, "refused", mentions(kind).strings | mentions(parent).strings)


def _classes(value: Any, path: str) -> Iterator[Any]:
    """The classes that the dicts in `value` name."""
    if isinstance(value, Mapping):
        if "type" in value:
            yield find(value["type"], path)
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        return
    for key, item in value:
        yield from _classes(item, f"{path}.{key}")


def _holding_class(config: Mapping, path: str) -> Any:
    """The class to which the dict at `path` is given, as an option or within one, or None."""
    found, parts, node = None, path.split("."), config
    for i, part in enumerate(parts[:-1]):
        node = node[int(part)] if isinstance(node, (list, tuple)) else node.get(part, {})
        if isinstance(node, Mapping) and "type" in node:
            found = find(node["type"], ".".join(parts[: i + 1])) or found
    return found


def _option(path: str) -> str:
    """The option whose value, or element of whose value, stands at `path`."""
    return [part for part in path.split(".") if not part.isdigit()][-1]


def resolve(config: Mapping, kind: Any, path: str) -> Any:
    """The class or function that the `type` of the dict at `path` names; None if that is for the
    class there to say, which takes the dict apart itself."""
    if (found := find(kind, path)) is not None:
        return found
    known, code = _known_types(path), mentions(_holding_class(config, path))
    if kind in code.strings and _option(path) not in OPTIONS:
        return None
    message = f"{path}.type: {kind!r} is not registered"
    module = _module_of(kind)
    if module and module not in sys.modules:
        raise ConfigError(
            f"{message}: it is in {module}, which custom_imports does not name. A list of one's "
            "own takes the place of the base's; one that adds to it is "
            "custom_imports = dict(imports=[*_base_.custom_imports.imports, ...])"
        )
    if "type" in code.popped and not any(misspells(kind, name) for name in known):
        warnings.warn(f"{message}, but the code there has types of its own", stacklevel=2)
        return None
    close = nearest(kind, known, cutoff=0.5)
    hint = f"; did you mean {close!r}?" if close else ""
    raise ConfigError(
        f"{message}{hint} (a class of your own is registered when its module is in custom_imports)"
    )


def _module_of(name: str) -> str | None:
    """The module of this package that defines a class of that name."""
    package = Path(__file__).resolve().parent.parent
    definition = re.compile(rf"^class {re.escape(name)}\b", re.M)
    for file in sorted(package.rglob("*.py")):
        if definition.search(file.read_text(encoding="utf-8")):
            return ".".join([package.name, *file.relative_to(package).with_suffix("").parts])
    return None


def _places(path: str) -> Mapping | list[Registry]:
    places = OPTIONS.get(_option(path)) or PARTS.get(path.partition(".")[0], ())
    if isinstance(places, Mapping):
        return places
    return [places] if isinstance(places, Registry) else [getattr(registries, p) for p in places]


def find(kind: Any, path: str) -> Any:
    """The class or function that `kind` names at `path`; None if no registry has it."""
    if not isinstance(kind, str):
        return kind
    places = _places(path)
    if isinstance(places, Mapping):
        return places.get(kind)
    for registry in places:
        with contextlib.suppress(RuntimeError):  # of a package that is not installed
            if found := registry.get(kind):
                return found
    return None


def _known_types(path: str) -> list[str]:
    places = _places(path)
    if isinstance(places, Mapping):
        return [name for name, value in places.items() if callable(value)]
    return [name for registry in places for name in _registered(registry)]


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
    for name in Config._get_base_files(str(path)):  # which may be computed
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
        if close := nearest(name, RUNNER, cutoff=0.8):
            raise ConfigError(
                f"{path}: {name} is no option of the runner and nothing reads it; did you mean "
                f"{close}?"
            )
    return [*bases, read]
