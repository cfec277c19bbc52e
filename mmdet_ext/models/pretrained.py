"""Pretrained weights: of a backbone, from a file or fetched once; of some parts of a detector, from
a checkpoint of another."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from deeplesion.errors import MissingDataError, UserError
from mmdet_ext.checkpoint import (
    CheckpointError,
    UnreachableError,
    download,
    load_checkpoint_file,
)

WITHOUT = "To train without pretrained weights: --cfg-options model.backbone.init_cfg=None"


def check_init(kind: str, init_cfg: Mapping | None) -> None:
    """Raises ValueError if a backbone's `init_cfg` is not what `fetch_weights` needs."""
    if init_cfg is None:
        return
    options = dict(init_cfg) if isinstance(init_cfg, Mapping) else {}
    if options.get("type") != "Pretrained" or not options.get("checkpoint"):
        raise ValueError(
            f"{kind} takes init_cfg=dict(type='Pretrained', checkpoint=URL or file) or None, got "
            f"{init_cfg!r}"
        )


def fetch_weights(source: str, published: str = "densenet121-a639ec97.pth") -> dict[str, Tensor]:
    """Loads a state dict from a file or URL, as data only (no pickled code runs).

    `published` is the name of torchvision's file that is meant, for messages.

    Raises MissingDataError or UnreachableError with what to do instead.
    """
    if not re.match(r"https?://", source):
        if not Path(source).expanduser().is_file():
            raise MissingDataError(
                f"model.backbone.init_cfg.checkpoint={source}: no such file. Give the path of "
                f"torchvision's {published}. {WITHOUT}"
            )
        return load_checkpoint_file(source)
    try:
        return load_checkpoint_file(download(source))
    except UnreachableError as error:
        raise UnreachableError(f"{error}. {WITHOUT}") from None


def first_of(problems: Sequence[str]) -> str:
    """How many they are, and what the first six say."""
    shown = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
    return f"{len(problems)} problems: {shown}"


def densenet_name(key: str) -> str:
    """A weight's name as torchvision's own DenseNet has it, `norm1`; its file has `norm.1`."""
    return re.sub(r"\b(norm|conv)\.(\d)\.", r"\1\2.", key)


def load_published(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    cut: str,
    published: str,
    fresh: Collection[str] = (),
) -> str:
    """Loads a file of torchvision's into a network whose weights have the same names, whole.

    Args:
        weights: of the file.
        cut: regular expression of what begins the names that the network has no place for.
        published: name of the file that is meant, for messages.
        fresh: names of weights that the file does not have, which stay as they are.

    Returns:
        a line that says what was loaded.

    Raises:
        CheckpointError: weights are missing, others are there, or shapes differ.
    """
    own = network.state_dict()
    left = [key for key in weights if key not in own and re.match(cut, key)]
    problems = [
        f"missing {key}"
        for key in own
        # Files older than PyTorch 0.4 lack the batch counters.
        if key not in weights and key not in fresh and not key.endswith("num_batches_tracked")
    ]
    problems += [f"unexpected {key}" for key in weights if key not in own and key not in left]
    for key in (key for key in own if key in weights):
        shape = getattr(weights[key], "shape", None)
        if shape != own[key].shape:
            found = "no tensor" if shape is None else f"the shape {tuple(shape)}"
            problems.append(f"{key} is {found}, expected {tuple(own[key].shape)}")
    if problems:
        raise CheckpointError(
            f"these are not the weights of torchvision's {published} "
            f"({first_of(problems)}). Give that file, or none"
        )
    network.load_state_dict({k: w for k, w in weights.items() if k in own}, strict=False)
    report = f"{len(weights) - len(left)} tensors loaded, {len(left)} not used"
    return report + (f", {len(fresh)} keep their initial values" if fresh else "")


def copy_parts(model: nn.Module, path: str | Path, parts: Sequence[str]) -> str:
    """Copies the weights of some parts of a detector from a checkpoint of another detector.

    Args:
        model: the detector that they are copied into.
        path: the checkpoint, read as data only.
        parts: names of modules of both, 'backbone', 'neck', ... Each must have the same weights, of
            the same shapes, in both.

    Returns:
        three lines: how many tensors were copied; the keys of the checkpoint that were left; those
        of the model that the checkpoint did not give.

    Raises:
        MissingDataError: there is no such file. CheckpointError: it is none, or a part differs.
        UserError: the model has no such part.
    """
    checkpoint = load_checkpoint_file(path)
    weights = checkpoint.get("state_dict", checkpoint)
    own = model.state_dict()
    there, here = ({p: _keys(keys, p) for p in parts} for keys in (weights, own))
    problems = []
    for part in parts:
        if not here[part]:
            raise UserError(
                f"model.pretrained.parts: the detector has no part {part!r}; it has {_names(own)}"
            )
        if not there[part]:
            problems.append(f"it has no {part}, but {_names(weights)}")
            continue
        # Files older than PyTorch 0.4 lack the batch counters.
        lacking = {k for k in here[part] - there[part] if not k.endswith("num_batches_tracked")}
        problems += [f"{key} is missing" for key in sorted(lacking)]
        problems += [f"{key} is not in the config's" for key in sorted(there[part] - here[part])]
        problems += [
            f"{key} has shape {tuple(weights[key].shape)}, the config's {tuple(own[key].shape)}"
            for key in sorted(there[part] & here[part])
            if weights[key].shape != own[key].shape
        ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the parts {', '.join(parts)} of this config"
            f" ({first_of(problems)}). Give a checkpoint of a detector with the same"
            " parts, or set model.pretrained.parts to those that are"
        )
    copied = {key: weights[key] for part in parts for key in there[part]}
    model.load_state_dict(copied, strict=False)
    left = [key for key in weights if key not in copied]
    fresh = [key for key in own if key not in copied]
    count = ", ".join(f"{part} {len(there[part])}" for part in parts)
    return "\n".join(
        [
            f"copied {len(copied)} tensors: {count}",
            f"left in the file {len(left)}: {', '.join(left) or 'none'}",
            f"not in the file, or not copied from it, {len(fresh)}: {', '.join(fresh) or 'none'}",
        ]
    )


def _keys(state: dict, part: str) -> set[str]:
    return {key for key in state if key.startswith(f"{part}.")}


def _names(state: dict) -> str:
    return ", ".join(sorted({key.partition(".")[0] for key in state}))
