"""Refuses data sets within another one, before anything is read: nothing here works with them."""

from __future__ import annotations

from collections.abc import Mapping

from mmengine.config import Config

from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.experiment import dicts

ONE_FILE = "a table is of one annotation file: test them one after the other"
# mmdet's and mmengine's that ask the data set inside for samples by number. In training a sample is
# asked for by its `SampleKey`, which fixes its augmentation.
WRAPPERS = {
    "ConcatDataset": "several annotation files go into one data set, as DeepLesionDataset's "
    "ann_file=['annotations/train.json', 'annotations/val.json']",
    "RepeatDataset": "take the data set itself, and more of train_cfg.max_epochs",
    "ClassBalancedDataset": "take the data set itself",
}


def refuse_wrapped(config: Config, split: str) -> None:
    """Raises ConfigError if the data of a split ('train', 'val', 'test') is a data set of data
    sets: in training, or where `FROCMetric` makes its table of it."""
    tables = "FROCMetric" in map(kind, nodes(config, f"{split}_evaluator").values())
    for path, node in nodes(config, f"{split}_dataloader").items():
        name = kind(node)
        if name in WRAPPERS and split == "train":
            raise ConfigError(
                f"{path} is a {name}, with which nothing is trained here: {WRAPPERS[name]}"
            )
        if name == "ConcatDataset" and tables:
            raise ConfigError(f"{path} is a {name}: {ONE_FILE}")


def nodes(config: Config, key: str) -> dict[str, Mapping]:
    return dict(dicts(config.get(key), key))


def kind(node: Mapping) -> str | None:
    return getattr(node.get("type"), "__name__", node.get("type"))
