"""What a trained detector is made of: the experiment's test data, its weights, a device."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from deeplesion.errors import UserError
from mmdet_ext.checkpoint import CheckpointError, load_checkpoint_file
from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.experiment import dicts
from mmdet_ext.engine.trained_as import check_network

# The steps of a pipeline that are done by the detector, or that there is nothing to do for.
LOADING = ("LoadCTSlices", "LoadAnnotations")


def software_version() -> str:
    try:
        return version("deeplesion-mmdet")
    except PackageNotFoundError:  # a checkout that is on the path alone
        return "unknown"


def usable_device(device: str | torch.device | None) -> torch.device:
    """Raises UserError if it is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: give cpu, cuda or cuda:NUMBER") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        there = f"torch sees {gpus} here" if gpus else "torch sees none here: give cpu"
        raise UserError(f"--device {device} needs a GPU, and {there}")
    return chosen


def test_data(config: Config) -> tuple[dict, list[dict]]:
    """The stack of an experiment's test data, and the steps of their pipeline after loading.

    Raises ConfigError if they are no stacks of CT slices.
    """
    loader = config.get("test_dataloader")
    dataset = next((d for _, d in dicts(loader, "") if d.get("pipeline") and d.get("stack")), None)
    if dataset is None:
        raise ConfigError(
            f"{config.filename}: its test_dataloader has no data set with a stack of slices"
            " (LoadCTSlices): it is no experiment on CT slices"
        )
    return dict(dataset.stack), [s for s in dataset.pipeline if s.get("type") not in LOADING]


def load_weights(
    model: torch.nn.Module, path: Path, config: Config, accept_differences: bool
) -> None:
    """Weights as they are tested: of the same network, and all of them."""
    checkpoint = load_checkpoint_file(path)
    checkpoint = checkpoint if "state_dict" in checkpoint else dict(state_dict=checkpoint)
    for warning in check_network(str(path), checkpoint, config, accept_differences):
        MMLogger.get_current_instance().warning(warning)
    weights = checkpoint["state_dict"]
    try:
        renamed = {name.removeprefix("module."): value for name, value in weights.items()}
        model.load_state_dict(renamed)
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit the config: {error}") from error
