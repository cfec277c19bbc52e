"""The scripts in docs/study ask the commands for what is there, and of all methods alike. Nothing
is trained: a stub takes the place of Python and notes what it is called with."""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from scipy import stats

from deeplesion.evaluation.study import contrasts, estimate, holm, study
from deeplesion.report.study_tables import number_of
from mmdet_ext.engine.run import load_config
from mmdet_ext.engine.study_plan import parsed
from mmdet_ext.models.tta import ViewsTTA

from .deeplesion.report.test_study_page import results_of, written
from .mmdet_ext.models.test_detectors import collate
from .mmdet_ext.models.test_tta import BlobDetector, blobs
from .run_command import command

UNTOLD = ("none", "2.5D", "TSM", "A3D", "ACS", "I3D", "P3D")
TOLD = {"AlignShift": "TSM", "AlignA3D": "A3D", "AlignACS": "ACS"}
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
    file = Path(arguments[arguments.index("--out") + 1])
    file.parent.mkdir(exist_ok=True)
    file.touch()
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
    # What it has found stays where its checkpoint does not.
    names = [name for name, _ in script("missing_labels.sh", 2, "--jobs", 2)]
    assert names == ["study.py", "study.py"]

    names = [name for name, _ in script("missing_labels.sh", 2, "--dry-run")]
    assert names == ["study.py"]


@pytest.mark.parametrize(
    "group, methods",
    [
        ("training", ["default", "averaged weights", "three windows", "narrow window",
                      "optimised anchors", "20 epochs"]),
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


@pytest.mark.parametrize(
    "part, environment, expected",
    [
        ("7", {}, 21),
        ("3", {"POLICIES": "keep_thick", "OPERATORS": "none single A3D"}, 2),
        ("reach", {}, 4),
        ("varied", {}, 6),
        ("pretrained", {"OPERATORS": "A3D I3D 2.5D"}, 4),
    ],
)
def test_operators(part, environment, expected, script, repository, tmp_path, monkeypatch):
    """The key slices of the test phantom are joined once; every method's config is one."""
    folders = "_varied" if part == "varied" else ""
    for name in ("train", "test"):
        folder = tmp_path / f"work_dirs/study/{name}{folders}/annotations"
        folder.mkdir(parents=True)
        for split in ("train", "val", "test"):
            (folder / f"{split}.json").touch()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = [["train.py", "backbone_of.py"], []] if part == "pretrained" else [[], []]
    for once, first in zip((["all_key_slices.py"], []), before):
        calls = script("operators.sh", part, "--dry-run")
        assert [name for name, _ in calls] == [*once, *first, "study.py"]
        weights = tmp_path / "docs/study/operators/pretrained/backbone.pth"
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.touch()
    study = asked_of_study(calls[-1][1])
    configs = configs_of(study, repository, monkeypatch)
    assert len(configs) == expected and study.out == f"docs/study/operators/{part}"
    for name, config in configs.items():
        start = config.model.backbone.init_cfg
        assert (start and start.checkpoint) == (
            "docs/study/operators/pretrained/backbone.pth" if part == "pretrained" else None
        )
        slices, reach = (re.search(rf"(\d) {unit}", name) for unit in ("slices", "mm"))
        if slices:
            assert config.stack.num_slices == int(slices[1])
        if reach:
            half = config.stack.num_slices // 2
            assert half * config.stack.target_mm == pytest.approx(int(reach[1]), abs=0.01)


def test_a_part_of_the_operators_study_that_there_is_not(script):
    assert script("operators.sh", "5", expect=2) == []


@pytest.fixture
def compared(repository, monkeypatch, capsys):
    """What comparisons.py prints of a folder, in this process and with few resamples."""
    few_resamples(monkeypatch)

    def run(out: Path) -> str:
        monkeypatch.setattr("sys.argv", ["comparisons.py", str(out)])
        capsys.readouterr()
        runpy.run_path(str(repository / "docs/study/comparisons.py"))
        return capsys.readouterr().out

    return run


def few_resamples(monkeypatch) -> None:
    for function in (study, contrasts):
        _, *others = function.__defaults__
        monkeypatch.setattr(function, "__defaults__", (100, *others))


@pytest.mark.parametrize("slices, of_normalize", [("7", 10), ("3", 9)])
def test_the_operators_study_compares_within_the_families_it_states(
    slices, of_normalize, tmp_path, compared
):
    """Three operators of ten: p-values are corrected for those that are still to come."""
    out = tmp_path / slices
    policies = ("keep_thick", "normalize")
    kept, other = ([f"{name}, {policy}" for name in ("none", "TSM", "A3D")] for policy in policies)
    chances = dict(zip([*kept, *other], (0.4, 0.5, 0.8, 0.6, 0.7, 0.9)))
    if slices == "7":
        chances["single slice"] = 0.3
    methods = {name: written(out, name, chance, (0, 1)) for name, chance in chances.items()}
    (out / "study.json").write_text(json.dumps(dict(methods=methods)))
    printed = compared(out)
    results = results_of(out, methods)
    last = [*other, "single slice"][: len(chances) - 3]
    families = [
        (9, [(name, name, kept[0]) for name in kept[1:]]),
        (of_normalize, [(name, name, other[0]) for name in last[1:]]),
        (10, [(one.split(",")[0], one, two) for one, two in zip(kept, other)]),
    ]
    expected = []
    for planned, pairs in families:
        differences = {
            name: study({n: results[n] for n in (two, one)}, two)["differences"][one]
            for name, one, two in pairs
        }
        lacking = [1.0] * (planned - len(pairs))
        corrected = {}
        for measure in ("0.5", "average"):
            found = [groups["all"][measure]["p"] for groups in differences.values()]
            corrected[measure] = dict(zip(differences, holm(found + lacking)))
        for name, groups in differences.items():
            rows = ({**groups["all"][m], "p_holm": corrected[m][name]} for m in ("0.5", "average"))
            numbers = (number_of(row, sign=True) for row in rows)
            expected.append((name, *(f"{n.text} [...], {n.p_text}" for n in numbers)))
    of_pairs = printed[: printed.index("average over both policies")].replace("\\", "")
    rows = re.findall(r"\| (.+) \| all \| (.+) \| (.+) \|", of_pairs)
    assert [tuple(re.sub(r"\[.*\]", "[...]", cell) for cell in row) for row in rows] == expected
    assert f"for the {of_normalize} of this family" in printed


def test_the_operators_study_averages_over_operators_and_policies(tmp_path, compared):
    """Held against plain averages; none of them is printed before all that it averages is known."""
    out, chance = tmp_path / "3", iter(np.linspace(0.1, 0.9, 20))
    methods = {
        f"{name}, {policy}": written(out, f"{name}, {policy}", next(chance), (0, 1))
        for policy in ("keep_thick", "normalize")
        for name in (*UNTOLD, *TOLD)
    }
    mean = {
        name: 100 * sum(run.curve.average for run in runs) / 2
        for name, runs in results_of(out, methods).items()
    }
    gain = {name: mean[f"{name}, keep_thick"] - mean[f"{name}, normalize"] for name in UNTOLD}
    both = {name: (mean[f"{name}, keep_thick"] + mean[f"{name}, normalize"]) / 2 for name in UNTOLD}
    told = [mean[f"{one}, keep_thick"] - mean[f"{two}, keep_thick"] for one, two in TOLD.items()]
    expected = [
        ("those not told the thickness", sum(gain.values()) / 7),
        *((name, both[name] - both["none"]) for name in UNTOLD[1:]),
        *((f"{one} less {two}", value) for (one, two), value in zip(TOLD.items(), told)),
        ("average", sum(told) / 3),
    ]

    def printed() -> list[tuple[str, str]]:
        (out / "study.json").write_text(json.dumps(dict(methods=methods)))
        text = compared(out).replace("\\", "")
        start = text.find("average over operators")
        return re.findall(r"\| (.+) \| all \| .+ \| (\S+) \[", text[start:] if start > 0 else "")

    # A seed that one method has alone is left out of averages, which say so.
    extra = written(out, "TSM, normalize", 1.0, (5,))["runs"]
    methods["TSM, normalize"]["runs"] = extra + methods["TSM, normalize"]["runs"]
    rows = printed()
    named = [name for name, _ in rows if name.endswith(", seeds 0, 1 alone")]
    assert [name.removesuffix(", seeds 0, 1 alone") for name, _ in rows] == [n for n, _ in expected]
    assert [name.split(",")[0] for name in named] == ["those not told the thickness", "TSM"]
    values = [value for _, value in expected]
    assert [float(row) for _, row in rows] == pytest.approx(values, abs=0.006)
    # So is a seed that one method lacks, and averages without that method keep it.
    methods["P3D, normalize"]["runs"] = methods["P3D, normalize"]["runs"][:1]
    lacking = ("those not told the thickness", "P3D")
    assert printed() == [row for row in rows if row[0].split(",")[0] not in lacking]
    methods["P3D, normalize"]["runs"] = []
    assert printed() == []


def test_reach_and_slices_are_compared_with_runs_of_the_other_parts(tmp_path, compared):
    chances = {
        "7": {"none, normalize": 0.5, "A3D, normalize": 0.6, "A3D, keep_thick": 0.1},
        "3": {"none, normalize": 0.4},
        "reach": {"none, 3 slices, 6 mm": 0.8, "none, 7 slices, 2 mm": 0.7},
    }
    every = {}
    for part, of in chances.items():
        methods = {
            name: written(tmp_path / part, name, chance, (0, 1)) for name, chance in of.items()
        }
        (tmp_path / part / "study.json").write_text(json.dumps(dict(methods=methods)))
        every[part] = results_of(tmp_path / part, methods)
    three, seven, reach = (every[part] for part in ("3", "7", "reach"))
    near = {"3": three["none, normalize"], "7": reach["none, 7 slices, 2 mm"]}
    far = {"3": reach["none, 3 slices, 6 mm"], "7": seven["none, normalize"]}
    expected = []
    for one, other in (
        (far["3"], near["3"]), (far["7"], near["7"]), (near["7"], near["3"]), (far["7"], far["3"]),
    ):  # fmt: skip
        averages = [[r.average for r in map(lambda x: x.curve, runs)] for runs in (one, other)]
        expected.append(100 * (sum(averages[0]) - sum(averages[1])) / 2)
    printed = compared(tmp_path / "reach")
    rows = re.findall(r"\| none, (?:. slices|±. mm) \| all \| .* \| (\S+) \[", printed)
    assert [float(row) for row in rows] == pytest.approx(expected, abs=0.006)
    assert printed.count("p corrected for the 4 of this family (Holm), of which 2 are known") == 2


def test_what_leads_is_corrected_for_all_that_lead(tmp_path, compared):
    """One of the three operators that start from trained weights is known."""
    out = tmp_path / "pretrained"
    methods = {
        name: written(out, name, chance, (0, 1)) for name, chance in (("none", 0.3), ("A3D", 0.5))
    }
    (out / "study.json").write_text(json.dumps(dict(methods=methods)))
    printed = compared(out)
    assert "p corrected for the 3 of this family (Holm), of which 1 are known" in printed
    results = results_of(out, methods)
    row = contrasts(results, {"A3D": {"A3D": 1, "none": -1}}, planned=3)["A3D"]["all"]["average"]
    assert number_of(row, sign=True).p_text in printed


@pytest.mark.parametrize("arguments", [[], ["elsewhere"]])
def test_comparisons_of_a_folder_that_is_no_part(arguments, repository):
    said = command(repository, "docs/study/comparisons.py", *arguments, expect=1)
    assert "docs/study/operators/7, docs/study/operators/3" in said


def test_seeds_needed_are_those_of_the_t_test(repository):
    """Without a part of patients: the textbook's 17 and 6 a side for one and two deviations, and
    power by the noncentral t distribution."""
    script = runpy.run_path(str(repository / "docs/study/seeds_needed.py"))
    assert script["seeds_needed"](1.0, 1.0, 1e-9) == 17
    assert script["seeds_needed"](4.0, 2.0, 1e-9) == 6
    for seeds in (6, 17):
        freedom = 2 * seeds - 2
        critical, shift = stats.t(freedom).ppf(0.975), (seeds / 2) ** 0.5
        exact = stats.nct(freedom, shift).sf(critical) + stats.nct(freedom, shift).cdf(-critical)
        assert script["power"](1.0, 1.0, seeds, 1e-9) == pytest.approx(exact, abs=0.015)
    # Patients alone: 1.96 of their deviations are the half-width.
    assert script["power"](2.4, 1e-6, 50, 1.2) == pytest.approx(
        stats.norm.sf(1.96 - 3.92), abs=0.01
    )


def test_half_widths_are_those_of_the_interval(repository):
    """Seeds alone: t of 2n - 2 degrees of freedom. Both parts: as `estimate` finds it from seeds
    of that deviation and draws of that half-width."""
    half_width = runpy.run_path(str(repository / "docs/study/seeds_needed.py"))["half_width"]
    for n in (2, 3, 10):
        exact = stats.t(2 * n - 2).ppf(0.975) * 1.7 * (2 / n) ** 0.5
        assert half_width(1.7, n, 1e-9) == pytest.approx(exact)
    seeds, draws = np.array([-2.0, 0.0, 2.0]), np.linspace(-1, 1, 1000)
    drawn = np.repeat(draws[None], 3, axis=0)  # the same for all seeds: no interaction
    terms = [(1, seeds, 2 * drawn), (-1, seeds, drawn)]
    of_patients = stats.t(499).ppf(0.975) * draws.std(ddof=1)
    row = estimate(terms, 500)
    assert half_width(2.0, 3, of_patients) == pytest.approx(row["high"])


def test_after_training(repository, tmp_path, monkeypatch, capsys):
    out = tmp_path / "options/training"
    chances = {"default": 0.4, "averaged weights": 0.7, "20 epochs": 0.6, "three windows": 0.5}
    methods = {name: written(out, name, chance, (0, 1)) for name, chance in chances.items()}
    for run in (run for method in methods.values() for run in method["runs"]):
        run["training"].update(config="c.py", options=["a=1"])
        training = out / Path(run["folder"]).parent / "training"
        training.mkdir()
        ended = dict(epochs=10, best=f"best_FROC_average_epoch_{(10, 5)[run['seed']]}.pth")
        (training / "run_1.json").write_text(json.dumps(dict(ended=ended)))
    few_resamples(monkeypatch)
    monkeypatch.setattr("sys.argv", ["after_training.py", str(out)])
    tested = []
    monkeypatch.setitem(MODELS.module_dict, "ViewsTTA", ViewsTTA)  # undone, what the script sets

    def run_command(command, check):
        Path(command[command.index("--out") + 1]).touch()

    def run_test(config, checkpoint, result_file, views):
        """The mean of a run's checkpoints finds what 20 epochs with that seed do, all else what the
        run did. A detector finds the same with the script's views as with those of `--tta`, and
        looks once at each for all sets."""
        weights, file = Path(checkpoint), Path(result_file)
        tested.append((weights.name, *views))
        run = (weights if weights.is_dir() else weights.parent).parent
        if views:
            detector = BlobDetector()
            found, expected = (
                kind(detector, views).test_step(collate(blobs()))[0].pred_instances
                for kind in (MODELS.get("ViewsTTA"), ViewsTTA)
            )
            assert torch.equal(found.bboxes, expected.bboxes)
            assert torch.equal(found.scores, expected.scores) and "masks" not in found
            looks.append(len(detector.seen) - len(views) - 1)
        if weights.name == "mean_of_last.pth":
            run = run.with_name(run.name.replace("default", "20epochs"))
        file.parent.mkdir(parents=True)
        shutil.copy(run / "test/results.json.gz", file)

    looks = []
    monkeypatch.setattr("subprocess.run", run_command)
    monkeypatch.setattr("mmdet_ext.engine.run.test", run_test)
    monkeypatch.setattr("mmdet_ext.engine.run.load_config", lambda *_: {})

    def after():
        (out / "study.json").write_text(json.dumps(dict(methods=methods)))
        tested.clear()
        looks.clear()
        runpy.run_path(str(repository / "docs/study/after_training.py"))
        return tested, capsys.readouterr().out

    checkpoints, printed = after()
    # Two methods of two runs, each with six sets of views; of the last epoch the run of seed 1.
    sets = [("horizontal",), ("vertical",), ("both",), ("depth",)]
    sets += [("horizontal", "vertical", "both"), ("horizontal", "vertical", "both", "depth")]
    others = [("mean_of_last.pth",)] * 2 + [("epoch_10.pth",)]
    assert checkpoints == others + [("training", *views) for views in sets] * 4
    assert looks == [2, 1, 1, 1, 0, 0] * 4
    assert "1 of 2 runs of default have another best epoch" in printed
    rows = dict(re.findall(r"^\| (.+?) \| all \| .+ \| (\S+).* \|$", printed, re.M))
    results = results_of(out, methods)
    pairs = {
        "mean of four epochs": ("20 epochs", "default"),
        "averaged weights against mean of four epochs": ("averaged weights", "20 epochs"),
        "averaged weights against last epoch": ("averaged weights", "default"),
        "averaged weights against 20 epochs": ("averaged weights", "20 epochs"),
    }
    for name, (one, other) in pairs.items():
        found = contrasts(results, {name: {one: 1, other: -1}})
        difference = found[name]["all"]["average"]
        assert rows[name] == number_of(difference, sign=True).text, name
    assert rows["last epoch"] == rows["default, horizontal vertical both depth"] == "0.00"
    assert rows["default"] == rows["20 epochs"] == "-"

    # A run that is done anew in a folder of its own is tested anew, and it alone.
    run = methods["default"]["runs"][0]
    old = (out / run["folder"]).parent
    run["folder"] = run["folder"].replace("/test", "-2/test")
    old.rename(old.with_name(f"{old.name}-2"))
    (old.parent / "20epochs-seed0").rename(old.parent / "20epochs-seed0-2")
    methods["20 epochs"]["runs"] = []
    checkpoints, printed = after()
    assert checkpoints == others[:1] + [("training", *views) for views in sets]
    assert "20 epochs has no runs yet" in printed and "against 20 epochs" not in printed
