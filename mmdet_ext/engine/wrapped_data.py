"""Refuses data sets within another one, before anything is read: nothing here works with them."""

from __future__ import annotations

from mmengine.config import Config

from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.experiment import dicts, type_name

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
    metrics = (node for _, node in dicts(config.get(f"{split}_evaluator"), ""))
    tables = "FROCMetric" in map(type_name, metrics)
    loader = f"{split}_dataloader"
    for path, node in dicts(config.get(loader), loader):
        name = type_name(node)
        if name in WRAPPERS and split == "train":
            raise ConfigError(
                f"{path} is a {name}, with which nothing is trained here: {WRAPPERS[name]}"
            )
        if name == "ConcatDataset" and tables:
            raise ConfigError(f"{path} is a {name}: {ONE_FILE}")
