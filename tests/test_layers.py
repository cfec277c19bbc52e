"""Who may import whom, read off the imports of every file; docs and README describe the same."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ct_volumes", "deeplesion", "mmdet_ext")
GROUND = ("command_line", "conventions", "errors", "files", "lock", "processes")
FRAMEWORK = {"torch", "torchvision", "mmengine", "mmcv", "mmdet"}

# What each room may import of the project; the longest prefix of a module's name is its room.
MAY_IMPORT = {
    "deeplesion": ["deeplesion"],
    **{f"deeplesion.{name}": [f"deeplesion.{name}" for name in GROUND] for name in GROUND},
    "deeplesion.data": ["deeplesion.data", "ground"],
    "deeplesion.phantom": ["deeplesion.phantom", "deeplesion.data", "ground"],
    "deeplesion.evaluation": ["deeplesion.evaluation", "deeplesion.data", "ground"],
    "deeplesion.evaluation.froc": ["deeplesion.evaluation.intervals"],
    "deeplesion.evaluation.intervals": [],
    "deeplesion.report": [
        "deeplesion.report",
        "deeplesion.evaluation",
        "deeplesion.data",
        "ground",
    ],
    "ct_volumes": ["ct_volumes", "deeplesion"],
    "ct_volumes.nms": [],
    "mmdet_ext.ops": ["mmdet_ext.ops"],
    "mmdet_ext.image_shape": [],
    "mmdet_ext.image_axes": ["mmdet_ext.image_shape"],
    "mmdet_ext.functional_3d": ["mmdet_ext.image_axes", "mmdet_ext.image_shape"],
    "mmdet_ext.isotropic": ["mmdet_ext.ops", "mmdet_ext.functional_3d", "mmdet_ext.image_shape"],
    "mmdet_ext.slice_network": ["mmdet_ext.ops"],
    "mmdet_ext.convert": ["mmdet_ext.ops", "mmdet_ext.isotropic", "mmdet_ext.slice_network"],
    "mmdet_ext.random_states": [],
    "mmdet_ext.checkpoint": ["ground"],
    "mmdet_ext.models.attention": [],
    "mmdet_ext.models.shapes_unet": [],
    "mmdet_ext.models": [
        "mmdet_ext.models",
        "mmdet_ext.ops",
        "mmdet_ext.convert",
        "mmdet_ext.checkpoint",
        "ct_volumes.nms",
        "ground",
    ],
    "mmdet_ext.datasets": [
        "mmdet_ext.datasets",
        "mmdet_ext.random_states",
        "ct_volumes",
        "deeplesion",
    ],
    "mmdet_ext.evaluation": ["mmdet_ext.evaluation", "ct_volumes", "deeplesion"],
    "mmdet_ext.config": ["mmdet_ext.config", "mmdet_ext.ops", "deeplesion.data", "ground"],
    "mmdet_ext.engine": [
        "mmdet_ext.engine",
        "mmdet_ext.config",
        "mmdet_ext.checkpoint",
        "mmdet_ext.random_states",
        "ct_volumes",
        "deeplesion.data",
        "ground",
    ],
    "mmdet_ext.released": [
        "mmdet_ext.released",
        "mmdet_ext.config",
        "mmdet_ext.models",
        "mmdet_ext.checkpoint",
        "ground",
    ],
}
# What some rooms may import from elsewhere; of the others only `deeplesion` is held from something.
LIBRARIES = {
    "deeplesion.evaluation.froc": {"numpy"},
    "deeplesion.evaluation.intervals": {"numpy"},
    "ct_volumes.nms": {"numpy"},
    "mmdet_ext.ops": {"torch"},
    "mmdet_ext.image_shape": {"torch"},
    "mmdet_ext.image_axes": {"torch"},
    "mmdet_ext.functional_3d": {"torch"},
    "mmdet_ext.isotropic": {"torch"},
    "mmdet_ext.slice_network": {"torch"},
    "mmdet_ext.convert": {"torch"},
    "mmdet_ext.models.attention": {"torch"},
    "mmdet_ext.models.shapes_unet": {"torch"},
    "mmdet_ext.engine.run_check": {"matplotlib"},
}


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(name, path):
    """The modules that a file imports anywhere in it, by their full names."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= (members & MODULES.keys()) or {base}
    return found


def inside(name, places):
    places = [f"deeplesion.{g}" for g in GROUND if "ground" in places] + list(places)
    return any(name == place or name.startswith(f"{place}.") for place in places)


def room(name):
    return max((r for r in MAY_IMPORT if inside(name, [r])), key=len, default=None)


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_what_its_room_may(name):
    if name in ("mmdet_ext",):
        return
    here = room(name)
    assert here is not None, f"{name} is in no room: say in MAY_IMPORT what it may import"
    for other in imports(name, MODULES[name]):
        top = other.partition(".")[0]
        if top in PACKAGES:
            assert inside(other, MAY_IMPORT[here]), f"{name} imports {other}"
        elif top not in sys.stdlib_module_names and here in LIBRARIES:
            assert top in LIBRARIES[here], f"{name} imports {other}"
        below = name.startswith(("ct_volumes", "deeplesion"))
        assert not (below and top in FRAMEWORK), f"{name} imports {other}"
        assert top not in ("tools", "benchmarks", "tests"), f"{name} imports {other}"


def test_no_imports_go_in_a_circle():
    files = {name: imports(name, path) & MODULES.keys() for name, path in MODULES.items()}
    # A package's own __init__ may gather what is in it.
    graph = {name: {o for o in others if o != name} for name, others in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_packages_but_ops_hold_nothing_themselves():
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "mmdet_ext.ops":
            body = ast.parse(path.read_text()).body
            assert all(isinstance(node, ast.Expr) for node in body), name


BLOCKED = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ImportError(f'{{name}} is blocked')

sys.meta_path.insert(0, Refuse())
import {modules}
"""
ABOVE_TORCH = {"mmengine", "mmcv", "mmdet", "pandas", "cv2", "skimage", "matplotlib"}


@pytest.mark.parametrize(
    "names, blocked",
    [
        ([name for name in MODULES if not name.startswith("mmdet_ext")], FRAMEWORK),
        (["deeplesion.evaluation.froc"], FRAMEWORK | ABOVE_TORCH),
        (
            [
                "mmdet_ext.ops",
                "mmdet_ext.convert",
                "mmdet_ext.models.attention",
                "mmdet_ext.models.shapes_unet",
            ],
            ABOVE_TORCH,
        ),
    ],
    ids=["deeplesion", "froc", "ops"],
)
def test_rooms_open_with_the_layers_above_blocked(names, blocked):
    """What the imports of others bring along counts as well."""
    code = BLOCKED.format(blocked=sorted(blocked), modules=", ".join(names))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_changes_nothing_of_the_framework():
    """Loaders, seeds and threads stay as they were until a command asks for it."""
    code = """
import random, sys
import numpy as np, torch
from mmengine.runner import CheckpointLoader
import mmdet.datasets, mmdet.models, mmdet.evaluation

def state():
    return (
        dict(CheckpointLoader._schemes), random.getstate(), np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.is_grad_enabled(), sys.getrecursionlimit(),
    )

before = state()
import {modules}
assert state() == before
"""
    code = code.format(modules=", ".join(MODULES))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
