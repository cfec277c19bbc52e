"""What an experiment states once for several of its parts: the stack of slices, and the resizing.

    stack = dict(num_slices=7, policy="keep_thick")  # what `load_slices` takes
    resize = dict(size=192, prob=0.3)  # what `RandomAffineResize` takes

stand at the top level of a config. Every data set whose pipeline loads slices gets the stack, a
detector that takes it its `num_slices`, and every `RandomAffineResize` what `resize` says.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_ext.config.check import ConfigError

SHARED = ("stack", "resize")


class MissingConfigError(ConfigError, FileNotFoundError):
    """There is no such config."""


def config_folder() -> Path:
    """The experiments' configs: the repository's, or those that were installed with the package."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str | Path) -> Path:
    """The file of an experiment: a path, or the name of one of the experiments that come along,
    such as alignshift_7slice or demo/alignshift_3slice.

    Raises MissingConfigError with the nearest names.
    """
    path, folder = Path(name).expanduser(), config_folder()
    if path.is_file():
        return path
    wanted = path.as_posix().removesuffix(".py").removeprefix("configs/")
    if (found := folder / f"{wanted}.py").is_file():
        return found
    known = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.py")]
    known = sorted(each for each in known if not each.startswith("_"))
    close = difflib.get_close_matches(wanted, known, 3, 0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
    raise MissingConfigError(f"no config file {name}, and no experiment of that name; {hint}")


def config_name(path: str | Path) -> str:
    """What an experiment's file is called: alignshift_7slice or, in a folder of those that come
    along, demo/alignshift_3slice; the name of a file of one's own, without its folder."""
    file, folder = Path(path).resolve(), config_folder().resolve()
    inside = file.is_relative_to(folder)
    return file.relative_to(folder).with_suffix("").as_posix() if inside else file.stem


def read_config(path: str | Path) -> Config:
    """A config file as it stands, and the modules that it names in `custom_imports` imported.

    Raises ConfigError, with file and line, for whatever it cannot be read for: the files of
    experiments are programs, which users write. A variable of the environment that is set, but
    empty, such as DEEPLESION_ROOT, is named.
    """
    try:
        config = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:
        if empty := [n for n, value in os.environ.items() if not value and f"`{n}`" in str(error)]:
            # mmengine says that it is not set; then the config's own default would hold.
            raise ConfigError(
                f"{path} reads the variable {empty[0]}, which is set, but empty: give it a value, "
                "or unset it"
            ) from error
        lines = [
            f"{frame.f_code.co_filename}, line {line}: "
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.endswith(".py")
        ]
        kind = "" if isinstance(error, (OSError, SyntaxError)) else f"{type(error).__name__}: "
        where = f"cannot read the config {path}: {lines[-1] if lines else ''}"
        raise ConfigError(f"{where}{kind}{error}") from error
    modules = config.get("custom_imports", {}).get("imports") or []
    for module in [modules] if isinstance(modules, str) else modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # it is there, and lacks something itself
            raise ConfigError(
                f"{path}: custom_imports names {module}, and there is no module {error.name}. Its "
                "folder must be in PYTHONPATH"
            ) from None
    return config


def read_experiment(path: str | Path) -> Config:
    """A config file with `stack` and `resize` where they belong."""
    config = read_config(path)
    spread(config)
    return config


def spread(config: Config, replace: bool = False) -> None:
    """Writes `stack` and `resize` of the top level to all that they concern.

    Raises ConfigError where one of these says something else already, unless `replace`.
    """

    def state(path: str, holder: dict, name: str, value: Any, source: str) -> None:
        if replace:
            holder[name] = value
        elif holder.setdefault(name, value) != value:
            raise ConfigError(
                f"{path}.{name} is {holder[name]!r}, but {source} is {value!r}, which holds for "
                f"every part: set {source} and leave out {path}.{name}"
            )

    stack, resize = config.get("stack"), config.get("resize", {})
    if stack is not None and _takes_num_slices(config.get("model")):
        state("model", config.model, "num_slices", stack.num_slices, "stack.num_slices")
    for split in ("train", "val", "test"):
        loader = f"{split}_dataloader"
        for path, node in dicts(config.get(loader), loader):
            if stack is not None and _loads_slices(node):
                node.setdefault("stack", {})
                own = node["stack"]
                for name, value in stack.items():
                    state(f"{path}.stack", own, name, value, f"stack.{name}")
            if node.get("type") == "RandomAffineResize":
                for name, value in resize.items():
                    state(path, node, name, value, f"resize.{name}")


def _takes_num_slices(model: Mapping | None) -> bool:
    """Whether the detector has that argument: mmdet's own 2D detectors, say, do not."""
    kind = model and model.get("type")
    classes = inspect.getmro((MODELS.get(kind) if isinstance(kind, str) else kind) or object)
    return any("num_slices" in inspect.signature(c.__init__).parameters for c in classes)


def _loads_slices(node: Mapping) -> bool:
    steps = node.get("pipeline") or ()
    return any(isinstance(s, Mapping) and s.get("type") == "LoadCTSlices" for s in steps)


def type_name(node: Mapping) -> str | None:
    """What a dict of a config calls its class, which may also stand there itself."""
    kind = node.get("type")
    return getattr(kind, "__name__", kind)


def dicts(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Every dict in nested dicts and lists, and its path."""
    if isinstance(node, Mapping):
        yield path, node
        items = node.items()
    else:
        items = enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, item in list(items):
        yield from dicts(item, f"{path}.{key}")
