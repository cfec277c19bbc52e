"""Weights of the released AlignShift, TSM, A3D and 2.5D detectors (mmdet 1.x) for our models.

Every key of a released file has one place here; one that has none, and one of ours that nothing
fills, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope, init_default_scope
from torch import Tensor

from deeplesion.files import file_sha256
from mmdet_ext.checkpoint import CheckpointError, load_checkpoint_file, save_checkpoint_file
from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.config.network import TRAINED_AS, network_of

# mmdet 1.x counts the background as class 0, mmdet 3 as the last one, without box or mask:
# the rows there are, and those taken.
ROWS = {
    "bbox_head.fc_cls": (2, [1, 0]),
    "bbox_head.fc_reg": (8, [4, 5, 6, 7]),
    "mask_head.conv_logits": (2, [1]),
}
# Every convolution of the released A3D has these weights, those without fusion to no purpose.
UNUSED = [
    f"backbone.{name}.adaptive_align_weights"
    for name in ("conv0", "transition1.conv", "transition2.conv")
]


@dataclass(frozen=True)
class Architecture:
    """What a released file turns out to hold.

    Attributes:
        description: for the user.
        num_slices: D.
        configs: names in configs/released of the experiments it may be, the first as good as any
            for names and shapes of the weights.
    """

    description: str
    num_slices: int
    configs: tuple[str, ...]


def convert_file(
    source: Path, target: Path, configs: Path, part: str = "all"
) -> tuple[Architecture, int]:
    """Converts a released checkpoint and writes {'state_dict', 'meta'} of plain data.

    Args:
        configs: folder of the released detectors' configs.
        part: 'all', or 'backbone' for backbone and neck alone.

    Returns:
        what it is, and the number of tensors written.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: keys or shapes that do not fit, all of them named; a file that is damaged
            or holds more than data; one that is in our format already.
    """
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the released file itself; give the output another name")
    content = load_checkpoint_file(source)
    try:
        released = released_state_dict(content)
        if is_converted(content, released):
            raise CheckpointError(
                "this is in the format of this repository already: there is nothing to convert. "
                "Use it as it is, with the config that it was trained with"
            )
        architecture = detect(released)
        config = configs / f"{architecture.configs[0]}.py"
        if not config.is_file():
            raise CheckpointError(
                f"this is {architecture.description}; there is no {config} for it. Write one over "
                f"configs/_base_/released.py with stack.num_slices={architecture.num_slices}"
            )
        state = convert(released, expected_shapes(config), part)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    meta = dict(
        converted_from=source.name,
        sha256=file_sha256(source),
        architecture=architecture.description,
        part=part,
        configs=[f"configs/released/{name}.py" for name in architecture.configs],
    )
    # The user's config is compared with it; the files do not tell which of several it is.
    files = [configs / f"{name}.py" for name in architecture.configs]
    meta[TRAINED_AS] = [network_of(read_experiment(file)) for file in files if file.is_file()]
    save_checkpoint_file({"state_dict": state, "meta": meta}, target)
    return architecture, len(state)


def released_state_dict(content: Mapping) -> dict[str, Tensor]:
    """The tensors by their names, of a bare state dict or `{'state_dict': ...}`, without the
    `module.` that a network in DataParallel puts before them."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError("expected a state dict, or a dict that has one as 'state_dict'")
    if not all(isinstance(value, Tensor) for value in state.values()):
        others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
        raise CheckpointError(f"not a state dict: {', '.join(others[:6])} hold no tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def is_converted(content: Mapping, state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is one of ours, trained here or converted: its meta says what network it
    was trained as, or its neck has weights of its own, which the released files call the
    backbone's."""
    meta = content.get("meta")
    recorded = isinstance(meta, Mapping) and TRAINED_AS in meta
    return recorded or any(key.startswith(("neck.reductions.", "neck.laterals.")) for key in state)


def detect(released: Mapping[str, Tensor]) -> Architecture:
    """Tells the released architectures apart by names and shapes of their weights.

    Raises CheckpointError where it cannot.
    """
    reduction = released.get("backbone.reductionz1.reduction_z_conv.weight")
    stem = released.get("backbone.conv0.weight")
    if stem is None or stem.ndim != 4:
        shape = "missing" if stem is None else f"of shape {tuple(stem.shape)}"
        raise CheckpointError(
            "not a checkpoint of the released AlignShift, TSM, A3D or 2.5D detectors: "
            f"backbone.conv0.weight, (64, C, 7, 7) there, is {shape}"
        )
    if reduction is None:
        slices = stem.shape[1]
        return Architecture(f"2.5D, {slices} slices", slices, (f"25d_{slices}slice",))
    if reduction.ndim != 5:
        raise CheckpointError(
            "backbone.reductionz1.reduction_z_conv.weight must be of shape (C, C, D, 1, 1), got "
            f"{tuple(reduction.shape)}"
        )
    slices = reduction.shape[2]
    if any(re.search(r"denselayer.*\.adaptive_align_weights$", key) for key in released):
        return Architecture(f"A3D, {slices} slices", slices, (f"a3d_{slices}slice",))
    return Architecture(
        f"AlignShift or TSM (the files do not tell which), {slices} slices",
        slices,
        (f"alignshift_{slices}slice", f"tsm_{slices}slice"),
    )


def expected_shapes(config: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a config's detector, which is not really made."""
    model = read_experiment(config).model
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")
    with torch.device("meta"):
        network = MODELS.build(model)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def released_key(name: str) -> str:
    """What the released files call one of our weights."""
    name = name.removeprefix("roi_head.")
    name = re.sub(r"fusion_weight$", "adaptive_align_weights", name)
    reduction = r"backbone.reductionz{}.reduction_z_conv"
    name = re.sub(r"^neck\.reductions\.(\d)", lambda m: reduction.format(int(m[1]) + 1), name)
    # The released laterals are named by the ResNet stage a FPN would have there.
    return re.sub(r"^neck\.laterals\.(\d)", lambda m: f"backbone.lateral{int(m[1]) + 2}", name)


def convert(
    released: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], part: str = "all"
) -> dict[str, Tensor]:
    """Renames the tensors and drops what mmdet 3 does not have.

    Args:
        released: tensors by their names in the released file.
        expected: shape of each of ours.
        part: 'all' or 'backbone'; heads in the file are then left out.

    Raises:
        ValueError: naming every unknown key, everything missing, and every wrong shape.
    """
    keys = {name: released_key(name) for name in expected}
    known = {*keys.values(), *UNUSED}
    problems = [f"unknown {key}" for key in released if key not in known]
    state = {}
    for name, key in keys.items():
        if part == "backbone" and not key.startswith("backbone."):
            continue
        if key not in released:
            problems.append(f"missing {key}")
            continue
        value = released[key]
        shape = list(expected[name])
        rows, taken = ROWS.get(key.rpartition(".")[0], (None, None))
        if rows:
            shape[0] = rows
        if list(value.shape) != shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
            continue
        state[name] = value[taken] if rows else value
    if problems:
        if not any(key.startswith(("rpn_head.", "bbox_head.")) for key in released):
            problems.append(
                "(it has no heads: --part backbone converts the backbone and the neck alone)"
            )
        raise CheckpointError("\n  ".join(["keys that do not fit:", *problems]))
    return state
