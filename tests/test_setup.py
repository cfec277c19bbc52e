"""Set-up: what it reads, what it checks, and that a second call has nothing to do."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def setup_env(repository):
    path = repository / "scripts/setup_env.py"
    spec = importlib.util.spec_from_file_location("setup_env", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_requirement_is_pinned(setup_env):
    requirements = setup_env.read_requirements()
    assert {"torch", "onedl-mmcv", "onedl-mmengine", "onedl-mmdetection"} <= set(requirements)
    assert all(line.startswith(f"{name}==") for name, line in requirements.items())


def test_working_operators_are_recognised(setup_env):
    works, where = setup_env.ops_work(Path(sys.executable))
    assert works and where.startswith("cpu")


def test_operators_built_for_another_torch_are_recognised(setup_env, tmp_path, monkeypatch):
    """An extension of another torch fails to import with an undefined symbol."""
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv/__init__.py").touch()
    (tmp_path / "mmcv/ops.py").write_text("raise ImportError('_ext.so: undefined symbol: _ZN')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    works, why = setup_env.ops_work(Path(sys.executable))
    assert not works and "undefined symbol" in why


def test_second_call_has_nothing_to_do(repository):
    stamp = Path(sys.prefix) / "deeplesion-setup.json"
    if not stamp.exists():
        pytest.skip("this environment was not made by `make setup`")
    made_with = json.loads(stamp.read_text())
    command = [sys.executable, "scripts/setup_env.py", "--env", sys.prefix]
    command += ["--torch", made_with["torch"], "--torch-index", made_with["index"]]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "nothing to do" in run.stdout


def test_folder_that_is_no_environment_is_refused(repository, tmp_path):
    (tmp_path / "something").touch()
    command = [sys.executable, "scripts/setup_env.py", "--env", str(tmp_path)]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert run.returncode != 0 and "has no bin/python" in run.stderr
