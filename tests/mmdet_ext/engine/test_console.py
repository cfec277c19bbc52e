"""The console is a page: what is logged goes to the file, warnings show, the lines are right."""

import json
import logging
import re
import statistics
import warnings

import pytest
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS

from mmdet_ext.engine.console import only_warnings_on_console

from ..small_training import EPOCHS, ITERATIONS, log, run


@HOOKS.register_module()
class Speaker(Hook):
    """Logs and warns in the first iteration."""

    def before_train(self, runner):
        runner.logger.info("a logged detail")
        runner.logger.warning("a logged warning")
        warnings.warn("a warning of Python", stacklevel=1)


@pytest.fixture
def losses(phantom):
    def read(work_dir, name="loss"):
        """A loss of each iteration, as mmengine's own JSON log has it."""
        (file,) = work_dir.glob("*/vis_data/scalars.json")
        lines = map(json.loads, file.read_text().splitlines())
        return [line[name] for line in lines if name in line]

    return read


def test_a_run_prints_a_page_and_its_log_has_the_rest(
    repository, phantom, tmp_path, capsys, losses
):
    with pytest.warns(UserWarning, match="a warning of Python"):
        run(
            repository, phantom, tmp_path, custom_hooks=[dict(type="Speaker")],
            **{"visualizer.vis_backends": [dict(type="LocalVisBackend")],
               "default_hooks.logger.interval": 1, "log_processor.window_size": 1,
               "default_hooks.run_check.interval": 2},
        )  # fmt: skip
    printed, logged = capsys.readouterr().out, log(tmp_path)
    assert "a logged warning" in printed and "a logged warning" in logged
    assert "a logged detail" not in printed and "a logged detail" in logged
    for fact in ("System environment", "Config:", "Sensitivity (%)", f"Epoch(train) [{EPOCHS}]"):
        assert fact not in printed and fact in logged
    epochs = [line for line in printed.splitlines() if line.startswith("epoch ")]
    batches = ITERATIONS // EPOCHS
    means = [sum(losses(tmp_path)[i : i + batches]) / batches for i in range(0, 9, batches)]
    shown = [float(re.search(r"loss (\S+)", line)[1]) for line in epochs]
    assert shown == pytest.approx(means, abs=1e-4) and len(shown) == EPOCHS
    # Validation follows the second epoch, and the last.
    assert ["val FROC/average" in line for line in epochs] == [False, True, True]
    assert len(printed.splitlines()) < 25, printed
    # The card, on the console, in the log and, in parts, in the record.
    file = phantom / "annotations/train.json"
    lesions = len(json.loads(file.read_text())["annotations"])
    lines = [
        f"training    8 images with {lesions} lesions, {file} (DeepLesion: 22,478)",
        "batch       6 images an update = 1 process(es) x 3 x 2 accumulated",
        "updates     5: 3 epochs of 2",
        "BatchNorm   plain",
    ]
    for line in lines:
        assert f"\n{line}\n" in printed and f"\n  {line}\n" in logged, line
    assert re.search(r"\nrate        .*; warm-up 60 updates = 30.00 epochs\n", printed)
    (record,) = tmp_path.glob("run_*.json")
    record = json.loads(record.read_text())
    assert record["training"]["total_batch"] == 6 and record["training"]["reference"] == "demo"
    assert record["ended"]["updates"] == 5 and record["ended"]["best"] in printed
    assert "not compared with the sound runs of 'demo': total batch is 6" in logged
    # The medians that tools/check_run.py reads: of updates, each the mean of its two parts.
    means = [sum(losses(tmp_path, "loss_mask")[i : i + 2]) / 2 for i in (0, 2, 4, 6)]
    expected = [statistics.median(means[:2]), statistics.median(means)]
    assert losses(tmp_path, "median/loss_mask") == pytest.approx(expected, abs=1e-4)


def test_an_epoch_that_was_interrupted_has_its_whole_mean(repository, phantom, tmp_path, capsys):
    options = {
        "default_hooks.checkpoint.by_epoch": False,
        "default_hooks.checkpoint.interval": 1,
        "train_cfg.max_epochs": 1,
    }
    run(repository, phantom, tmp_path / "whole", **options)
    whole = re.search(r"epoch 1/1  loss (\S+)", capsys.readouterr().out)[1]
    run(repository, phantom, tmp_path / "again", str(tmp_path / "whole/iter_2.pth"), **options)
    printed = capsys.readouterr().out
    assert re.search(r"epoch 1/1  loss (\S+)", printed)[1] == whole
    assert "iter_2.pth, goes on with epoch 1, iteration 3" in printed


def test_levels_of_the_console_are_only_raised(tmp_path):
    logger = MMLogger.get_instance("console levels", log_file=str(tmp_path / "a.log"))
    console, file = logger.handlers
    only_warnings_on_console(logger)
    assert (console.level, file.level) == (logging.WARNING, logging.INFO)
    console.setLevel(logging.ERROR)  # as in processes other than the first
    only_warnings_on_console(logger)
    assert console.level == logging.ERROR
