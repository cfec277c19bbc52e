"""Every run leaves what it takes to repeat it."""

import json
import subprocess
import sys

import mmengine
import torch
from mmengine.config import Config

from mmdet_ext.engine.run import build_runner
from mmdet_ext.engine.run_record import git_state

from ..small_training import configuration


def test_a_run_records_itself(repository, phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "a b.py", "--cfg-options", "x=1"])
    options = {"randomness.seed": 5, "train_dataloader.batch_size": 10}
    runner = build_runner(configuration(repository, phantom, tmp_path, **options))
    (file,) = tmp_path.glob("run_*.json")
    record = json.loads(file.read_text())
    assert record["command"] == f"{sys.executable} tools/train.py 'a b.py' --cfg-options x=1"
    assert (record["seed"], record["processes"]) == (5, 1)
    assert record["config"]["train_dataloader"]["batch_size"] == 10
    assert record["packages"]["torch"] == torch.__version__
    assert record["environment"]["MMEngine"] == mmengine.__version__
    # The copy of the config, in the folder of this start, can be run again as it is.
    (copy,) = tmp_path.glob("*/alignshift_3slice.py")
    again = Config.fromfile(copy).to_dict()
    assert json.loads(json.dumps(again)) == record["config"]
    assert runner.seed == 5


def test_git_state_names_the_commit_and_what_changed(tmp_path):
    assert git_state(tmp_path) == dict(commit=None, changed=None)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "first")
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["changed"] == []
    (tmp_path / "a.py").write_text("2")
    assert git_state(tmp_path) == dict(commit=state["commit"], changed=[" M a.py"])
