"""The scripts in docs/study ask the commands for what is there, and of all methods alike. Nothing
is trained: a stub takes the place of Python and notes what it is called with."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.study_plan import parsed

SPLIT = json.dumps(dict(images=[dict(id=1, file_name="a")], annotations=[dict(image_id=1)]))
OLD, NEW = "runs/half-seed0-1111", "runs/half-seed0-0000-2"
STUB = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
script, *arguments = sys.argv[1:]
if script == "-":
    os.execv(sys.executable, [sys.executable, script, *arguments])
with open("calls.jsonl", "a") as file:
    print(json.dumps([Path(script).name, arguments]), file=file)
if script.endswith("prepare_data.py"):
    folder = Path(arguments[0], "annotations")
    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / (split + ".json")).write_text('''{SPLIT}''')
elif script.endswith("all_key_slices.py"):
    Path(arguments[0], "all.json").touch()
elif script.endswith("mine_lesions.py"):
    Path(arguments[arguments.index("--out") + 1]).touch()
elif script.endswith("study.py") and "--dry-run" not in arguments:
    out = Path(arguments[arguments.index("--out") + 1])
    for run in ("{OLD}", "{NEW}"):
        (out / run / "training").mkdir(parents=True, exist_ok=True)
    runs = [dict(seed=seed, folder="{NEW}/test-2") for seed in (0, 1)]
    runs[1]["folder"] = "runs/half-seed1-0000/test-2"
    (out / "study.json").write_text(json.dumps(dict(methods=dict(half=dict(runs=runs)))))
"""


@pytest.fixture
def script(repository, tmp_path, monkeypatch):
    """Calls one of the shell scripts in an empty folder; -> the commands it called, with their
    arguments."""
    monkeypatch.chdir(tmp_path)
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def call(name, *arguments, expect=0):
        calls = tmp_path / "calls.jsonl"
        calls.write_text("")
        line = ["bash", repository / "docs/study" / name, *map(str, arguments)]
        environment = {**os.environ, "PYTHON": str(stub)}
        run = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert run.returncode == expect, run.stderr
        return [json.loads(line) for line in calls.read_text().splitlines()]

    return call


def asked_of_study(arguments):
    parser = argparse.ArgumentParser()
    for name in ("--out", "--data", "--reference", "--seeds", "--jobs"):
        parser.add_argument(name)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--variant", nargs="+", action="append")
    parser.add_argument("--cfg-options", nargs="+")
    return parser.parse_args(arguments)


def configs_of(study, repository, monkeypatch):
    """Name -> config of each method, whose annotation files are there."""
    monkeypatch.setenv("DEEPLESION_ROOT", str(Path(study.data).resolve()))
    configs = {}
    for name, config, *options in study.variant:
        options = parsed([*study.cfg_options, *options])
        configs[name] = load_config(str(repository / config), options)
        for part in ("train", "val", "test"):
            dataset = configs[name][f"{part}_dataloader"].dataset
            assert Path(dataset.data_root, dataset.ann_file).is_file(), (name, part)
    assert study.reference in configs
    return configs


def test_missing_labels(script, repository, tmp_path, monkeypatch):
    names = [name for name, _ in script("missing_labels.sh", 2, "--dry-run")]
    assert names == [] and not (tmp_path / "work_dirs").exists()

    calls = script("missing_labels.sh", 2, "--jobs", 2)
    assert [name for name, _ in calls] == [
        *["make_phantom.py", "prepare_data.py"] * 3, "study.py", *["mine_lesions.py"] * 2,
        "study.py",
    ]  # fmt: skip
    first, second = (asked_of_study(arguments) for name, arguments in calls if "study" in name)
    assert (first.seeds, second.seeds, second.jobs) == ("1", "2", "2")
    assert [*configs_of(first, repository, monkeypatch)] == ["half", "full"]
    configs = configs_of(second, repository, monkeypatch)
    assert [*configs] == ["half", "full", "half, ignored", "half, labels", "half's slices"]
    assert len({config.train_dataloader.dataset.ann_file for config in configs.values()}) == 4
    # The teacher is the run that the study reports, whatever other code has left beside it.
    for name, arguments in calls:
        if name == "mine_lesions.py":
            assert arguments[1] == f"docs/study/missing_labels/{NEW}/training"

    names = [name for name, _ in script("missing_labels.sh", 2, "--dry-run")]
    assert names == ["study.py"]


@pytest.mark.parametrize(
    "group, methods",
    [
        ("training", ["default", "averaged weights", "three windows", "optimised anchors",
                      "20 epochs"]),
        ("attention", ["AlignShift", "slice attention", "slice attention, volume"]),
        ("dino", ["Mask R-CNN, 20 epochs", "DINO, 20 epochs"]),
    ],
)  # fmt: skip
def test_options(group, methods, script, repository, tmp_path, monkeypatch):
    """Each on the same data, and each the best epoch of as many."""
    for name in ("train", "test"):
        folder = tmp_path / f"work_dirs/study/{name}/annotations"
        folder.mkdir(parents=True)
        for split in ("train", "val", "test"):
            (folder / f"{split}.json").touch()
    names = [name for name, _ in script("options.sh", group, "--dry-run")]
    assert names == ["all_key_slices.py", "study.py"]
    ((name, arguments),) = script("options.sh", group, "--seeds", 3)
    study = asked_of_study(arguments)
    assert (name, study.seeds, study.out) == ("study.py", "3", f"docs/study/options/{group}")
    configs = configs_of(study, repository, monkeypatch)
    assert [*configs] == methods
    assert len({config.test_dataloader.dataset.ann_file for config in configs.values()}) == 1
    for config in configs.values():
        assert config.train_cfg.max_epochs // config.train_cfg.val_interval == 2
        assert config.param_scheduler[-1].end == config.train_cfg.max_epochs


def test_a_group_that_there_is_not(script):
    assert script("options.sh", "anchors", expect=2) == []


def test_operators_join_the_test_phantom_once(script, tmp_path):
    (tmp_path / "work_dirs/study/test/annotations").mkdir(parents=True)
    for expected in (["all_key_slices.py", "study.py"], ["study.py"]):
        assert [name for name, _ in script("operators.sh", 7, "--dry-run")] == expected
