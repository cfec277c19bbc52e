"""What it takes to repeat a run, written beside its weights."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.runner import Runner
from mmengine.utils.dl_utils import collect_env

from deeplesion.files import write_whole


def write_run_record(runner: Runner) -> Path:
    """Writes run_<time>.json into the work directory: command, seed, git state, versions, config.

    A run that is resumed has one for each start. Only the main process writes.
    """
    path = record_path(runner)
    if is_main_process():
        record = dict(
            command=shlex.join([sys.executable, *sys.argv]),
            folder=str(Path.cwd()),
            seed=runner.seed,
            processes=runner.world_size,
            git=git_state(Path(__file__).resolve().parent),
            environment=collect_env(),
            packages={d.name: d.version for d in distributions()},
            config=runner.cfg.to_dict(),
        )
        write_whole(path, json.dumps(record, indent=1, default=str) + "\n")
    return path


def record_path(runner: Runner) -> Path:
    return Path(runner.work_dir) / f"run_{runner.timestamp}.json"


def add_to_record(path: Path, **parts: Any) -> None:
    """Adds parts to a record: `training` and its `seed` when it begins (`facts_of`), `ended` when
    it is over."""
    record = json.loads(path.read_text()) | parts
    write_whole(path, json.dumps(record, indent=1, default=str) + "\n")


def git_state(folder: Path) -> dict:
    """commit, and the files changed since; both None where the code lies in no git repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return dict(commit=None, changed=None)
    return dict(commit=commit, changed=changed)
