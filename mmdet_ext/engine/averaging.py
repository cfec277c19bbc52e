"""Averaged weights: a moving average kept beside training, and the mean of checkpoints.

Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Izmailov et al.,
"Averaging weights leads to wider optima and better generalization", UAI 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.dist import all_reduce_params
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop

from mmdet_ext.checkpoint import AVERAGED, CheckpointError, how_averaged, load_checkpoint_file
from mmdet_ext.config.check import ConfigError
from mmdet_ext.config.network import TRAINED_AS, differences
from mmdet_ext.engine.distributed import accumulative_counts


@HOOKS.register_module()
class AveragedWeightsHook(EMAHook):
    """mmengine's EMAHook, its memory in epochs, the statistics of BatchNorm averaged alike.

    After each update of the weights the average moves by 1 / (updates of `epochs` epochs) towards
    them; before as many updates are over it is their plain mean. Running statistics are averaged in
    the same way: those of the latest weights would not fit the average. Validation, the choice of
    the best checkpoint and `state_dict` in every checkpoint are the average's; a checkpoint keeps
    the weights of the last update as `ema_state_dict`, and resuming goes on with both.

    A test needs no hook: it takes `state_dict`.

    Args:
        epochs: how long the average remembers.
    """

    def __init__(self, epochs: float = 1.0) -> None:
        if not epochs > 0:
            raise ValueError(f"epochs must be > 0, got {epochs}")
        # With gamma=1 the momentum is 1 / (1 + steps), that of the mean, until it is smaller.
        super().__init__("MomentumAnnealingEMA", strict_load=True, gamma=1, update_buffers=True)
        self.epochs = epochs

    def before_run(self, runner: Runner) -> None:
        self.ema_model = None
        if isinstance(runner._train_loop, BaseLoop):  # else it is a test
            if sum(isinstance(hook, EMAHook) for hook in runner.hooks) > 1:
                # Each would swap weights with the other's average and back.
                raise ConfigError(
                    "two hooks of this config average the weights (AveragedWeightsHook, EMAHook): "
                    "take one out of custom_hooks or default_hooks"
                )
            iterations = len(runner.train_dataloader) / accumulative_counts(runner.cfg)
            self.ema_cfg["momentum"] = min(0.5, 1 / max(1.0, self.epochs * iterations))
            super().before_run(runner)
            # Weights that parts share have a name in each, and are to be averaged once.
            weights = self.ema_model.avg_parameters
            first = {weights[name].data_ptr(): name for name in reversed(weights)}
            self.ema_model.avg_parameters = {
                name: value for name, value in weights.items() if first[value.data_ptr()] == name
            }

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        if runner.optim_wrapper.should_update():  # the iteration that is over ended in one
            super().after_train_iter(runner, *args, **kwargs)

    def before_val_epoch(self, runner: Runner) -> None:
        self._sync(runner)
        super().before_val_epoch(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        pass

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        pass

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._sync(runner)
        super().before_save_checkpoint(runner, checkpoint)
        steps = int(self.ema_model.steps)
        checkpoint["meta"][AVERAGED] = (
            f"moving average over {self.epochs:g} epochs "
            f"({round(1 / self.ema_model.momentum)} updates), of {steps} updates so far"
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # Weights that a training starts from may be of a part of the network, and need not be taken
        # here: the first update makes the average the weights.
        if self.ema_model is not None and runner._resume:
            super().after_load_checkpoint(runner, checkpoint)

    def _sync(self, runner: Runner) -> None:
        """Of several processes with plain BatchNorm each has averaged its own statistics."""
        if runner.distributed and self.ema_model is not None:
            all_reduce_params(self.ema_model.module.buffers(), op="mean")


def average_checkpoints(paths: Sequence[Path]) -> dict:
    """The mean of the weights of some checkpoints of one run, and of BatchNorm's statistics.

    Returns a checkpoint for testing: `state_dict`, and the `meta` of the last one, which says what
    it is the mean of. Whole numbers, such as BatchNorm's counters, are those of the last one.

    Raises:
        MissingDataError, CheckpointError: a file that is not there, or cannot be read.
        CheckpointError: files of different networks or seeds or without weights, one that is given
            twice, or fewer than two; two of one iteration.
    """
    if len(paths) < 2:
        raise CheckpointError(f"there is no mean of {len(paths)} checkpoint: give at least two")
    if len({path.resolve() for path in paths}) < len(paths):
        raise CheckpointError(f"a checkpoint is given twice: {', '.join(map(str, paths))}")
    total: dict[str, torch.Tensor] = {}
    iterations: dict[int, Path] = {}
    for path in paths:
        checkpoint = load_checkpoint_file(path)
        weights = checkpoint.get("state_dict", checkpoint)
        if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise CheckpointError(f"{path} holds no weights: give epoch_*.pth of a training")
        if path == paths[0]:
            first = checkpoint
        else:
            _check_same(first, checkpoint, paths[0], path)
        if (iteration := (checkpoint.get("meta") or {}).get("iter")) is not None:
            if iteration in iterations:
                raise CheckpointError(
                    f"{iterations[iteration]} and {path} are both of iteration {iteration}: one of "
                    "them twice, or of two trainings. Give checkpoints of one, each once"
                )
            iterations[iteration] = path
        for name, value in weights.items():
            if value.is_floating_point() and name in total:
                total[name] += value.double()
            else:
                total[name] = value.double() if value.is_floating_point() else value
    mean = {
        name: (total[name] / len(paths)).to(value.dtype)
        if value.is_floating_point()
        else total[name]
        for name, value in weights.items()
    }
    meta = dict(checkpoint.get("meta") or {})
    of_last = f" (the last one: {said})" if (said := how_averaged(checkpoint)) else ""
    names = ", ".join(path.name for path in paths)
    meta[AVERAGED] = f"mean of {len(paths)} checkpoints: {names}{of_last}"
    return dict(meta=meta, state_dict=mean)


def _check_same(one: dict, other: dict, path: Path, other_path: Path) -> None:
    """Raises CheckpointError if two checkpoints are not of one network, or of two trainings."""
    shapes = [
        {name: tuple(value.shape) for name, value in each.get("state_dict", each).items()}
        for each in (one, other)
    ]
    networks = [(each.get("meta") or {}).get(TRAINED_AS) for each in (one, other)]
    different = []
    if all(networks):
        different += map(str, differences(networks[0][0], networks[1][0]))
    if shapes[0] != shapes[1]:
        names = sorted(n for n in {*shapes[0], *shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
        different.append(f"names or shapes of {len(names)} weights, the first {names[0]}")
    if different:
        raise CheckpointError(
            f"{path} and {other_path} are of different networks, which have no mean: "
            + "; ".join(different)
        )
    seeds = [(each.get("meta") or {}).get("seed") for each in (one, other)]
    if None not in seeds and seeds[0] != seeds[1]:
        raise CheckpointError(
            f"{path} and {other_path} are of trainings with seeds {seeds[0]} and {seeds[1]}: what "
            "lies between the weights of two trainings is no network. Give checkpoints of one"
        )
