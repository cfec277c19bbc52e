"""What a network computes, as plain data: a checkpoint carries it, and a config is compared with it
before the weights run.

Names and shapes of weights do not tell it. AlignShift's fit TSM's network and that of no fusion,
and a HU window, an anchor or a stack of slices has no weights at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from mmengine.config import Config

from deeplesion.data.slices import plan_stack
from mmdet_ext.config.check import UNTYPED, find
from mmdet_ext.config.experiment import dicts
from mmdet_ext.config.signatures import arguments

TRAINED_AS = "trained_as"  # where a checkpoint's meta has it: a list, of networks it may be

# Options that change nothing of what is computed, neither in training nor in testing ...
WITHOUT_EFFECT = {"init_cfg", "pretrained", "with_cp", "non_blocking", "backend_args", "_scope_"}
# ... the thresholds of testing, which say what is kept of it, and those that only training reads.
THRESHOLDS = {"test_cfg"}
TRAINING = {
    "train_cfg", "assigner", "sampler", "batch_augments", "norm_eval", "frozen_stages",
    "reg_decoded_bbox", "drop_rate", "drop_path_rate", "dropout", "attn_drop", "proj_drop",
    "ffn_drop", "dn_cfg", "sync_cls_avg_factor",
    "detach_context", "initial_gate",
    "loss",  # of a segmentor
    "init", "transfer",  # how the weights of a network for volumes begin
    "stem",  # how pretrained weights become those of the first convolution
}  # fmt: skip
AUGMENTATION = {"prob", "shift", "scale", "rotation", "flip_prob", "augment", "box_from"}
# The steps of a pipeline that do not change the image.
NO_IMAGE = ("LoadAnnotations", "Pack")
# Named for training; in testing they compute the same.
SAME = {"SyncBatchNorm": "BatchNorm2d", "MMSyncBatchNorm": "BatchNorm2d"}


class Difference(NamedTuple):
    """An option that differs: its path, what the weights were trained with, what the config says;
    of an option that is not there at all `NOT_THERE`."""

    path: str
    trained: Any
    config: Any

    def __str__(self) -> str:
        return f"{self.path}: trained with {self.trained!r}, the config says {self.config!r}"


class _NotThere:
    def __repr__(self) -> str:
        return "nothing"


NOT_THERE = _NotThere()


def network_of(config: Config) -> dict:
    """What an experiment's network computes, as dicts, lists, strings and numbers.

    Returns:
        model: the detector's options, those left at their defaults included; without the thresholds
            of testing and what changes no result.
        stack, pipeline: of its test data (or that of validation or training, if it has none):
            which slices around a key slice, and the steps that change the image.
    """
    found = {"model": config.get("model")}
    loaders = (f"{split}_dataloader" for split in ("test", "val", "train"))
    datasets = (d for name in loaders for _, d in dicts(config.get(name), name) if "pipeline" in d)
    if dataset := next(datasets, None):
        found |= {"stack": dataset.get("stack"), "pipeline": dataset["pipeline"]}
    return complete(found)


def complete(network: Mapping) -> dict:
    """Fills in the defaults of the classes of today, and leaves out what does not matter."""
    found = {"model": _complete(network.get("model"), "model")}
    if network.get("stack"):
        parameters = inspect.signature(plan_stack).parameters
        defaults = {name: parameters[name].default for name in UNTYPED["stack"]}
        found["stack"] = _complete({**defaults, **network["stack"]}, "stack")
    if network.get("pipeline"):
        steps = _complete(network["pipeline"], "test_dataloader.dataset.pipeline")
        steps = [step for step in steps if not step.get("type", "").startswith(NO_IMAGE)]
        for step in steps:
            if step.get("type") == "RandomAffineResize":
                for name in AUGMENTATION & step.keys():
                    del step[name]
        found["pipeline"] = steps
    return found


def _complete(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        options = {k: v for k, v in value.items() if k not in WITHOUT_EFFECT | THRESHOLDS}
        if (kind := options.get("type")) is not None:
            kind = find(kind, path) or kind
            if not isinstance(kind, str):
                name = getattr(kind, "__name__", str(kind))
                defaults = arguments(kind).defaults
                options = {**defaults, **options, "type": SAME.get(name, name)}
        if options.get("windows"):  # take the place of the one
            options = {k: v for k, v in options.items() if k not in ("low", "high")}
        return {
            str(key): _complete(item, f"{path}.{key}")
            for key, item in options.items()
            if key not in WITHOUT_EFFECT | THRESHOLDS
        }
    if isinstance(value, (list, tuple)):
        return [_complete(item, f"{path}.{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", str(value))


def differences(trained: Mapping, config: Mapping) -> list[Difference]:
    """Where what a config's network computes is not what the weights were trained with.

    Args:
        trained, config: what `network_of` returns. What `trained` lacks, since the version that
            wrote it did not have the option, is taken to be today's default.
    """
    return list(_differences(complete(trained), complete(config), ""))


def _differences(trained: Any, config: Any, path: str) -> Iterator[Difference]:
    if isinstance(trained, Mapping) and isinstance(config, Mapping):
        keys = dict.fromkeys([*trained, *config])
        if trained.get("type") != config.get("type"):
            # Another class has other options: only those that both have are compared.
            keys = [key for key in keys if key == "type" or (key in trained and key in config)]
        for key in keys:
            pair = trained.get(key, NOT_THERE), config.get(key, NOT_THERE)
            yield from _differences(*pair, f"{path}.{key}" if path else key)
    elif _lists_of_dicts(trained, config):
        kinds = [[item.get("type") for item in items] for items in (trained, config)]
        if kinds[0] != kinds[1]:
            yield Difference(path, *kinds)
            return
        for one, other in zip(trained, config):
            yield from _differences(one, other, f"{path}.{one.get('type')}")
    elif not _equal(trained, config):
        yield Difference(path, trained, config)


def _lists_of_dicts(*values: Any) -> bool:
    return all(isinstance(v, list) and all(isinstance(i, Mapping) for i in v) for v in values)


def _equal(one: Any, other: Any) -> bool:
    """Whether two options mean the same: 512 and [512, 512] do, as a size."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    for several, single in ((one, other), (other, one)):
        if isinstance(several, list) and isinstance(single, (int, float)):
            return len(several) == 2 and all(item == single for item in several)
    return one == other


def of_training(difference: Difference) -> bool:
    """Whether only training sees it: a loss, a sampler."""
    names = difference.path.split(".")
    return any(name in TRAINING or name.startswith("loss_") for name in names)


def of_parts(difference: Difference, parts: Collection[str]) -> bool:
    """Whether it concerns what weights of these parts of a detector ('backbone', 'neck', ...) are
    fed with or do."""
    first, *rest = difference.path.split(".")
    return first == "model" and rest[0] in {*parts, "data_preprocessor"}


def need_num_slices(model: Mapping, parts: Collection[str]) -> bool:
    """Whether weights of these parts of a detector, of `network_of`, are for its number of slices:
    a neck that squeezes them, an operator that mixes them all, the channels of 2.5D."""
    return any(
        "num_slices" in options or options.get("slices_as_channels")
        for part in parts
        for _, options in dicts(model.get(part), part)
    )
