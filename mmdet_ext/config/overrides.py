"""Merges --cfg-options into a config, refusing those that would change nothing or something else
than meant."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from deeplesion.errors import MissingDataError
from mmdet_ext.config.check import (
    PARAMETER_GROUPS,
    RUNNER,
    UNTYPED,
    ConfigError,
    Valid,
    resolve,
    unknown_name,
    valid_names,
)
from mmdet_ext.config.experiment import SHARED, spread
from mmdet_ext.config.signatures import arguments

# What an override would change without effect, and what to do instead.
WITHOUT_EFFECT = {
    "custom_imports": "read while the config file is loaded; write a config file over this one",
    "launcher": "given by the command's own option, --launcher",
}


class Overrides(DictAction):
    """argparse's action for `--cfg-options k=v ...`: mmengine's, which says what it cannot read,
    and keeps the spaces of a text."""

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        text = val.strip("'\"")
        bare = text.strip()
        if "," in bare or (bare[:1], bare[-1:]) in (("(", ")"), ("[", "]")):
            if re.search(r"[^\s,()[\]]\s+[^\s,()[\]]", bare):
                raise ValueError("a part of a list cannot hold spaces")  # mmengine takes them out
            return DictAction._parse_iterable(bare)
        value = DictAction._parse_int_float_bool(bare)
        return text if isinstance(value, str) else value

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if not value.partition("=")[0] or "=" not in value:
                raise argparse.ArgumentError(self, f"expected name=value, got {value!r}")
            try:
                self._parse_iterable(value.partition("=")[2])
            except (AssertionError, ValueError, IndexError, SyntaxError) as error:
                raise argparse.ArgumentError(self, f"cannot read {value!r}: {error}") from None
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser, checkpoint: bool = True) -> None:
    """`--cfg-options` of a command that reads a config, and of one that loads a `checkpoint` for it
    `--accept-differences`."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=Overrides,
        metavar="k=v",
        help="override options of the config",
    )
    if checkpoint:
        parser.add_argument(
            "--accept-differences",
            action="store_true",
            help="use the checkpoint even if it was trained as another network than the config's",
        )


def use_data(root: Path) -> None:
    """Prepared data, `--data` of a command, for all configs that it and its children read. Raises
    MissingDataError if there is no such folder."""
    if not root.is_dir():
        raise MissingDataError(f"there is no folder {root}: --data is that of the annotations")
    os.environ["DEEPLESION_ROOT"] = str(root.resolve())


def apply_overrides(config: Config, overrides: Mapping[str, Any]) -> None:
    """Merges `--cfg-options`, dotted paths and values, into a config; `stack` and `resize` into
    every part that they concern.

    Raises ConfigError for a path that is neither there nor an argument of the class there, with the
    nearest that is; for a variable of the config file, which has been read by now; for an index
    beyond its list; for what is no number, or not True or False, in place of one; for what a
    command sets itself; for one HU window where several are set.
    """
    before = config.to_dict()
    merged = dict(overrides)
    for path, value in overrides.items():
        try:
            _check_override(before, path, value, overrides)
        except ConfigError as error:
            raise ConfigError(f"--cfg-options {path}: {error}") from None
        parent = path.rpartition(".")[0]
        if path.endswith(".type") and _at(before, parent) is None:
            merged[f"{parent}._delete_"] = True  # else mmengine does not merge into None
    spread(config)
    shared = {path: merged.pop(path) for path in overrides if path.partition(".")[0] in SHARED}
    config.merge_from_dict(shared)
    spread(config, replace=True)  # above, and of a run's own dump, the parts hold the old values
    config.merge_from_dict(merged)
    spread(config)
    for path in overrides:
        parent, _, name = path.rpartition(".")
        if name in ("low", "high"):
            windows = _at(config.to_dict(), f"{parent}.windows")
            if isinstance(windows, (list, tuple)):
                raise ConfigError(
                    f"--cfg-options {path}: {parent}.windows is set, and takes the place of low "
                    "and high; change that"
                )


def _at(config: Any, path: str) -> Any:
    """What stands at a path; the path itself if there is nothing."""
    for part in path.split("."):
        if isinstance(config, (list, tuple)) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, Mapping) and part in config:
            config = config[part]
        else:
            return path
    return config


def _check_override(config: dict, path: str, value: Any, overrides: Mapping[str, Any]) -> None:
    first, *rest = parts = path.split(".")
    if first == "test_evaluator" and rest and rest[-1] == "result_file":  # of one of several, too
        raise ConfigError(f"{path} is given by the command's own option, --out")
    for key in (path, first):
        if key in WITHOUT_EFFECT:
            raise ConfigError(f"{key} is {WITHOUT_EFFECT[key]}")
    if first not in RUNNER:
        if first in config:
            raise ConfigError(_too_late(config, first, rest))
        if first in UNTYPED["stack"]:
            raise ConfigError(f"a config has no option {first!r}; did you mean stack.{first}?")
        raise ConfigError(_no_such(first, {*RUNNER, *config}, rest))
    node: Any = config.get(first)
    for i, part in enumerate(rest, start=1):
        here = ".".join(parts[:i])
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{here} is a list with the indices 0 to {len(node) - 1}")
            node = node[int(part)]
            continue
        typed = {"type": overrides[f"{here}.type"]} if f"{here}.type" in overrides else {}
        if not isinstance(node, Mapping):
            if not typed:
                more = f"; give {here}.type as well" if node is None and not part.isdigit() else ""
                raise ConfigError(f"{here} is {node!r}, which has no options{more}")
            node = {}
        if part in ("type", "_delete_"):
            return
        holder = {**node, **typed}
        valid = valid_names(config, holder, here)
        known = valid.others != "kept"
        if not known and not holder.get("type") and here != PARAMETER_GROUPS:
            # It is not known what is valid here: what is there, and what has a type.
            valid = Valid({*node} | ({part} if f"{here}.{part}.type" in overrides else set()), "")
            known = True
        if known and part not in node and part not in valid.names | valid.mentioned:
            raise ConfigError(
                unknown_name(f"{here}.{part}", holder, valid.names, _dotted(parts[i + 1 :]))
            )
        if part not in node:
            _check_new(config, holder, here, part, parts[i + 1 :])
            return
        node = node[part]
    if not _takes(node, value):
        kind = "True or False" if isinstance(node, bool) else "a number"
        raise ConfigError(f"expected {kind}, such as the config's {node}, got {value!r}")


def _takes(node: Any, value: Any) -> bool:
    """Whether a value is of the kind of the number, or of the True or False, that it replaces. Of
    a number also None, and one for each axis, are."""
    if isinstance(node, bool):
        return isinstance(value, bool)
    if not isinstance(node, (int, float)) or value is None:
        return True
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _dotted(parts: Iterable[str]) -> str:
    return "".join(f".{part}" for part in parts)


def _check_new(config: Mapping, holder: Mapping, here: str, part: str, rest: list[str]) -> None:
    """Of an argument that the config leaves at its default no piece can be set."""
    if not rest or "type" not in holder:
        return
    kind = resolve(config, holder["type"], here)
    default = arguments(kind).defaults.get(part) if kind else None
    if default is not None and not isinstance(default, Mapping):
        raise ConfigError(
            f"{here}.{part} is not in the config and by default {default!r}: give all of it, "
            f"{here}.{part}=..."
        )


def _no_such(name: str, valid: Iterable[str], rest: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, 1, cutoff=0.5)
    hint = f"; did you mean {'.'.join([close[0], *rest])}?" if close else ""
    return f"a config has no option {name!r}{hint}"


def _too_late(config: dict, name: str, rest: list[str]) -> str:
    """The message for an override of a variable of the config file."""
    value = config[name]
    places = []

    def search(node: Any, path: str) -> None:
        same = isinstance(node, (dict, list)) and node == value
        if same or path.rpartition(".")[2] == name:
            places.append(path + _dotted(rest))
        elif isinstance(node, Mapping):
            for key, item in node.items():
                search(item, f"{path}.{key}")
        elif isinstance(node, (list, tuple)):
            for i, item in enumerate(node):
                search(item, f"{path}.{i}")

    for key in RUNNER & config.keys():
        search(config[key], key)
    places.sort()
    others = f"Set {', '.join(places)}, or write" if places else "Write"
    return (
        f"{name} is a variable of the config file and is read while the file is loaded; set "
        f"afterwards it changes nothing. {others} a config file over this one."
    )
