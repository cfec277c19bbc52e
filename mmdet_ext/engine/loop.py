"""The training loop that can start in the middle of an epoch."""

from __future__ import annotations

import bisect

import torch
from mmengine.dist import all_gather_object, get_rank
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.distributed import accumulative_counts, images_per_process
from mmdet_ext.random_states import kept_random_states, random_states, set_random_states

NO_SAMPLER = (
    "ResumableTrainLoop needs train_dataloader.sampler.type='EpochSampler' and no batch_sampler, "
    "so that an interrupted epoch can go on where it was; got {sampler}"
)
NO_BATCH = (
    "{samples} samples make no batch of {size} on each process, and "
    "train_dataloader.drop_last=True leaves out what is less: give more data, or lower "
    "train_dataloader.batch_size"
)


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """mmengine's loop over epochs that can start in the middle of one, and whose random states
    neither validation nor the start of workers moves.

    Takes what `EpochBasedTrainLoop` takes. The `batch_size` of the dataloader's config is the
    total, of which each process takes its share (`images_per_process`); the config, and whatever is
    saved of it, keeps the total, so that it can be run again on another number of processes.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, *args, **kwargs) -> None:
        if isinstance(dataloader, dict):
            dataloader = {**dataloader, "batch_size": images_per_process(runner.cfg)}
        super().__init__(runner, dataloader, *args, **kwargs)
        if not len(self.dataloader):
            samples, size = len(self.dataloader.dataset), self.dataloader.batch_size
            raise ConfigError(NO_BATCH.format(samples=samples, size=size))

    batch = 0  # batches of this epoch that have been trained on
    validation_pending = False  # an epoch is over, and its validation not begun
    _states: dict | None = None  # the random states that training goes on from

    def run(self) -> torch.nn.Module:
        self.runner.call_hook("before_train")
        if self._states is not None:
            set_random_states(self._states)
            self._states = None
        if self.validation_pending and self.validates_after(self._epoch):
            self._validate()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            if self.validates_after(self._epoch):
                self._validate()
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        self.validation_pending = False
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        sampler = self.dataloader.sampler
        if not hasattr(sampler, "start") or not self.dataloader.batch_size:
            raise ConfigError(NO_SAMPLER.format(sampler=type(sampler).__name__))
        sampler.set_epoch(self._epoch)
        sampler.start = self.batch * self.dataloader.batch_size
        with kept_random_states():  # an iterator draws the seed of its workers
            batches = iter(self.dataloader)
        for index, data in enumerate(batches, self.batch):
            self.batch = index + 1
            self.run_iter(index, data)
        self.batch = 0
        self.validation_pending = True
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def validates_after(self, epoch: int) -> bool:
        """Whether validation follows when `epoch` epochs are over."""
        step = bisect.bisect(self.dynamic_milestones, epoch + 1)
        self.val_interval = self.dynamic_intervals[step - 1]
        return (
            self.runner.val_loop is not None
            and epoch >= self.val_begin
            and (epoch % self.val_interval == 0 or epoch == self._max_epochs)
        )

    def _validate(self) -> None:
        self.validation_pending = False
        self._states = random_states()
        self.runner.val_loop.run()
        set_random_states(self._states)
        self._states = None

    def state_dict(self) -> dict:
        """Where training is. Every process must call it.

        epoch, iter: how many are over. batch: of the epoch that has begun. validation_pending.
        seed, num_samples: of the sampler and the data set. total_batch: images of an update.
        iteration_images: images of an iteration of all processes; fewer if they are accumulated.
        random_states: of each process.
        """
        # mmengine counts an iteration or epoch after the hooks that may save.
        inside = self.batch > 0
        return dict(
            epoch=self._epoch + (self.validation_pending and not inside),
            iter=self._iter + inside,
            batch=self.batch,
            validation_pending=self.validation_pending,
            seed=self.dataloader.sampler.seed,
            num_samples=len(self.dataloader.dataset),
            total_batch=self._total_batch,
            iteration_images=self._iteration_images,
            random_states=all_gather_object(self._states or random_states()),
        )

    @property
    def _iteration_images(self) -> int:
        return self.dataloader.batch_size * self.runner.world_size

    @property
    def _total_batch(self) -> int:
        return self._iteration_images * accumulative_counts(self.runner.cfg)

    def load_state_dict(self, state: dict) -> list[str]:
        """Takes up what `state_dict` returned; returns why, if so, training will differ."""
        self._epoch, self._iter, self.batch = state["epoch"], state["iter"], state["batch"]
        self.validation_pending = state["validation_pending"]
        now = dict(
            num_samples=len(self.dataloader.dataset),
            total_batch=self._total_batch,
            iteration_images=self._iteration_images,
            processes=self.runner.world_size,
        )
        before = {**state, "processes": len(state["random_states"])}
        self.dataloader.sampler.seed = state["seed"]
        if now["iteration_images"] != before["iteration_images"]:
            # Of an epoch that has begun the same number of samples is left out; iterations are
            # counted as if they had always been of this size.
            self.batch = self.batch * state["iteration_images"] // now["iteration_images"]
            self._iter = self._epoch * len(self.dataloader) + self.batch
        if now["processes"] == before["processes"]:
            self._states = state["random_states"][get_rank()]
        return [f"{k} was {before[k]}, is {v}" for k, v in now.items() if v != before[k]]
