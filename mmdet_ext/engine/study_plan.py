"""What a study consists of: its methods, and for each a fingerprint of config, code and data, by
which finished runs are known again."""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import DefaultScope

from deeplesion.data.coco import image_folders, read_json
from deeplesion.errors import MissingDataError, UserError
from deeplesion.files import file_sha256
from mmdet_ext.config.check import RUNNER, find, refused_by_parts
from mmdet_ext.config.experiment import dicts, type_name
from mmdet_ext.config.overrides import Overrides
from mmdet_ext.engine.run import RESULT_FILES
from mmdet_ext.engine.study_run import Method

FRAMEWORK = {"builtins", "mmcv", "mmdet", "mmengine", "torch", "torchvision"}
PROJECT = ("ct_volumes", "deeplesion", "mmdet_ext")
TESTING = {"test_dataloader", "test_evaluator", "test_cfg"}
COMMANDS = {"training": "train.py", "test": "test.py"}
SHOWN = "deeplesion.report"  # no result depends on how one is shown
# What says where a run is, which one it is and what it tells, not what is done.
PLACE = {"work_dir", "experiment_name", "launcher", "resume"}
PLACE |= {"visualizer", "log_level", "log_processor"}
# Options of hooks and loaders likewise: what is augmented does not depend on the workers.
TELLING_HOOKS = {"logger", "run_check", "timer"}
LOADING = {"num_workers", "persistent_workers", "prefetch_factor", "pin_memory", "timeout"}
SET_BY_RUNS = {
    "randomness.seed": "--seeds N takes 0 to N - 1",
    "work_dir": "every run has a folder in that of --out",
    "resume": "a run that was interrupted goes on",
}
NOT_PREPARED = "there is no {file}, which {config} needs: prepare the data (tools/prepare_data.py)"
# Of an annotation file: the folders in which `prepare` found the series, the only list of names
# that is called so.
IMAGES = re.compile(
    rb'("images":\s*)\[\s*"(?:[^"\\]|\\.)*"(?:\s*,\s*"(?:[^"\\]|\\.)*")*\s*\]', re.DOTALL
)
# Libraries lie there, not what belongs to a module of one's own.
INSTALLED = {"site-packages", "dist-packages"}


def methods_of(
    configs: Sequence[str], variants: Sequence[Sequence[str]], common: Sequence[str]
) -> list[Method]:
    """The methods of a command line, without fingerprints.

    Args:
        configs: one method each, named by the file.
        variants: [name, config, option, ...] each.
        common: options of all, over which a variant's own go.

    Raises:
        UserError: no method, two of one name, or a variant without a config.
    """
    for variant in variants:
        if len(variant) < 2 or "=" in variant[0] or "=" in variant[1]:
            raise UserError(f"--variant takes NAME CONFIG [k=v ...], got {' '.join(variant)}")
    stems = Counter(Path(config).stem for config in configs)
    found = [
        Method(Path(c).stem if stems[Path(c).stem] == 1 else Path(c).with_suffix("").as_posix(),
               c, tuple(common))
        for c in configs
    ]  # fmt: skip
    found += [Method(name, config, (*common, *own)) for name, config, *own in variants]
    if not found:
        raise UserError("give at least one CONFIG or --variant NAME CONFIG [k=v ...]")
    if again := [n for n, times in Counter(m.name for m in found).items() if times > 1]:
        raise UserError(
            f"two methods are called {again[0]}: give them names by --variant NAME CONFIG [k=v ...]"
        )
    for name in (method.name for method in found):
        if not name.strip() or not name.isprintable():
            raise UserError(f"a method cannot be called {name!r}")
    return found


def parsed(options: Sequence[str]) -> dict[str, Any]:
    """Options 'name=value' as --cfg-options gives them to a config."""
    parser = argparse.ArgumentParser("--cfg-options", exit_on_error=False, add_help=False)
    parser.add_argument("--cfg-options", nargs="*", action=Overrides, default={})
    try:
        return parser.parse_args(["--cfg-options", *options]).cfg_options or {}
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def besides_operators(methods: Sequence[Method], configs: Sequence[Config]) -> list[str]:
    """Lines that say which methods have which slices (policy, target) and which schedule, if these
    differ and not every operator is there with all of them: the difference of two methods is then
    not that of their operators alone."""
    lines, fused = [], [_operator(config) for config in configs]
    for what, options_of in (("slices", _slices), ("schedule", _schedule)):
        options = [options_of(config) for config in configs]
        every = dict.fromkeys(name for each in options for name in each)
        differ = [name for name in every if len({str(each.get(name)) for each in options}) > 1]
        names: dict[str, list[str]] = {}
        operators: dict[str, set] = {}
        for method, operator, own in zip(methods, fused, options, strict=True):
            given = ", ".join(f"{name}={own.get(name)}" for name in differ)
            names.setdefault(given, []).append(repr(method.name))
            operators.setdefault(given, set()).add(operator)
        first, *others = operators.values()
        if any(each != first for each in others):
            groups = "; ".join(f"{given} in {', '.join(those)}" for given, those in names.items())
            lines.append(
                f"note: the methods differ in their {what} too, not in the operator alone: {groups}"
            )
    return lines


def _operator(config: Config) -> Any:
    backbone = (config.get("model") or {}).get("backbone") or {}
    return (backbone.get("fusion") or {}).get("type")


def _slices(config: Config) -> dict[str, Any]:
    stack = config.get("stack") or {}
    return {f"stack.{option}": stack.get(option) for option in ("policy", "target_mm")}


def _schedule(config: Config) -> dict[str, Any]:
    found = {"train_cfg.max_epochs": (config.get("train_cfg") or {}).get("max_epochs")}
    for path, part in dicts(config.get("param_scheduler"), "param_scheduler"):
        found |= {f"{path}.{option}": value for option, value in part.items()}
    return found


def with_fingerprints(method: Method, config: Config, code: Mapping[str, str]) -> Method:
    """The method with the fingerprints of its config as it was read, with its options.

    config: what the parts of the run are told, without the places of work directory and data, and
    without the seed, and without what decides how fast data is loaded. data: contents of the
    annotation files, but for the folders in which `prepare` found the series, and of weights that
    training starts from. Pixels are not read: the annotations name every image, in a folder that is
    a place if its path is absolute.

    Args:
        code: 'training' and 'test', of `code_hashes`.

    Raises:
        MissingDataError: an annotation file is not there, or weights that training starts from.
        DataError: the annotation file of the test is not JSON.
    """
    parts = {k: v for k, v in config.to_dict().items() if k in RUNNER - PLACE}
    parts["randomness"] = {k: v for k, v in parts.get("randomness", {}).items() if k != "seed"}
    hooks = parts.get("default_hooks") or {}
    parts["default_hooks"] = {k: v for k, v in hooks.items() if k not in TELLING_HOOKS}
    for name in [name for name in parts if name.endswith("_dataloader")]:
        parts[name] = {k: v for k, v in (parts[name] or {}).items() if k not in LOADING}
    parts["load_from"] = {"checkpoint": parts.get("load_from")}
    found = {}
    for name, chosen in (("training", parts.keys() - TESTING), ("test", parts.keys() & TESTING)):
        own = {key: parts[key] for key in chosen}
        data = _take_out_files(own, method)
        found[name] = dict(config=_hash(own), code=code[name], data=_hash(data))
    return replace(method, **found, images=_images_of(config))


def _images_of(config: Config) -> tuple[str, ...]:
    """The folders in which the slices of the test lie, as tools/test.py looks for them."""
    dataset = config.get("test_dataloader", {}).get("dataset", {})
    root, file = Path(dataset.get("data_root") or ""), dataset.get("ann_file")
    first = root / dataset.get("data_prefix", {}).get("img", "")
    content = read_json(root / file, "an annotation file") if isinstance(file, str) else {}
    # What is no annotation file is for `check_tests` to refuse.
    folders = image_folders(content if isinstance(content, dict) else {}, root, first)
    return tuple(str(folder.resolve()) for folder in folders if folder.is_dir())


def _take_out_files(parts: dict, method: Method) -> dict[str, str]:
    """Replaces the names of files in a config by nothing; returns what is in them, by option."""
    contents = {}
    for path, node in list(dicts(parts, "")):
        if node.get("ann_file"):
            root, files = Path(node.pop("data_root", None) or ""), node.pop("ann_file")
            files = [root / file for file in ([files] if isinstance(files, str) else files)]
            for file in files:
                if not file.is_file():
                    raise MissingDataError(NOT_PREPARED.format(file=file, config=method.config))
            contents[f"{path}.ann_file"] = " ".join(map(_annotations_hash, files))
            # Wherever slices are read from: as where they usually are.
            if "cache" in node:
                node["cache"] = "slice_cache"
            prefix = node.get("data_prefix") or {}
            if Path(prefix.get("img") or "").is_absolute():
                node["data_prefix"] = {**prefix, "img": "Images_png"}
        weights = node.get("checkpoint")
        if isinstance(weights, str) and (file := Path(weights).expanduser()).is_file():
            del node["checkpoint"]
            contents[f"{path}.checkpoint"] = file_sha256(file)[:16]
        elif weights and _starts_from(path, node) and "://" not in weights:
            option = f"{path}.checkpoint".strip(".").replace("load_from.checkpoint", "load_from")
            raise MissingDataError(f"{method.name}: there is no {weights}, which {option} names")
    return contents


def _starts_from(path: str, node: Mapping) -> bool:
    """Whether `checkpoint` of a part of a config names weights that training starts from."""
    loaded = path.rpartition(".")[2] in ("load_from", "pretrained")
    return loaded or type_name(node) in ("Pretrained", "PretrainedInit")


def _annotations_hash(file: Path) -> str:
    """Of an annotation file, wherever its series lie: as where they usually do."""
    content = IMAGES.sub(rb'\1["Images_png"]', file.read_bytes())
    return hashlib.sha256(content).hexdigest()[:16]


def modules_of(config: Config) -> frozenset[str]:
    """What a run of a config begins its imports with: the module of the runs, `custom_imports`, and
    the modules of the classes that it names, such as its operator's."""
    named = (config.get("custom_imports") or {}).get("imports") or []
    modules = {"mmdet_ext.engine.run", *([named] if isinstance(named, str) else named)}
    for key in RUNNER & config.keys():
        for path, node in dicts(config[key], key):
            kind = node.get("type") and find(node["type"], path)
            modules.add(getattr(kind, "__module__", None) or "")
    return frozenset(modules - {""})


@functools.cache
def code_hashes(modules: frozenset[str], tools: Path) -> dict[str, str]:
    """'training' and 'test': of the command that does it, and of modules of the project, or of
    one's own, with all that they import there, directly or not. One's own are those that
    `custom_imports` or a part's class names, and what lies beside them, in one folder. Comments,
    docstrings and layout do not count.

    A package that imports its modules by itself, as that of the operators, is not gone through.
    """
    # Of a framework nothing is followed; one's own parts lie in a package or are single files.
    packages = {name.partition(".")[0] for name in modules} - FRAMEWORK | {*PROJECT}
    folders = {_folder_of(package) for package in packages - {*PROJECT}} - {None}
    # Of one's own parts the package's __init__ runs first; the project's are empty.
    own = {n.rpartition(".")[0] for n in modules if n.partition(".")[0] not in PROJECT}
    waiting, files = sorted({*modules, *own} - {""}), {}
    while waiting:
        name = waiting.pop()
        if name in files or f"{name}.".startswith(SHOWN):
            continue
        top = name.partition(".")[0]
        if top not in packages:
            if not folders or top in FRAMEWORK or _folder_of(top) not in folders:
                continue
            packages.add(top)
        spec = _spec_of(name)
        if spec is None or not (spec.origin or "").endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_bytes())
        files[name] = _without_words(tree)
        package = name if spec.submodule_search_locations else name.rpartition(".")[0]
        waiting += _imported(tree, package)
    found = {}
    for name, command in COMMANDS.items():
        tree = ast.parse((tools / command).read_bytes())
        found[name] = _hash({**files, command: _without_words(tree)})
    return found


def _spec_of(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a name inside a module; __main__
        return None


def _folder_of(package: str) -> Path | None:
    """Where a package or single file lies; None of what is installed or built in."""
    spec = _spec_of(package)
    if spec is None or not (spec.submodule_search_locations or spec.has_location):
        return None
    place, *_ = spec.submodule_search_locations or [spec.origin]
    folder = Path(place).parent
    return None if folder.name in INSTALLED else folder


def _imported(tree: ast.Module, package: str) -> list[str]:
    """Full names of what a module imports, wherever in it; of members, too, as they may be
    modules."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    # A package's own __init__ runs first.
    return found + [name.rpartition(".")[0] for name in found if "." in name]


def _without_words(tree: ast.Module) -> str:
    """A module without comments, docstrings and layout, the same for every version of Python."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                line
                for line in body
                if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
        if getattr(node, "type_params", None) == []:  # 3.11 has none
            del node.type_params
        if isinstance(node, ast.JoinedStr):  # 3.12 may end one with an empty piece
            node.values = [v for v in node.values if getattr(v, "value", None) != ""]
    # Later versions leave out empty lists if one lets them.
    return ast.dump(tree, **({"show_empty": True} if sys.version_info >= (3, 13) else {}))


def _hash(value: Any) -> str:
    text = json.dumps(_plain(value), sort_keys=True, default=_named)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """With 2 in place of 2.0, which is the same to every part."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _named(value: Any) -> str:
    """What JSON cannot hold, without an address in memory."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"


def check_tests(methods: Sequence[Method], configs: Sequence[Config]) -> None:
    """Reads the images of every test, of equal ones once, and what it is scored by: a test that
    cannot be done, or not for the study's tables, would be noticed only after the training. Raises
    UserError, with the method's name."""
    seen = set()
    for method, config in zip(methods, configs, strict=True):
        test = (method.test["config"], method.test["data"])
        if test in seen:
            continue
        seen.add(test)
        _check_evaluator(method.name, config)
        try:
            scope = config.get("default_scope", "mmdet")
            with refused_by_parts(), DefaultScope.overwrite_default_scope(scope):
                DATASETS.build(config.test_dataloader["dataset"])
        except UserError as error:
            raise UserError(f"{method.name}: its test: {error}") from error


def _check_evaluator(name: str, config: Config) -> None:
    nodes = [node for _, node in dicts(config.get("test_evaluator"), "")]
    metric = next((node for node in nodes if type_name(node) in RESULT_FILES), {})
    if type_name(metric) != "FROCMetric":
        raise UserError(f"{name}: test_evaluator has no FROCMetric, which a study's tables are of")
    for option, usual in (("iou_threshold", 0.5), ("pixel_offset", 1)):
        if (value := metric.get(option, usual)) != usual:
            raise UserError(
                f"{name}: test_evaluator: a study's tables are made with {option}={usual}, not "
                f"{value}: leave it out, and give it to tools/evaluate.py for single runs"
            )


def check_methods(methods: Sequence[Method]) -> None:
    """Raises UserError for two methods of one config, options and data: nothing would tell them
    apart. And for an option that every run sets itself."""
    seen: dict[str, str] = {}
    for method in methods:
        for name in parsed(method.options):
            if name in SET_BY_RUNS:
                raise UserError(
                    f"{method.name}: {name} is the study's own ({SET_BY_RUNS[name]}): leave it out"
                )
        key = _hash([method.training, method.test])
        if key in seen:
            raise UserError(
                f"{seen[key]} and {method.name} are the same: config, options and data. Leave one "
                "out, or look whether an option is without effect"
            )
        seen[key] = method.name
