"""What an experiment states once for several of its parts: the stack of slices, and the resizing.

    stack = dict(num_slices=7, policy="keep_thick")  # what `load_slices` takes
    resize = dict(size=192, prob=0.3)  # what `RandomAffineResize` takes

stand at the top level of a config. Every data set whose pipeline loads slices gets the stack, the
detector its `num_slices`, and every `RandomAffineResize` what `resize` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdet_ext.config.check import ConfigError


def read_experiment(path: str | Path) -> Config:
    """A config file with `stack` and `resize` where they belong."""
    config = Config.fromfile(path)
    spread(config)
    return config


def spread(config: Config) -> None:
    """Writes `stack` and `resize` of the top level to all that they concern.

    Raises ConfigError where one of these says something else already.
    """
    stack, resize = config.get("stack"), config.get("resize", {})
    if stack is not None:
        _state("model", config.model, "num_slices", stack.num_slices, "stack.num_slices")
    for split in ("train", "val", "test"):
        loader = f"{split}_dataloader"
        for path, node in _dicts(config.get(loader), loader):
            if stack is not None and _loads_slices(node):
                node.setdefault("stack", {})
                own = node["stack"]
                for name, value in stack.items():
                    _state(f"{path}.stack", own, name, value, f"stack.{name}")
            if node.get("type") == "RandomAffineResize":
                for name, value in resize.items():
                    _state(path, node, name, value, f"resize.{name}")


def _state(path: str, holder: dict, name: str, value: Any, source: str) -> None:
    if holder.setdefault(name, value) != value:
        raise ConfigError(
            f"{path}.{name} is {holder[name]!r}, but {source} is {value!r}, which holds for every "
            f"part: set {source} and leave out {path}.{name}"
        )


def _loads_slices(node: Mapping) -> bool:
    steps = node.get("pipeline") or ()
    return any(isinstance(s, Mapping) and s.get("type") == "LoadCTSlices" for s in steps)


def _dicts(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Every dict in nested dicts and lists, and its path."""
    if isinstance(node, Mapping):
        yield path, node
        items = node.items()
    else:
        items = enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, item in list(items):
        yield from _dicts(item, f"{path}.{key}")
