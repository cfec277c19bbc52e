"""Interruption without a trace: training resumed from a checkpoint goes on bit for bit as if it
had never stopped, from the end of an epoch or from the middle of one.

The runner saves and restores, the loop knows its place; hooks.py says when.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.dist import (
    all_reduce,
    all_reduce_params,
    is_main_process,
)
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader, Runner
from torch.utils.data import DataLoader

from deeplesion.files import write_whole
from mmdet_ext.checkpoint import (
    CheckpointError,
    download,
    last_checkpoint,
    load_checkpoint_file,
    save_checkpoint_file,
)
from mmdet_ext.engine.console import only_warnings_on_console, prints_logged
from mmdet_ext.engine.distributed import accumulative_counts, schedules_of
from mmdet_ext.engine.workers import guarded, tied

NOT_WHOLE = (
    "{path} holds no {missing}: training cannot be resumed from it. Resume from an epoch_*.pth or "
    "iter_*.pth of this version; to start anew from its weights: --cfg-options load_from={path}"
)
NO_AVERAGE = (
    "{path} holds an average of weights beside those of the last update, and the config has no "
    "hook that would go on with it: add the one that it was trained with (--cfg-options "
    "default_hooks.averaged_weights.type=AveragedWeightsHook, or its custom_hooks)"
)
NOT_AS_BEFORE = (
    "{path} is of a training with another optimizer, other schedules or another precision, whose "
    "state this one cannot go on with: {other}. Resume with those of that training (its config "
    "lies beside its log); to start anew from its weights, in a --work-dir of their own: "
    "--cfg-options load_from={path}"
)


class ResumableRunner(Runner):
    """mmengine's runner with exact resume. Its checkpoints are plain data, loaded as data only."""

    _strict = False

    def __init__(self, *args, **kwargs) -> None:
        install_safe_loading()
        super().__init__(*args, **kwargs)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        only_warnings_on_console(logger)
        return logger

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """Schedules that count iterations count updates of the weights: see UpdateSchedulerHook."""
        accumulated = accumulative_counts(self.cfg)
        scheduler = schedules_of(scheduler)
        if isinstance(scheduler, (list, tuple)) and accumulated > 1:
            scheduler = [dict(part) for part in scheduler]
            for part in scheduler:
                if part.get("convert_to_iter_based"):
                    part["epoch_length"] = max(1, round(len(self.train_dataloader) / accumulated))
                elif not part.get("by_epoch", True):
                    part.setdefault("end", math.ceil(self.max_iters / accumulated))
        return super().build_param_scheduler(scheduler)

    def dump_config(self) -> None:
        """Into the folder of this start: a test beside a training leaves the training's alone."""
        if is_main_process():
            name = Path(self.cfg.filename or "config").stem
            write_whole(Path(self._log_dir) / f"{name}.py", self._config_text)

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        """As mmengine's; the loader's workers end with this process and are not waited for for
        ever."""
        if not isinstance(dataloader, dict):
            return Runner.build_dataloader(dataloader, *args, **kwargs)
        loader = Runner.build_dataloader(guarded(dataloader), *args, **kwargs)
        loader.worker_init_fn = tied(loader.worker_init_fn)
        return loader

    def load_or_resume(self) -> None:
        """Weights (`load_from`), or all of a run (`resume`); a damaged last checkpoint is named
        and the one before it used. With resume='auto' the last checkpoint goes before `load_from`,
        from which a run begins that has none yet."""
        last = self._resume == "auto" or (self._resume and self._load_from is None)
        if last and not self._has_loaded:
            path, damaged = last_checkpoint(Path(self.work_dir))
            for message in damaged:
                self.logger.warning(message)
            if path is None:
                self.logger.info(f"{self.work_dir} holds no checkpoint: training starts anew")
                self._resume = False
            else:
                self._load_from = str(path)
        super().load_or_resume()

    def test(self) -> dict:
        # mmengine would test what does not fit with random weights, and warn.
        self._strict = True
        return super().test()

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = False, **options
    ) -> dict:
        """Loads weights. Raises CheckpointError if, in testing or resuming, they do not fit."""
        try:
            with prints_logged(self.logger):  # mmengine prints from where it loads
                return super().load_checkpoint(
                    filename, map_location, strict or self._strict, **options
                )
        except RuntimeError as error:
            raise CheckpointError(f"{filename} does not fit the config: {error}") from error

    def save_checkpoint(self, path: Path, resumable: bool = True) -> None:
        """Writes the weights and, if `resumable`, all that training depends on.

        Every process must call it. A checkpoint holds, as plain data:
            state_dict: the weights. meta: epoch, iter, config, seed, versions, classes.
            optimizer, param_schedulers, message_hub (what was logged, best score).
            gradients: those of an accumulation that is not complete.
            training: see `ResumableTrainLoop.state_dict`.
        """
        model = self.model.module if is_model_wrapper(self.model) else self.model
        if self.distributed:
            # Only the main process' are saved; with SyncBatchNorm they are equal anyway.
            all_reduce_params(model.buffers(), op="mean")
        training = self.train_loop.state_dict()
        checkpoint = dict(
            meta=dict(
                epoch=training["epoch"],
                iter=training["iter"],
                cfg=self._config_text,
                seed=self.seed,
                experiment_name=self.experiment_name,
                time=time.strftime("%Y%m%d_%H%M%S"),
                mmengine_version=mmengine.__version__,
                dataset_meta=getattr(self.train_dataloader.dataset, "metainfo", {}),
            ),
            state_dict=model.state_dict(),
        )
        if resumable:
            hub = self.message_hub.state_dict()
            hub["log_scalars"] = {
                name: dict(zip(("values", "counts"), buffer.data), max_length=buffer.max_length)
                for name, buffer in hub["log_scalars"].items()
            }
            checkpoint.update(
                training=training,
                message_hub=hub,
                optimizer=self.optim_wrapper.state_dict(),
                # A scheduler's methods may be among its attributes; they are no state.
                param_schedulers=[
                    {k: v for k, v in scheduler.state_dict().items() if not callable(v)}
                    for scheduler in self.param_schedulers or []
                ],
                gradients=self._gradients(model),
            )
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        if is_main_process():
            save_checkpoint_file(checkpoint, path)

    @functools.cached_property
    def _config_text(self) -> str:
        return self.cfg.pretty_text  # takes half a second

    def _gradients(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Gradients wait for further batches only if they are accumulated; the mean of processes,
        which is what the optimizer will see of them."""
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if self.distributed and gradients:
            # Every process must reduce the same ones, whichever its images happened to reach.
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
            for gradient in gradients.values():
                all_reduce(gradient, op="mean")
        return gradients

    def resume(self, filename: str, **_) -> None:
        """Restores all of a run. mmengine's own would run the config text in a checkpoint.

        Raises CheckpointError if the file holds weights alone, or is of a training with another
        optimizer, other schedules or, by --amp, another precision.
        """
        checkpoint = self.load_checkpoint(filename, strict=True)
        parts = ("training", "message_hub", "optimizer", "param_schedulers", "gradients")
        missing = [part for part in parts if part not in checkpoint]
        if missing:
            raise CheckpointError(NOT_WHOLE.format(path=filename, missing=", ".join(missing)))
        averages = any(isinstance(hook, EMAHook) for hook in self.hooks)
        if "ema_state_dict" in checkpoint and not averages:
            raise CheckpointError(NO_AVERAGE.format(path=filename))
        schedulers, own = self.param_schedulers or [], self.optim_wrapper.state_dict()
        if other := [
            *other_precision(checkpoint["optimizer"], own),
            *other_groups(checkpoint["optimizer"], own),
            *other_schedules(checkpoint["param_schedulers"], schedulers),
        ]:
            raise CheckpointError(NOT_AS_BEFORE.format(path=filename, other="; ".join(other)))
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {
            name: HistoryBuffer(
                part["values"].numpy(), part["counts"].numpy(), max_length=part["max_length"]
            )
            for name, part in hub["log_scalars"].items()
        }
        self.message_hub.load_state_dict(hub)
        self.optim_wrapper.load_state_dict(checkpoint["optimizer"])
        for scheduler, state in zip(schedulers, checkpoint["param_schedulers"], strict=True):
            scheduler.load_state_dict(state)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        for name, parameter in model.named_parameters():
            if name in checkpoint["gradients"]:
                parameter.grad = checkpoint["gradients"][name].to(parameter)
        for message in self.train_loop.load_state_dict(checkpoint["training"]):
            self.logger.warning(f"{message}: training goes on, but not bit for bit as before")
        seed = checkpoint["meta"]["seed"]
        if self.cfg.get("randomness", {}).get("seed") not in (None, seed):
            self.logger.warning(
                f"randomness.seed is {self.seed}, and training goes on with {seed}, as it began"
            )
        self._seed = seed  # what records and checkpoints say
        self.logger.info(
            f"resumed {filename}: epoch {self.epoch}, iteration {self.iter}, "
            f"batch {self.train_loop.batch} of the epoch"
        )
        if self.epoch >= self.max_epochs:
            self.logger.warning(f"all of train_cfg.max_epochs={self.max_epochs} epochs are done")


def other_precision(saved: dict, own: dict) -> list[str]:
    """Whether an optimizer's state is of mixed precision and its own not, or the other way round:
    gradients that wait in a checkpoint are multiplied by the loss scale of the former."""
    had, has = ("with" if "loss_scaler" in state else "without" for state in (saved, own))
    return [] if had == has else [f"it was trained {had} --amp, and is resumed {has} it"]


def other_groups(saved: dict, own: dict) -> list[str]:
    """In what the parameter groups of an optimizer's state are others than those of its own."""
    saved, own = (state.get("param_groups", []) for state in (saved, own))
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    if sizes[0] != sizes[1]:
        had, has = (f"{len(each)} parameter group(s) of {sum(each)} in all" for each in sizes)
        return [f"it has {had}, the config's optimizer {has}"]
    return _other_names("the optimizer", {*saved[0]}, {*own[0]}) if own else []


def other_schedules(saved: list[dict], own: list) -> list[str]:
    """In what the states of schedules are of others than a run's own."""
    if len(saved) != len(own):
        return [f"it has {len(saved)} schedules (param_scheduler), the config {len(own)}"]
    found = []
    for number, (state, scheduler) in enumerate(zip(saved, own)):
        names = {k for k, v in scheduler.state_dict().items() if not callable(v)}
        found += _other_names(f"param_scheduler.{number}", {*state}, names)
    return found


def _other_names(what: str, saved: set[str], own: set[str]) -> list[str]:
    """Options of another class: some that it lacks, and some that it has instead. More of them, or
    fewer, may be those of another version."""
    if saved <= own or own <= saved:
        return []
    had, has = (", ".join(sorted(names)) for names in (saved - own, own - saved))
    return [f"{what} had {had}, and has {has} instead"]


def load_from_file(filename: str, map_location=None) -> dict:
    checkpoint = load_checkpoint_file(filename, map_location or "cpu")
    # Hooks of mmengine do not expect bare weights.
    return checkpoint if "state_dict" in checkpoint else dict(state_dict=checkpoint)


def load_from_http(filename: str, map_location=None) -> dict:
    return load_from_file(str(download(filename)), map_location)


def load_from_elsewhere(filename: str, map_location=None) -> dict:
    raise CheckpointError(f"{filename}: checkpoints are loaded from a file or an http(s) address")


def install_safe_loading() -> None:
    """Every door of mmengine (load_from, resume, init_cfg of any module, test) leads to the loaders
    above from now on; its own fall back to unsafe loading."""
    CheckpointLoader.register_scheme("", load_from_file, force=True)
    CheckpointLoader.register_scheme(["http://", "https://"], load_from_http, force=True)
    elsewhere = (
        *("modelzoo://", "torchvision://", "open-mmlab://", "openmmlab://", "mmcls://", "pavi://"),
        *(r"(\S+\:)?s3://", r"(\S+\:)?petrel://"),
    )
    CheckpointLoader.register_scheme(list(elsewhere), load_from_elsewhere, force=True)
