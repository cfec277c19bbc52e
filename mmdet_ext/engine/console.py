"""What a run shows on the console: a page. What mmengine logs is in the log file of the run."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from tqdm import tqdm

from mmdet_ext.checkpoint import how_averaged
from mmdet_ext.engine.distributed import accumulative_counts
from mmdet_ext.engine.run_card import card, counts, describe, facts_of
from mmdet_ext.engine.run_record import add_to_record, record_path


def only_warnings_on_console(logger: MMLogger) -> None:
    """Of what is logged the console shows warnings and errors; the log file keeps everything."""
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            # Processes other than the first already show errors alone.
            handler.setLevel(max(handler.level, logging.WARNING))


def import_mmdet() -> None:
    """Imports mmdet without its messages about optional packages, which nothing here uses.

    mmdet prints that its data sets of OneDL are skipped, and warns that a metric of its own,
    FasterCocoMetric, lacks its package.
    """
    warnings.filterwarnings("ignore", message="faster_coco_eval is not installed")
    with contextlib.redirect_stdout(io.StringIO()):
        for module in ("mmdet.datasets", "mmdet.evaluation"):
            importlib.import_module(module)


@contextlib.contextmanager
def prints_logged(logger: MMLogger) -> Iterator[None]:
    """What is printed inside goes to the log file instead of the console."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            yield
        finally:
            for line in printed.getvalue().splitlines():
                logger.info(line)


class ConsoleHook(Hook):
    """Prints the run card, a line an epoch, how it ended, and where things lie.

    The card is also in the log and in run_*.json.

    An epoch's line has the mean training loss of the epoch, the learning rate and the time that is
    left, validation included; where a validation follows, also the metric by which the best
    checkpoint is chosen. On a terminal a bar shows the place within the epoch.

    It is registered by `mmdet_ext.engine.run.build_runner`, in the main process only.
    """

    priority = "LOWEST"  # after the checkpoint hook, which decides what is best
    _averaged = ""

    def before_train(self, runner: Runner) -> None:
        self._started, self._first_iteration = time.monotonic(), runner.iter
        say("config", runner.cfg.filename or runner.experiment_name)
        facts = facts_of(runner)
        lines = card(facts)
        for name, value in lines:
            say(name, value)
        runner.logger.info("\n".join(["run card", *(f"  {n:<11} {v}" for n, v in lines)]))
        # What is resumed goes on with the checkpoint's seed, whatever the config says.
        add_to_record(record_path(runner), seed=facts["seed"], training=facts)
        if runner.iter:
            place = f"epoch {runner.epoch + 1}, iteration {runner.iter + 1}"
            say("resumed", f"{runner._load_from}, goes on with {place}")
        elif runner._load_from:
            say("weights", runner._load_from)
        say("work dir", runner.work_dir)
        say("log", runner.logger.log_file)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._averaged = how_averaged(checkpoint)

    def before_test(self, runner: Runner) -> None:
        say("config", runner.cfg.filename or runner.experiment_name)
        say("checkpoint", runner._load_from)
        if self._averaged:
            say("weights", self._averaged)
        say("test", describe(counts(runner.test_dataloader.dataset)))
        say("work dir", runner.work_dir)
        say("log", runner.logger.log_file)

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        loop = getattr(runner, f"{mode}_loop")
        self._bar = tqdm(
            total=len(loop.dataloader),
            initial=getattr(loop, "batch", 0),  # where a resumed epoch goes on
            desc=f"epoch {runner.epoch + 1}" if mode == "train" else mode,
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None, mode: str = "train"
    ) -> None:
        self._bar.update()

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        self._bar.close()

    def after_train_epoch(self, runner: Runner) -> None:
        self._bar.close()
        epoch = runner.epoch + 1  # mmengine counts it after the hooks
        if not runner.train_loop.validates_after(epoch):
            self._say_epoch(runner, epoch)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        self._bar.close()
        hook = runner.cfg.get("default_hooks", {}).get("checkpoint") or {}
        name = hook.get("save_best")
        validated = ""
        if name in metrics:
            best = runner.message_hub.get_info("best", "")
            here = (f"_epoch_{runner.epoch}.pth", f"_iter_{runner.iter}.pth")
            validated = f"  val {name} {metrics[name]:.2f}"
            validated += ", the best so far" if best.endswith(here) else ""
        self._say_epoch(runner, runner.epoch, validated)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        self._bar.close()
        for name, value in metrics.items():  # of FROCMetric the command prints the table
            if not name.startswith("FROC/"):
                say(name, value)

    def _say_epoch(self, runner: Runner, epoch: int, validated: str = "") -> None:
        hub, loop = runner.message_hub, runner.train_loop
        # The hub is part of a checkpoint: it knows of the part before an interruption too.
        loss = hub.get_scalar("train/loss").mean(len(loop.dataloader))
        rates = runner.optim_wrapper.get_lr()
        rate = (rates.get("base_lr") or next(iter(rates.values())))[0]
        each = (time.monotonic() - self._started) / max(runner.iter - self._first_iteration, 1)
        left = tqdm.format_interval(each * max(loop.max_iters - runner.iter, 0))
        show(
            f"epoch {epoch:>{len(str(loop.max_epochs))}}/{loop.max_epochs}  loss {loss:.4f}  "
            f"lr {rate:.2e}  left {left}{validated}"
        )

    def after_train(self, runner: Runner) -> None:
        hub, seconds = runner.message_hub, time.monotonic() - self._started
        updates = math.ceil(runner.iter / accumulative_counts(runner.cfg))
        ended = f"{runner.epoch} epochs, {updates:,} updates; this start took "
        ended += tqdm.format_interval(seconds)
        say("ended", ended)
        best = hub.get_info("best")
        if best:
            say("best", f"{hub.get_info('best_score'):.2f}, {Path(runner.work_dir) / best}")
        runner.logger.info(f"{ended}; best {best}")
        result = dict(epochs=runner.epoch, updates=updates, seconds=seconds, best=best)
        add_to_record(record_path(runner), ended=result)


def say(name: str, value: object) -> None:
    show(f"{name:<11} {value}")


def show(line: str) -> None:
    # Flushed: whoever follows a file or a pipe sees the line now.
    print(line, flush=True)
