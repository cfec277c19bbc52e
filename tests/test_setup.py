"""Set-up: what it reads, what it checks, and that a second call has nothing to do."""

import importlib.util
import json
import os
import subprocess
import sys
import venv
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


def test_a_file_is_refused_as_an_environment(repository, tmp_path):
    (tmp_path / "startup").touch()
    command = [sys.executable, "scripts/setup_env.py", "--env", str(tmp_path / "startup")]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("[setup] error: ")
    assert "startup is a file" in run.stderr and run.stderr.count("\n") == 1


def test_the_environment_is_not_taken_from_the_shell(repository):
    def told(*arguments):
        run = subprocess.run(
            ["make", "help", *arguments], cwd=repository, env={**os.environ, "ENV": "/etc/profile"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return next(line.split()[0] for line in run.stdout.splitlines() if "ENV=" in line[:4])

    assert told() == "ENV=.venv"
    assert told("ENV=mine") == "ENV=mine"


def test_an_interruption_leaves_no_half_of_an_environment(setup_env, tmp_path, monkeypatch):
    def interrupted(command):
        (Path(command[-1]) / "bin").mkdir(parents=True)
        (Path(command[-1]) / "bin/python").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup_env.create_environment(tmp_path / "env")
    assert not (tmp_path / "env").exists()


def test_an_environment_without_pip_gets_it(setup_env, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = setup_env.create_environment(tmp_path / "env")
    assert subprocess.run([python, "-m", "pip", "--version"]).returncode == 0
