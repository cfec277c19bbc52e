"""What the commands do: build a runner from a config, train, test, and say of the framework's
failures what a user can do."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import PrepareTTAHook
from mmengine.logging import MMLogger

from deeplesion.errors import MissingDataError, UserError
from deeplesion.files import file_sha256
from deeplesion.lock import only_writer
from deeplesion.processes import termination_interrupts
from mmdet_ext.checkpoint import LAST_CHECKPOINT
from mmdet_ext.config.check import ConfigError, check_option_names, refused_by_parts
from mmdet_ext.config.experiment import (
    config_name,
    dicts,
    find_config,
    read_config,
    spread,
    type_name,
)
from mmdet_ext.config.overrides import apply_overrides
from mmdet_ext.engine.console import ConsoleHook, import_mmdet, only_warnings_on_console
from mmdet_ext.engine.distributed import join_processes, settle_learning_rate
from mmdet_ext.engine.ignored_regions import IgnoredRegionsHook
from mmdet_ext.engine.resources import ResourcesHook
from mmdet_ext.engine.run_record import write_run_record
from mmdet_ext.engine.runner import ResumableRunner
from mmdet_ext.engine.trained_as import TrainedAsHook
from mmdet_ext.engine.workers import advice_on_lost_batch
from mmdet_ext.engine.wrapped_data import refuse_wrapped

OUT_OF_MEMORY = """out of memory on {device}. What lowers it, the cheapest first:
{advice}
The message of torch: {error}"""
LESS_OF_A_DETECTOR = """\
  --cfg-options model.backbone.with_cp=True       compute dense layers again in the backward pass
  --amp                                           half precision (GPU)
  --cfg-options optim_wrapper.accumulative_counts=4   a quarter of the images at once, the same
                                                  total batch: the recipe stays (4 must divide it)
  --cfg-options stack.num_slices=3                3 instead of 7 slices"""
LESS_OF_VOLUMES = """\
  --amp                                           half precision (GPU)
  --cfg-options optim_wrapper.accumulative_counts=4   a quarter of the crops at once, the same
                                                  total batch: the recipe stays (4 must divide it)
  --cfg-options train_dataloader.dataset.pipeline.0.size=...   smaller crops in training
  --cfg-options model.test_cfg.window=... model.test_cfg.step=...   smaller windows in testing"""

NODULE_METRICS = ("NoduleDiceMetric", "NoduleAUCMetric")
# What metrics write in testing, if no other name is given.
RESULT_FILES = {
    "FROCMetric": "results.json.gz",
    "DiceMetric": "dice.json",
    "VolumeDiceMetric": "dice.json",
    **dict.fromkeys(NODULE_METRICS, "nodules.json"),
}
TRAINED_ALREADY = (
    "{folder} holds a training already ({last}), whose checkpoints this one would replace. "
    "--resume goes on with it; to train anew give another --work-dir, or remove that folder"
)
TAKEN_OVER = "{folder} was left by {holder}, which was ended before it could give it back"


def load_config(
    path: str,
    overrides: dict | None = None,
    work_dir: str | None = None,
    checkpoint: str | None = None,
) -> Config:
    """Reads a config file, applies `--cfg-options`, and settles the work directory.

    Args:
        path: a file, or the name of an experiment that comes along (`find_config`).
        overrides: of `--cfg-options`.
        work_dir: if it is None, what the config says; if that says nothing, work_dirs/<name of the
            config> (`config_name`) or, of a test, the folder of its checkpoint.
        checkpoint: of a test, a file or a work directory.

    Raises ConfigError: no such config, one that cannot be read, or names in it or in the overrides
    that nothing reads.
    """
    path = str(find_config(path))
    only_warnings_on_console(MMLogger.get_current_instance())  # mmengine's own, until a run has one
    import_mmdet()
    config = read_config(path)
    apply_overrides(config, overrides or {})
    spread(config)
    check_option_names(config)
    settle_workers(config)
    # A test lies beside its weights: the config's own folder may hold another training.
    default = folder_of(checkpoint) if checkpoint else Path("work_dirs", config_name(path))
    config.work_dir = work_dir or config.get("work_dir") or str(default)
    return config


def settle_workers(config: Config) -> None:
    """Without workers (`num_workers=0`) there is nothing that could persist or prefetch; torch's
    DataLoader refuses to be asked for it."""
    for split in ("train", "val", "test"):
        loader = config.get(f"{split}_dataloader")
        if loader and not loader.get("num_workers"):
            loader.persistent_workers = False
            loader.pop("prefetch_factor", None)


def build_runner(
    config: Config,
    accept_differences: bool = False,
    load_from: str | None = None,
    resume: bool | str = False,
) -> ResumableRunner:
    """The runner, of several processes also on a machine without a GPU; records the run.

    Args:
        accept_differences: see `TrainedAsHook`.
        load_from: the checkpoint of this start; None: what the config says.
        resume: whether this start goes on with a run, as in mmengine. Neither is of the experiment,
            and the config that the run saves, which can be run again, does not have them.
    """
    join_processes(config)
    config.resume = False
    runner = ResumableRunner.from_cfg(config)
    runner._load_from, runner._resume = load_from or runner._load_from, resume
    runner.register_hook(TrainedAsHook(accept_differences))
    runner.register_hook(IgnoredRegionsHook())
    runner.register_hook(ResourcesHook())
    if is_main_process():
        runner.register_hook(ConsoleHook())
    write_run_record(runner)
    return runner


def train(
    config: Config,
    resume: str | None = None,
    amp: bool = False,
    compile_static: bool = False,
    auto_scale_lr: bool = False,
    accept_differences: bool = False,
) -> None:
    """Trains as `config` says.

    Args:
        resume: None, 'auto' (the work directory's last checkpoint; while there is none, training
            starts as without it) or a checkpoint's path. With None a work directory that holds a
            checkpoint of another training is refused, by a UserError.
        amp: mixed precision.
        compile_static: torch.compile the part of static shape: backbone and neck of a detector,
            the network of a segmentor.
        auto_scale_lr: scale the learning rate with the total batch (`settle_learning_rate`).
        accept_differences: of weights that were trained as another network (`TrainedAsHook`).
    """
    for split in ("train", "val"):
        refuse_wrapped(config, split)
    if amp:
        if not torch.cuda.is_available():
            raise ConfigError("--amp is for a GPU, and torch sees none here: leave it out")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    with framework_errors(config), told_to_resume(config):
        resume = resume or config.get("resume", False)
        from_file = existing_file(resume) if resume not in ("auto", True, False) else None
        join_processes(config)
        with writer(config, Path(config.work_dir) / "train.lock", "--work-dir") as taken_over:
            if is_main_process() and not resume:
                refuse_to_replace(Path(config.work_dir))
            batch = settle_learning_rate(config, auto_scale_lr)
            runner = build_runner(config, accept_differences, from_file, bool(from_file) or resume)
            runner.logger.info(batch)
            if taken_over:
                runner.logger.warning(TAKEN_OVER.format(folder=config.work_dir, holder=taken_over))
            if compile_static:
                model = getattr(runner.model, "module", runner.model)
                for part in ("backbone", "neck", "network"):
                    # Sizes are static: an epoch's last batch, if smaller, gets its own program.
                    if hasattr(model, part):
                        getattr(model, part).compile(dynamic=False)
            runner.train()


def test(
    config: Config,
    checkpoint: str,
    result_file: str | None = None,
    accept_differences: bool = False,
    views: Sequence[str] = (),
) -> str | None:
    """Tests a checkpoint on the test split; returns the result file, the FROC table beside it (of
    other metrics the scores themselves). None if none of `test_evaluator`'s metrics writes one.

    Args:
        checkpoint: a file, or a work directory, whose best checkpoint is taken.
        result_file: where detections and ground truth go, the table as JSON beside it; default:
            results.json.gz in the work directory (of other metrics, the scores, dice.json or
            nodules.json), with all views results_tta.json.gz, with some of them
            results_tta_horizontal_both.json.gz.
        accept_differences: of weights that were trained as another network (`TrainedAsHook`).
        views: of test-time augmentation (`ViewsTTA`), with which the result is marked.
    """
    refuse_wrapped(config, "test")
    metrics = [m for _, m in dicts(config.test_evaluator, "") if type_name(m) in RESULT_FILES]
    name = RESULT_FILES[type_name(metrics[0])] if metrics else "results.json.gz"
    if views:
        if not metrics or any(type_name(metric) != "FROCMetric" for metric in metrics):
            raise ConfigError("--tta marks its result in the file of a FROCMetric: there is none")
        name = name_of_views(name, views)
    result_file = result_file or str(Path(config.work_dir) / name)
    with framework_errors(config):
        weights = find_checkpoint(checkpoint)
        for metric in metrics:
            if type_name(metric) == "FROCMetric":
                metric["views"] = list(views)  # a config that a test saved has those of that test
        for metric in metrics[:1]:
            metric["result_file"] = result_file
            if type_name(metric) == "FROCMetric":
                metric["model"] = dict(
                    config=config_name(config.filename or "config"),
                    checkpoint=Path(weights).name,
                    checkpoint_sha256=file_sha256(weights),
                )
            if type_name(metric) in NODULE_METRICS:
                metric["epoch_chosen_on_test"] = chosen_on_test(config, weights)
        join_processes(config)
        # Its other files have names of their own: it may run beside a training.
        with writer(config, Path(f"{result_file}.lock"), "--out"):
            runner = build_runner(config, accept_differences, weights)
            if views:
                runner.register_hook(PrepareTTAHook(dict(type="ViewsTTA", views=list(views))))
            runner.test()
    return result_file if metrics else None


def name_of_views(name: str, views: Sequence[str]) -> str:
    """What a result is called that was made with views: each set of them has a name of its own."""
    every = inspect.signature(MODELS.get("ViewsTTA")).parameters["views"].default
    some = [] if {*views} == {*every} else views
    stem, dot, ending = name.partition(".")
    return "_".join([stem, "tta", *some]) + dot + ending


def refuse_to_replace(work_dir: Path) -> None:
    """Raises UserError if a training has left a checkpoint in the folder: a new one would replace
    its weights one after the other, beside results of the old ones."""
    last = work_dir / LAST_CHECKPOINT
    if last.is_file():
        name = Path(last.read_text().strip()).name
        raise UserError(TRAINED_ALREADY.format(folder=work_dir, last=name))


def chosen_on_test(config: Config, checkpoint: str) -> bool:
    """Whether the checkpoint is the best of its training by a score on the samples of the test."""
    val, test = (config.get(f"{split}_dataloader") for split in ("val", "test"))
    return bool(val and test and val.dataset == test.dataset) and (
        Path(checkpoint).name.startswith("best_")
    )


@contextlib.contextmanager
def writer(config: Config, lock: Path, elsewhere: str) -> Iterator[str | None]:
    """A run that writes: the only one there, and ended by SIGTERM as by Ctrl-C.

    Yields what `only_writer` does, in the main process. Of several processes SIGTERM ends each at
    once, since one that waits for another in the middle of a step hears nothing.
    """
    alone = config.get("launcher", "none") == "none"
    with (
        only_writer(lock, elsewhere) if is_main_process() else contextlib.nullcontext() as before,
        termination_interrupts() if alone else contextlib.nullcontext(),
    ):
        yield before


def find_checkpoint(path: str) -> str:
    """A checkpoint file; of a directory its newest best one, else its newest."""
    if not Path(path).is_dir():
        return existing_file(path)

    def age(file: Path) -> tuple[float, int]:
        # A run repeated in the same folder leaves older files of higher epochs behind.
        return file.stat().st_mtime, int(re.search(r"(\d+)\.pth$", file.name)[1])

    for pattern in ("best_*.pth", "epoch_*.pth", "iter_*.pth"):
        found = [f for f in Path(path).glob(pattern) if re.search(r"\d+\.pth$", f.name)]
        if found:
            return str(max(found, key=age))
    raise MissingDataError(f"{path} holds no checkpoint (best_*.pth, epoch_*.pth or iter_*.pth)")


def folder_of(checkpoint: str) -> Path:
    """The folder of a checkpoint, which may be given as that folder itself."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def existing_file(path: str) -> str:
    if not Path(path).is_file():
        raise MissingDataError(f"no checkpoint file {path}")
    return path


@contextlib.contextmanager
def told_to_resume(config: Config) -> Iterator[None]:
    """Says, when training is interrupted, how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        last = Path(config.work_dir) / LAST_CHECKPOINT
        if last.is_file():
            text = f"the same command with --resume goes on from {last.read_text().strip()}"
        else:
            text = "no checkpoint was saved yet, the same command starts anew"
        raise KeyboardInterrupt(f"interrupted; {text}") from None


@contextlib.contextmanager
def framework_errors(config: Mapping) -> Iterator[None]:
    """Errors of the framework that the user can mend become UserErrors: what a part of the config
    refuses, and a lack of memory, with what lowers it."""
    advice = LESS_OF_VOLUMES if "network" in config["model"] else LESS_OF_A_DETECTOR
    out_of_memory = functools.partial(OUT_OF_MEMORY.format, advice=advice)
    try:
        with refused_by_parts():
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(out_of_memory(device="the GPU", error=error)) from error
    except Exception as error:
        if lost := advice_on_lost_batch(error):
            raise UserError(lost) from error
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(out_of_memory(device="the CPU", error=error)) from error
