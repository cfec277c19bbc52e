"""What the commands do: build a runner from a config, train, test, and turn the framework's
failures into messages a user can act on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger

from deeplesion.errors import DataError, MissingDataError, message_of
from mmdet_ext.config.check import ConfigError, check_option_names
from mmdet_ext.config.experiment import spread
from mmdet_ext.config.overrides import apply_overrides
from mmdet_ext.engine.console import ConsoleHook, import_mmdet, only_warnings_on_console
from mmdet_ext.engine.distributed import join_processes, settle_learning_rate
from mmdet_ext.engine.run_record import write_run_record
from mmdet_ext.engine.runner import ResumableRunner

OUT_OF_MEMORY = """out of memory on {device}. What lowers it, the cheapest first:
  --cfg-options model.backbone.with_cp=True       compute dense layers again in the backward pass
  --amp                                           half precision (GPU)
  --cfg-options optim_wrapper.accumulative_counts=4   a quarter of the images at once, the same
                                                  total batch: the recipe stays (4 must divide it)
  --cfg-options stack.num_slices=3                3 instead of 7 slices
The message of torch: {error}"""


def load_config(path: str, overrides: dict | None = None, work_dir: str | None = None) -> Config:
    """Reads a config file, applies `--cfg-options`, and settles the work directory.

    `work_dir`: the argument, else what the config says, else work_dirs/<name of the config>.
    Raises FileNotFoundError naming the config if there is none, ConfigError for names in it or in
    the overrides that nothing reads.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}; the experiments are in configs/")
    only_warnings_on_console(MMLogger.get_current_instance())  # mmengine's own, until a run has one
    import_mmdet()
    config = Config.fromfile(path)
    apply_overrides(config, overrides or {})
    spread(config)
    check_option_names(config)
    if work_dir or config.get("work_dir") is None:
        config.work_dir = work_dir or str(Path("work_dirs") / Path(path).stem)
    return config


def build_runner(config: Config) -> ResumableRunner:
    """The runner, of several processes also on a machine without a GPU; records the run."""
    join_processes(config)
    runner = ResumableRunner.from_cfg(config)
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
) -> None:
    """Trains as `config` says.

    Args:
        resume: None, 'auto' (the work directory's last checkpoint, if any) or a checkpoint's path.
        amp: mixed precision.
        compile_static: torch.compile the part of static shape, backbone and neck.
        auto_scale_lr: scale the learning rate with the total batch (`settle_learning_rate`).
    """
    if amp:
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    with actionable_errors():
        if resume:
            config.resume = True
            config.load_from = None if resume == "auto" else existing_file(resume)
        join_processes(config)
        batch = settle_learning_rate(config, auto_scale_lr)
        runner = build_runner(config)
        runner.logger.info(batch)
        if compile_static:
            model = getattr(runner.model, "module", runner.model)
            # Sizes are static: an epoch's last batch, if smaller, gets a program of its own.
            model.backbone.compile(dynamic=False)
            model.neck.compile(dynamic=False)
        runner.train()


def test(config: Config, checkpoint: str, result_file: str | None = None) -> str:
    """Tests a checkpoint on the test split; returns the result file, the FROC table beside it.

    Args:
        checkpoint: a file, or a work directory, whose best checkpoint is taken.
        result_file: where detections and ground truth go, the table as JSON beside it; default:
            results.json.gz in the work directory.
    """
    result_file = result_file or str(Path(config.work_dir) / "results.json.gz")
    config.test_evaluator.result_file = result_file
    with actionable_errors():
        config.load_from = find_checkpoint(checkpoint)
        build_runner(config).test()
    return result_file


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


def existing_file(path: str) -> str:
    if not Path(path).is_file():
        raise MissingDataError(f"no checkpoint file {path}")
    return path


@contextlib.contextmanager
def actionable_errors() -> Iterator[None]:
    """Says what is wrong with the config or the data, or what to do when memory runs out, without a
    traceback."""
    try:
        yield
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    except DataError as error:
        raise SystemExit(message_of(error)) from None
    except FloatingPointError as error:  # FiniteLossHook's
        raise SystemExit(str(error)) from None
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(OUT_OF_MEMORY.format(device="the GPU", error=error)) from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise SystemExit(OUT_OF_MEMORY.format(device="the CPU", error=error)) from None
