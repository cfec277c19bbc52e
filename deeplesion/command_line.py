"""The border of every command: what the user can mend is a sentence, an error of ours a report."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from deeplesion.errors import UserError, WriteError, install, message_of

REPORT = (
    "This is an error in the program, not in what you gave it: please report it, with the command"
    " and all of the text above."
)
INTERRUPTED = 130  # as shells say it: 128 + SIGINT
OURS = ("benchmarks", "ct_volumes", "deeplesion", "mmdet_ext", "tools")
# Which extra of pyproject.toml installs what is imported under these names.
EXTRAS = {
    "data": ("cv2", "matplotlib", "pandas", "pycocotools", "skimage", "tqdm"),
    "fast": ("blosc2", "kornia_rs"),
    "ct": ("gdcm", "highdicom", "nibabel", "pydicom"),
    "detector": ("mmcv", "mmdet", "mmengine", "tensorboard"),
    "onnx": ("onnxruntime",),
    "export": ("onnx", "onnxscript"),
    "slurm": ("submitit",),
    "volumes": ("monai",),
}


def config_help(what: str = "config", example: str = "alignshift_7slice") -> str:
    """The help of an argument that names a config: `what` it is to the command, and an example."""
    return f"{what}: a file, or the name of an experiment, such as {example}"


def command(failure: int = 1) -> Callable[[Callable], Callable]:
    """Decorates the main function of a command. The class of an exception decides.

    A `UserError`, a library that is not installed, a refusal of the system (`OSError`) and a lack
    of memory end the command with a sentence on stderr that begins with the command's name, and the
    exit status `failure`; Ctrl-C ends it with 130. Anything else is an error of ours: its traceback
    is shown, and `REPORT`.
    """

    def decorate(main: Callable[[], int | None]) -> Callable[[], int | None]:
        @functools.wraps(main)
        def run() -> int | None:
            try:
                status = main()
                sys.stdout.flush()
                return status
            except KeyboardInterrupt as interrupt:
                status, text = INTERRUPTED, str(interrupt) or "interrupted"
            except BrokenPipeError as error:
                if _output_is_read():  # it is another pipe
                    status, text = failure, sentence(error)
                else:  # who reads the output, such as `head`, has enough
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    sys.exit(failure)
            except (UserError, OSError, MemoryError) as error:
                status, text = failure, sentence(error)
            except Exception as error:
                if not _lacks_library(error):
                    error.add_note(REPORT)
                    raise
                status, text = failure, sentence(error)
            text = f"{Path(sys.argv[0]).stem}: {text}"
            if status == 1:
                sys.exit(text)  # of several processes the launcher is told the text as well
            print(text, file=sys.stderr, flush=True)
            sys.exit(status)

        return run

    return decorate


@contextlib.contextmanager
def told_to_repeat() -> Iterator[None]:
    """What is interrupted inside goes on when the command is given again, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; the same command continues where it stopped"
        ) from None


def sentence(error: Exception) -> str:
    """What is said of an error that the user can mend."""
    if isinstance(error, UserError):
        return message_of(error)
    if isinstance(error, ModuleNotFoundError):
        top = error.name.partition(".")[0]
        extra = next((extra for extra, names in EXTRAS.items() if top in names), None)
        way = f": {install(extra)}" if extra else ""
        return f"{error.name} is not installed{way}"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}".removesuffix(": ")
    if isinstance(error, WriteError) or error.filename is None or error.strerror is None:
        return message_of(error)
    names = " and ".join(str(n) for n in (error.filename, error.filename2) if n is not None)
    return f"{names}: {error.strerror}"


def _lacks_library(error: Exception) -> bool:
    return (
        isinstance(error, ModuleNotFoundError)
        and error.name is not None
        and error.name.partition(".")[0] not in OURS
    )


def _output_is_read() -> bool:
    """Whether there is still somebody at the other end of stdout."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))
