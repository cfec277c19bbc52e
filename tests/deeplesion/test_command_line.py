"""The border of the commands: whose error it is shows in how a command ends."""

import errno
import re
import subprocess
import sys
import tomllib

import pytest

from deeplesion.command_line import EXTRAS, REPORT, command, told_to_repeat
from deeplesion.errors import DataError, MissingDataError, UserError, WriteError
from mmdet_ext.checkpoint import CheckpointError
from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.hooks import LossError


def ending(error, failure=1):
    """How a command that raises this ends: its exit status, or the error itself."""

    @command(failure)
    def main():
        raise error

    with pytest.raises(BaseException) as end:
        main()
    return end.value


@pytest.fixture(autouse=True)
def name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "config.py"])


@pytest.mark.parametrize(
    "error, text",
    [
        (UserError("--seed must be at least 0"), "--seed must be at least 0"),
        (DataError("a.csv lacks columns"), "a.csv lacks columns"),
        (MissingDataError("no file a.json"), "no file a.json"),
        (CheckpointError("a.pth is damaged"), "a.pth is damaged"),
        (ConfigError("no option lrr"), "no option lrr"),
        (LossError("the loss is nan"), "the loss is nan"),
        (WriteError("cannot write a: disk full", errno.ENOSPC), "cannot write a: disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a.json"), "a.json: Is a directory"),
        (OSError(errno.EXDEV, "Cross-device link", "a", None, "b"), "a and b: Cross-device link"),
        (OSError("cannot identify image file"), "cannot identify image file"),
        (MemoryError("Unable to allocate 4 GiB"), "out of memory: Unable to allocate 4 GiB"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_user_can_mend_is_a_sentence_with_the_commands_name(error, text):
    end = ending(error)
    assert isinstance(end, SystemExit) and end.code == f"train: {text}"


@pytest.mark.parametrize(
    "module, text",
    [
        ("cv2", "cv2 is not installed: pip install 'deeplesion-mmdet[data]'"),
        # The extra would bring MMDetection again, and mmcv without its operators.
        ("monai.networks", "monai.networks is not installed: pip install monai"),
        ("einops", "einops is not installed"),  # of an operator of the user's
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(module, text):
    assert ending(ModuleNotFoundError(name=module)).code == f"train: {text}"


def test_every_library_is_of_the_extra_that_installs_it(repository):
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    asked = {name: {re.split(r"[\[><=]", line)[0] for line in extras[name]} for name in extras}
    brought = {name: {pip_name(module) for module in EXTRAS[name]} for name in EXTRAS}
    assert brought == {name: lines - {"deeplesion-mmdet"} for name, lines in asked.items()}


def pip_name(module):
    """What pip calls the library that is imported as `module`."""
    other = {
        "cv2": "opencv-python-headless", "skimage": "scikit-image", "kornia_rs": "kornia-rs",
        "gdcm": "python-gdcm", "mmcv": "onedl-mmcv", "mmdet": "onedl-mmdetection",
        "mmengine": "onedl-mmengine",
    }  # fmt: skip
    return other.get(module, module)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        ModuleNotFoundError(name="deeplesion.x"),
        KeyError("x"),
        RuntimeError("x"),
        AssertionError(),
        TypeError("x"),
    ],
)
def test_an_error_of_ours_passes_and_asks_for_a_report(error):
    assert ending(error) is error
    assert error.__notes__ == [REPORT]


def test_the_traceback_of_an_error_of_ours_ends_with_the_request():
    code = (
        "from deeplesion.command_line import command\n"
        "@command()\ndef main():\n    return {}['key']\nmain()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("Traceback") and run.stderr.endswith(f"'key'\n{REPORT}\n")


def test_what_a_worker_of_a_loader_passed_on_is_its_last_line_alone():
    passed = DataError(
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n  File ...\n"
        "deeplesion.errors.DataError: cannot read a.png\n"
    )
    assert ending(passed).code == "train: cannot read a.png"


def test_ctrl_c_ends_with_130(capsys):
    assert ending(KeyboardInterrupt()).code == 130
    assert capsys.readouterr().err == "train: interrupted\n"

    @command()
    def main():
        with told_to_repeat():
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == (
        "train: interrupted; the same command continues where it stopped\n"
    )


def test_a_command_may_have_another_status_of_failure(capsys):
    assert ending(UserError("nothing to do"), failure=2).code == 2
    assert capsys.readouterr().err == "train: nothing to do\n"


def test_results_and_exits_of_argparse_pass():
    assert command()(lambda: 3)() == 3
    assert ending(SystemExit(2)).code == 2


def test_who_reads_the_output_may_have_enough():
    code = (
        "from deeplesion.command_line import command\n"
        "@command()\ndef main():\n    for i in range(100_000): print(i)\nmain()\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 1
    run.stderr.close()
