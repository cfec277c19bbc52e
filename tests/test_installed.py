"""What pip installs is enough: from a wheel, in an empty folder, from the phantom to the tables."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
PARTS = ("configs", "ct_volumes", "deeplesion", "mmdet_ext", "tools")
METADATA = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
COMMANDS = runpy.run_path(str(TOOLS / "installed.py"))["COMMANDS"]
# A network of seconds: what is tested is that everything is there.
SMALL = [
    "--cfg-options", "model.backbone.block_config=(1,1,1)", "model.neck.in_channels=(36,30,27)",
    "resize.size=96",
]  # fmt: skip
ONE_EPOCH = ["train_cfg.max_epochs=1", "train_dataloader.batch_size=4"]
NO_WORKERS = [f"{split}_dataloader.num_workers=0" for split in ("train", "val")]


def run(*command, folder, expect=0, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment | variables,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    """Built from a copy: setuptools leaves its folders where it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in METADATA:
        (folder / name).write_text((repository / name).read_text())
    for name in PARTS:
        (folder / name).symlink_to(repository / name)
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "--no-index", "-w", folder / "dist", folder, folder=folder,
    )  # fmt: skip
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def commands(wheel, tmp_path_factory):
    """The bin/ of a new environment with the wheel, which borrows the packages it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin/python"
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder
    )
    # A .pth file adds a folder, but does not read the .pth files there: not the repository's own.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    with open(os.path.join(site.strip(), "borrowed.pth"), "w") as file:
        file.write("\n".join(sorted(borrowed)) + "\n")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps",
        "--no-index", "--ignore-installed", wheel, folder=folder,
    )  # fmt: skip
    return folder / "bin"


@pytest.mark.slow
def test_from_an_empty_folder_to_the_tables(commands, tmp_path):
    def call(name, *arguments):
        return run(commands / f"deeplesion-{name}", *arguments, folder=tmp_path, **variables)

    variables = {"OMP_NUM_THREADS": "1", "DEEPLESION_ROOT": "phantom"}
    call("phantom", "phantom", "--patients", 4, "--size", 128, "--seed", 3)
    call("prepare", "phantom", "--workers", 1)
    trained = call("train", "demo/alignshift_3slice", *SMALL, *ONE_EPOCH, *NO_WORKERS)
    assert "work_dirs/demo/alignshift_3slice/best_FROC" in trained
    assert f"config      {commands.parent}" in trained, "the config of the wheel"
    tested = call("test", "demo/alignshift_3slice", "work_dirs/demo/alignshift_3slice", *SMALL)
    assert "Avg.[0.5,1,2,4]" in tested
    results = tmp_path / "work_dirs/demo/alignshift_3slice/results.json.gz"
    call("evaluate", results, "--resamples", 100)
    report = json.loads((results.parent / "evaluation/evaluation.json").read_text())
    assert [e["name"] for e in report["evaluations"]] == ["alignshift_3slice"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["phantom", "work_dirs"]


def test_the_wheel_holds_every_config_and_a_file_for_every_command(wheel, repository):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {p.relative_to(repository).as_posix() for p in repository.glob("configs/**/*.py")}
    assert {name for name in names if "/configs/" in name} == {f"mmdet_ext/{c}" for c in configs}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert set(project["scripts"]) == set(COMMANDS)
    commands = {*COMMANDS.values(), "installed", "__init__"}
    tools = {name for name in names if "/tools/" in name}
    assert tools == {f"mmdet_ext/tools/{command}.py" for command in commands}
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


@pytest.mark.parametrize("name", ["train", "detect"])  # at its start, in the midst of its work
def test_a_package_that_is_not_installed_is_named_with_the_way_to_it(commands, tmp_path, name):
    arguments = {"train": ["a3d_3slice"], "detect": detection(tmp_path)}[name]
    (tmp_path / "mmengine.py").write_text("raise ModuleNotFoundError(name='mmengine')\n")
    error = run(
        commands / f"deeplesion-{name}", *arguments, folder=tmp_path, expect=1,
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    way = "make setup, or docs/training.md, Installed by pip"
    assert error == f"deeplesion-{name}: mmengine is not installed: {way}\n"


def test_an_error_of_ours_asks_once_for_a_report(commands, tmp_path):
    (tmp_path / "mmengine.py").write_text("raise RuntimeError('broken')\n")
    error = run(
        commands / "deeplesion-detect", *detection(tmp_path), folder=tmp_path, expect=1,
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert error.count("please report it") == 1


def detection(folder):
    """The arguments of a detection in a scan of nothing."""
    image = nibabel.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
    nibabel.save(image, folder / "scan.nii")
    return ["scan.nii", "--config", "x", "--checkpoint", "x", "--out", "out"]


def test_an_editable_installation_finds_the_commands_too(repository, tmp_path):
    """As `make setup` installs: setuptools finds no mapped folder that is not a package."""
    for name in PARTS:
        shutil.copytree(repository / name, tmp_path / name)
    for name in METADATA:
        (tmp_path / name).write_text((repository / name).read_text())
    build = "from setuptools.build_meta import build_editable; build_editable('.')"
    run(sys.executable, "-c", build, folder=tmp_path)
    (path,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    (finder,) = (tmp_path / "site").glob("*_finder.py")
    # -S: without the finder of this environment, whose own installation is an editable one.
    code = (
        f"import sys; sys.path += [{str(finder.parent)!r}, {sysconfig.get_path('purelib')!r}]\n"
        f"import {finder.stem} as finder; finder.install()\n"
        "import mmdet_ext.tools.installed as found; print(found.__file__)"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = run(sys.executable, "-S", "-c", code, folder=elsewhere)
    assert found.strip() == str(tmp_path / "tools/installed.py")
