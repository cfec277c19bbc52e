"""What the user can mend, told from errors in the code: a command prints the message and ends
(deeplesion/command_line.py)."""


class UserError(ValueError):
    """An option, a config or a file is not what it must be. The message names it and says what to
    do."""


class DataError(UserError):
    """A file of the data is not what it must be. The message names it and says what to do."""


class MissingDataError(DataError, FileNotFoundError):
    """A file of the data is not there."""


class CacheError(DataError):
    """The slice cache is not what it must be; nothing is wrong with the data that it is made of."""


class WriteError(OSError):
    """A file cannot be written. The message names it, the reason, and what to do; `errno` stays."""

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.errno = number


# The extras that bring MMDetection too would have pip build mmcv anew, and without its operators.
LIBRARIES_ALONE = {
    "detector": "make setup, or docs/training.md, Installed by pip",
    "export": "pip install onnx onnxscript onnxruntime",
    "slurm": "pip install submitit",
    "volumes": "pip install monai",
}


def install(extra: str) -> str:
    """How to install what an extra of ours brings, for the end of a message."""
    return LIBRARIES_ALONE.get(extra, f"pip install 'deeplesion-mmdet[{extra}]'")


def message_of(error: Exception) -> str:
    """The message alone, also where a DataLoader's worker passed it on within its traceback."""
    return str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
