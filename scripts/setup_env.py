"""Sets up the environment that `make` uses: torch, the pinned requirements, mmcv's compiled ops.

Standard library only, since it runs before anything is installed. Safe to call again: what is
there and works is left alone, and a call that finds everything in order takes seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
# Their own requirements name an OpenCV that must not be installed beside the headless one.
STACK = ("onedl-mmengine", "onedl-mmdetection", "imaug")

# Imports mmcv's extension and runs one operator on every device torch sees: a wheel built without
# ops, for another torch, or without CUDA fails here and nowhere later.
CHECK_OPS = """
import torch
from mmcv.ops import nms
devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
for device in devices:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]], device=device)
    kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)[1]
    assert kept.tolist() == [0, 2], kept
print(" and ".join(devices))
"""

DESCRIBE_TORCH = """
import torch
cuda = torch.version.cuda
print(f"torch {torch.__version__}: " + (
    "CPU build" if cuda is None else f"CUDA {cuda} build, " + (
        f"sees {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "sees no GPU here"
    )))
"""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def stop(text: str) -> None:
    sys.exit(f"[setup] error: {text}")


def create_environment(env: Path) -> Path:
    """Path of the environment's Python; makes a venv at `env` if nothing is there."""
    python = env / "bin" / "python"
    if env.exists() and not env.is_dir():
        stop(f"{env} is a file. Point ENV (--env) at an environment or a new folder.")
    if not python.exists():
        if env.exists() and any(env.iterdir()):
            stop(
                f"{env} exists but has no bin/python. Point ENV at an environment or a new folder."
            )
        if sys.version_info < (3, 11):  # noqa: UP036 (older ones are told)
            stop(
                f"this is Python {sys.version.split()[0]}; make setup PYTHON=python3.11 (or newer)"
            )
        say(f"creating a virtual environment in {env}")
        made = None
        try:
            made = subprocess.run([sys.executable, "-m", "venv", str(env)])
        finally:  # nor is half of one left by Ctrl-C
            if made is None or made.returncode:
                shutil.rmtree(env, ignore_errors=True)
        if made.returncode:
            stop(
                "`python -m venv` failed. On Debian install the package python3-venv, "
                "or pass an environment of your own: make setup ENV=/path/to/env"
            )
    version = subprocess.check_output(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    ).strip()
    if tuple(map(int, version.split("."))) < (3, 11):
        stop(
            f"{python} is Python {version}; 3.11 or newer is needed (PYTHON=python3.11 make setup)"
        )
    if not has_pip(python):
        say(f"{env} has no pip; installing it")
        subprocess.run([python, "-m", "ensurepip"], stdout=subprocess.DEVNULL)
        if not has_pip(python):
            stop(f"{env} has no pip, and ensurepip cannot install it: install it, or delete {env}")
    return python


def has_pip(python: Path) -> bool:
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def read_requirements() -> dict[str, str]:
    """Package name -> requirement line."""
    lines = (line.split("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return {re.split(r"[=<>!~]", line)[0]: line for line in lines if line}


def pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        stop("pip failed, its message is above: " + " ".join(command[1:]))


def ops_work(python: Path) -> tuple[bool, str]:
    """Whether mmcv's ops import and run, and where they ran or why not."""
    run = subprocess.run([python, "-c", CHECK_OPS], capture_output=True, text=True)
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    return run.returncode == 0, lines[-1] if lines else "no output"


def check_compilers(python: Path) -> None:
    """Says what is missing before a build of many minutes is started."""
    if not (shutil.which("c++") or shutil.which("g++")):
        stop("no C++ compiler found, mmcv's operators need one. On Debian: apt-get install g++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists() and Path(sys.executable).resolve() == python.resolve():
        stop(f"{header} is missing. On Debian: apt-get install python3-dev")
    sees_gpu = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    if subprocess.run([python, "-c", sees_gpu]).returncode == 0:
        cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        if not (shutil.which("nvcc") or (Path(cuda_home) / "bin" / "nvcc").exists()):
            stop(
                "torch sees a GPU but nvcc was not found, and mmcv's CUDA operators must be "
                "compiled. Install the CUDA toolkit of torch's version and set CUDA_HOME."
            )


def build_mmcv(python: Path, requirement: str, log: Path) -> None:
    """Compiles mmcv's ops for the torch that is installed, reporting ninja's progress."""
    check_compilers(python)
    say(f"compiling mmcv's operators (10 to 15 minutes on 2 cores, once); full log: {log}")
    # Debug symbols are most of the object size and of no use here.
    settings = {"CFLAGS": "-g0", "MMCV_WITH_OPS": "1", **os.environ}
    command = [python, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps"]
    command += ["--force-reinstall", requirement]
    start = last_report = time.monotonic()
    with open(log, "w") as sink:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=settings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for line in process.stdout:
            sink.write(line)
            step = re.search(r"\[(\d+)/(\d+)\]", line)
            if step and time.monotonic() - last_report > 20:
                last_report = time.monotonic()
                minutes = (last_report - start) / 60
                say(f"  mmcv: {step[1]} of {step[2]} files compiled, {minutes:.1f} min")
    if process.wait():
        tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
        stop(f"building mmcv failed; the end of {log}:\n{tail}")
    say(f"mmcv compiled in {(time.monotonic() - start) / 60:.1f} min")


def install_mmcv(python: Path, requirement: str, log: Path) -> str:
    """Installs mmcv and makes sure its ops run; returns the devices they ran on."""
    fine, answer = ops_work(python)
    if fine:
        return answer
    installed = [python, "-m", "pip", "show", "-q", "onedl-mmcv"]
    if subprocess.run(installed, capture_output=True).returncode == 0:
        say(f"mmcv is installed but its operators do not work with this torch: {answer}")
    # pip keys its cached wheels by the sdist alone; one built for another torch must go.
    cached = subprocess.run(
        [python, "-m", "pip", "cache", "list", "onedl_mmcv"], capture_output=True, text=True
    )
    if "onedl_mmcv" in cached.stdout:
        say("trying the mmcv wheel in pip's cache")
        pip(
            python, "install", "-q", "--no-build-isolation", "--no-deps", "--force-reinstall",
            requirement,
        )  # fmt: skip
        fine, answer = ops_work(python)
        if fine:
            return answer
        say(f"it was built for another torch ({answer}); it is removed and built anew")
        pip(python, "cache", "remove", "onedl_mmcv")
    build_mmcv(python, requirement, log)
    fine, answer = ops_work(python)
    if not fine:
        stop(f"mmcv was built, yet its operators fail: {answer} (log: {log})")
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", type=Path, default=ROOT / ".venv", help="environment to set up")
    parser.add_argument(
        "--torch", default="", help="requirement for torch, default: the pinned one"
    )
    parser.add_argument("--torch-index", default="", help="package index to take torch from")
    options = parser.parse_args()

    requirements = read_requirements()
    torch_line = options.torch or requirements["torch"]
    requirements.pop("torch")
    python = create_environment(options.env)
    stamp_file = options.env / "deeplesion-setup.json"
    recipe = REQUIREMENTS.read_text() + (ROOT / "pyproject.toml").read_text()
    stamp = {
        "recipe": hashlib.sha256(recipe.encode()).hexdigest(),
        "torch": torch_line,
        "index": options.torch_index,
        "repository": str(ROOT),
    }
    if stamp_file.exists() and json.loads(stamp_file.read_text()) == stamp:
        fine, answer = ops_work(python)
        if fine:
            say(f"everything is in place (mmcv's operators ran on {answer}); nothing to do")
            return
        say(f"the environment was set up before, but mmcv's operators fail now: {answer}")

    index = ["--index-url", options.torch_index] if options.torch_index else []
    say(f"installing {torch_line}" + (f" from {options.torch_index}" if index else ""))
    pip(python, "install", "-q", torch_line, *index)
    say(subprocess.check_output([python, "-c", DESCRIBE_TORCH], text=True).strip())

    say("installing the pinned requirements")
    mmcv = requirements.pop("onedl-mmcv")
    stack = [requirements.pop(name) for name in STACK]
    pip(python, "install", "-q", *requirements.values())
    # Without their dependencies: those are pinned too, and theirs would bring the OpenCV that needs
    # X11 libraries and overwrites the headless one.
    pip(python, "install", "-q", "--no-deps", "--no-build-isolation", *stack)
    answer = install_mmcv(python, mmcv, options.env / "mmcv-build.log")
    say(f"mmcv's operators ran on {answer}")
    pip(python, "install", "-q", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    imports = subprocess.run(
        [python, "-c", "import mmdet.datasets, mmdet.models"], capture_output=True, text=True
    )
    if imports.returncode:
        stop(f"mmdet does not import:\n{imports.stderr}")
    temporary = stamp_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp, indent=2))
    os.replace(temporary, stamp_file)
    say(f"done: {python}")


if __name__ == "__main__":
    main()
