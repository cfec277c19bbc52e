"""The run card: what a training is made of, as a short table at its begin, in the log and in
run_*.json."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import torch
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from deeplesion.conventions import PUBLISHED_KEY_SLICES
from mmdet_ext.engine.distributed import accumulative_counts, schedules_of
from mmdet_ext.engine.run_check import Plan


def plan_of(runner: Runner) -> Plan:
    """What a run is going to do, as `run_check` compares it."""
    accumulated, loop = accumulative_counts(runner.cfg), runner.train_loop
    drops = {
        epoch
        for schedule in schedules_of(runner.cfg.get("param_scheduler"))
        if schedule["type"] == "MultiStepLR" and schedule.get("by_epoch", True)
        for epoch in schedule["milestones"]
    }
    return Plan(
        total_batch=loop.dataloader.batch_size * runner.world_size * accumulated,
        updates_per_epoch=math.ceil(len(loop.dataloader) / accumulated),
        max_epochs=loop.max_epochs,
        drops=tuple(sorted(drops)),
    )


def facts_of(runner: Runner) -> dict[str, Any]:
    """What a training is made of, for run_*.json and `card`. Called when training begins."""
    config, plan = runner.cfg, plan_of(runner)
    accumulated = accumulative_counts(config)
    try:
        rates, warm_up = learning_rates(config, plan)
    except Exception:  # one that follows validation, say, or of one's own: no reason to stop a run
        rates, warm_up = [], 0
    hooks = [config.get("default_hooks", {}).get("run_check"), *(config.get("custom_hooks") or [])]
    data = {"train": runner.train_dataloader.dataset}
    if runner.val_loop is not None:
        data["val"] = runner.val_dataloader.dataset
    model = getattr(runner.model, "module", runner.model)
    init = getattr(getattr(model, "backbone", None), "init_cfg", None) or {}
    copied = getattr(model, "pretrained", None) or {}
    if isinstance(copied, str):  # a segmentor's: all weights but the head's
        copied = dict(checkpoint=copied)
    pretrained = init.get("checkpoint") if isinstance(init, dict) else None
    return dict(
        data={split: counts(dataset) for split, dataset in data.items()},
        published_key_slices={
            split: published(dataset, split)
            for split, dataset in data.items()
            if "lits" not in getattr(dataset, "metainfo", {})
        },
        total_batch=plan.total_batch,
        processes=runner.world_size,
        accumulative_counts=accumulated,
        updates_per_epoch=plan.updates_per_epoch,
        max_epochs=plan.max_epochs,
        updates=math.ceil(runner.max_iters / accumulated),
        drops=plan.drops,
        learning_rates=rates,
        warm_up_updates=warm_up,
        batch_norm=batch_norm(runner.model, runner.world_size),
        stack=dict(config.get("stack") or {}),
        masks=masks_of(data["train"]),
        pretrained=copied.get("checkpoint") or pretrained,
        pretrained_parts=list(copied["parts"]) if copied.get("parts") else None,
        weights=runner._load_from,
        seed=runner.seed,
        versions={m.__name__: m.__version__ for m in (torch, mmengine, mmcv, mmdet)},
        reference=next((h["reference"] for h in hooks if h and h.get("reference")), None),
    )


def card(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the card: a name, and what it says."""
    data, published = facts["data"], facts["published_key_slices"]
    lines = []
    for split, name in (("train", "training"), ("val", "validation")):
        if split in data:
            there = f" (DeepLesion: {published[split]:,})" if published.get(split) else ""
            lines.append((name, describe(data[split]) + there))
    share = facts["total_batch"] // (facts["processes"] * facts["accumulative_counts"])
    batch = f"{facts['total_batch']} images an update = {facts['processes']} process(es) x {share}"
    if facts["accumulative_counts"] > 1:
        batch += f" x {facts['accumulative_counts']} accumulated"
    lines.append(("batch", batch))
    lines.append(
        ("updates", f"{facts['updates']:,}: {facts['max_epochs']} epochs of "
         f"{facts['updates_per_epoch']:,}")
    )  # fmt: skip
    rates = facts["learning_rates"]
    said, epoch = [], 1
    for rate, group in itertools.groupby(f"{rate:.3g}" for rate in rates):
        length = len(list(group))
        last = epoch + length - 1
        said.append(f"{rate} (epoch {epoch if length == 1 else f'{epoch}-{last}'})")
        epoch = last + 1
    if len(said) > 4:  # a rate that falls all the time
        said = [said[0], "...", said[len(said) // 2], "...", said[-1]]
    warm_up = facts["warm_up_updates"]
    warm = f"; warm-up {warm_up} updates = {warm_up / facts['updates_per_epoch']:.2f} epochs"
    warm = warm if warm_up else "; no warm-up"
    lines.append(("rate", ", ".join(said) + warm if rates else "not known beforehand"))
    lines.append(("BatchNorm", facts["batch_norm"]))
    if facts["stack"]:
        lines.append(("stack", ", ".join(f"{k} {v}" for k, v in facts["stack"].items())))
    lines.append(("masks", facts["masks"]))
    loaded = Path(facts["pretrained"]).name if facts["pretrained"] else "none"
    if parts := facts.get("pretrained_parts"):
        loaded = f"{', '.join(parts)} of {facts['pretrained']}"
    loaded += f"; then all weights from {facts['weights']}" if facts["weights"] else ""
    lines.append(("pretrained", loaded))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines.append(("seed", f"{facts['seed']}; {versions}"))
    return lines


def counts(dataset: Dataset) -> dict[str, Any]:
    """How many images and lesions an mmdet data set has, and its file; lesions of others: None."""
    lesions = None
    if holds_lesions(dataset):
        classes = getattr(dataset, "metainfo", {}).get("classes", ())
        of_lesions = classes.index("lesion") if len(classes) > 1 and "lesion" in classes else None
        lesions = sum(
            (of_lesions is None or instance["bbox_label"] == of_lesions)
            and not instance.get("ignore_flag")
            for i in range(len(dataset))
            for instance in dataset.get_data_info(i)["instances"]
        )
    source = " and ".join(files_of(dataset)) or type(dataset).__name__
    found = dict(images=len(dataset), lesions=lesions, source=source)
    regions = getattr(dataset, "metainfo", {}).get("ignored_regions")
    return {**found, "ignored_regions": regions} if regions else found


def holds_lesions(dataset: Dataset) -> bool:
    """Whether it is of mmdet's kind: of images with instances."""
    return hasattr(dataset, "get_data_info")


def published(dataset: Dataset, split: str) -> int | None:
    """How many key slices DeepLesion has in the splits that a data set is of, by its files' names,
    or, where they are others, in `split`. None of a data set that is not of lesions."""
    if not holds_lesions(dataset):
        return None
    names = [Path(file).stem for file in files_of(dataset)]
    known = [PUBLISHED_KEY_SLICES[name] for name in names if name in PUBLISHED_KEY_SLICES]
    return sum(known) if known and len(known) == len(names) else PUBLISHED_KEY_SLICES[split]


def describe(counted: dict[str, Any]) -> str:
    if counted["lesions"] is None:
        return f"{counted['images']:,} samples, {counted['source']}"
    number = f"{counted['lesions']:,} lesions"
    if regions := counted.get("ignored_regions"):
        number += f" and {regions:,} regions to ignore"
    return f"{counted['images']:,} images with {number}, {counted['source']}"


def masks_of(dataset: Dataset) -> str:
    """How the masks that are learnt from were drawn, as the annotation file says it."""
    if not holds_lesions(dataset):
        return str(getattr(dataset, "metainfo", {}).get("masks") or "none")
    steps = getattr(getattr(dataset, "pipeline", None), "transforms", ())
    if not any(getattr(step, "with_mask", False) for step in steps):
        return "none"
    if masks := getattr(dataset, "metainfo", {}).get("masks"):
        return str(masks)
    folders = dict.fromkeys(f"{Path(file).parent.name}/" for file in files_of(dataset))
    return f"of {' and '.join(folders)}; the annotation file does not say how they were drawn"


def files_of(dataset: Dataset) -> list[str]:
    """The annotation files of a data set, as far as it has any."""
    files = getattr(dataset, "ann_file", [])
    return [files] if isinstance(files, str) else list(files)


def batch_norm(model: nn.Module, processes: int) -> str:
    """How BatchNorm normalises."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return "none"
    if any(isinstance(m, nn.SyncBatchNorm) for m in norms):
        return f"synchronised over {processes} processes"
    return "plain" + (", each process by its own images" if processes > 1 else "")


def learning_rates(config: Any, plan: Plan) -> tuple[list[float], int]:
    """The learning rate of each epoch's last update, and for how many updates it warms up.

    The schedules of the config are gone through with an optimizer that has nothing to learn.
    """
    optimizer = torch.optim.SGD(
        [nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr
    )
    built, warm_up = [], 0
    for schedule in schedules_of(config.get("param_scheduler")):
        options = {**schedule}
        by_epoch = options.get("by_epoch", True)
        options.setdefault("end", plan.max_epochs * (1 if by_epoch else plan.updates_per_epoch))
        if schedule["type"] in ("LinearLR", "ConstantLR"):
            warm_up = options["end"] * (plan.updates_per_epoch if by_epoch else 1)
        options.update(optimizer=optimizer)
        if options.get("convert_to_iter_based"):
            options["epoch_length"] = plan.updates_per_epoch
        built.append(PARAM_SCHEDULERS.build(options))
    optimizer.step()  # counted from now on: schedules warn if they go first
    rates = []
    for _ in range(plan.max_epochs):
        for _ in range(plan.updates_per_epoch):
            rate = optimizer.param_groups[0]["lr"]
            for schedule in built:
                if not schedule.by_epoch:
                    schedule.step()
        rates.append(rate)
        for schedule in built:
            if schedule.by_epoch:
                schedule.step()
    return rates, warm_up
