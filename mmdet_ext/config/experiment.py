"""What an experiment states once for several of its parts: the stack of slices, and the resizing.

    stack = dict(num_slices=7, policy="keep_thick")  # what `load_slices` takes
    resize = dict(size=192, prob=0.3)  # what `RandomAffineResize` takes

stand at the top level of a config. Every data set whose pipeline loads slices gets the stack, a
detector that takes it its `num_slices`, and every `RandomAffineResize` what `resize` says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_ext.config.check import ConfigError

SHARED = ("stack", "resize")


def read_experiment(path: str | Path) -> Config:
    """A config file with `stack` and `resize` where they belong."""
    config = Config.fromfile(path)
    spread(config)
    return config


def spread(config: Config, replace: bool = False) -> None:
    """Writes `stack` and `resize` of the top level to all that they concern.

    Raises ConfigError where one of these says something else already, unless `replace`.
    """

    def state(path: str, holder: dict, name: str, value: Any, source: str) -> None:
        if replace:
            holder[name] = value
        elif holder.setdefault(name, value) != value:
            raise ConfigError(
                f"{path}.{name} is {holder[name]!r}, but {source} is {value!r}, which holds for "
                f"every part: set {source} and leave out {path}.{name}"
            )

    stack, resize = config.get("stack"), config.get("resize", {})
    if stack is not None and _takes_num_slices(config.get("model")):
        state("model", config.model, "num_slices", stack.num_slices, "stack.num_slices")
    for split in ("train", "val", "test"):
        loader = f"{split}_dataloader"
        for path, node in dicts(config.get(loader), loader):
            if stack is not None and _loads_slices(node):
                node.setdefault("stack", {})
                own = node["stack"]
                for name, value in stack.items():
                    state(f"{path}.stack", own, name, value, f"stack.{name}")
            if node.get("type") == "RandomAffineResize":
                for name, value in resize.items():
                    state(path, node, name, value, f"resize.{name}")


def _takes_num_slices(model: Mapping | None) -> bool:
    """Whether the detector has that argument: mmdet's own 2D detectors, say, do not."""
    kind = model and model.get("type")
    classes = inspect.getmro((MODELS.get(kind) if isinstance(kind, str) else kind) or object)
    return any("num_slices" in inspect.signature(c.__init__).parameters for c in classes)


def _loads_slices(node: Mapping) -> bool:
    steps = node.get("pipeline") or ()
    return any(isinstance(s, Mapping) and s.get("type") == "LoadCTSlices" for s in steps)


def dicts(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Every dict in nested dicts and lists, and its path."""
    if isinstance(node, Mapping):
        yield path, node
        items = node.items()
    else:
        items = enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, item in list(items):
        yield from dicts(item, f"{path}.{key}")
