"""tools/study.py as a user calls it: with commands that train nothing, and once for real."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest

DEMO = "configs/demo/nofusion_3slice.py"
# A network of seconds.
SMALL = [
    "model.backbone.block_config=(1,1,1)", "model.neck.in_channels=(36,30,27)", "resize.size=96",
    "train_cfg.max_epochs=1", "train_cfg.val_interval=1", "default_hooks.run_check.reference=None",
    *(f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test")),
]  # fmt: skip
NO_FROC = [
    "test_evaluator._delete_=True", "test_evaluator.type=DumpResults",
    "test_evaluator.out_file_path=a.pkl",
]  # fmt: skip
TRAIN = """
import sys
print("epoch 1/1  loss 1")
if "randomness.seed=1" in sys.argv and "stack.policy=keep_thick" in sys.argv:
    sys.exit("the loss is not finite")
"""
# How many images' lesions are found is decided by options and seed.
TEST = """
import gzip, json, os, sys
from pathlib import Path
content = json.loads((Path(os.environ["DEEPLESION_ROOT"]) / "annotations/test.json").read_text())
found = 1 + ("stack.policy=keep_thick" in sys.argv) + ("seed1" in sys.argv[2])
images = []
for i, image in enumerate(content["images"]):
    lesions = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in lesions)]
    found_boxes = boxes[:1] * (i % 4 < found)
    images.append(dict(
        file_name=image["file_name"], patient=str(i), height=image["height"],
        width=image["width"], spacing_mm=1.0, thickness_mm=image["thickness_mm"],
        lesions=[dict(bbox=b, recist=None, mask=None, diameters_mm=None, lesion_type=-1,
                      lesion_idx=k) for k, b in enumerate(boxes)],
        boxes=found_boxes, scores=[0.5] * len(found_boxes),
    ))
text = json.dumps(dict(format="deeplesion-results-1", table_key_slices=None, images=images))
folder = Path(sys.argv[sys.argv.index("--work-dir") + 1])
folder.mkdir()
(folder / "results.json.gz").write_bytes(gzip.compress(text.encode()))
(folder / "results.froc.json").write_text(json.dumps(dict(froc=[dict(average=50.0)])))
"""
EVALUATE = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir()
(folder / "report.html").touch()
"""


@pytest.fixture
def study(repository, phantom, tmp_path, monkeypatch, capsys):
    """Calls the command; returns exit status and what it printed."""
    spec = importlib.util.spec_from_file_location("study_command", repository / "tools/study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("train", TRAIN), ("test", TEST), ("evaluate", EVALUATE)):
        (tools / f"{name}.py").write_text(text)
    monkeypatch.setattr(module, "TOOLS", tools)
    monkeypatch.setattr("mmdet_ext.engine.study.POLL", 0.01)
    light = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    monkeypatch.setattr("mmdet_ext.engine.study_run.CHILD", light)
    monkeypatch.setenv("DEEPLESION_ROOT", str(phantom))
    monkeypatch.chdir(repository)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["study.py", *map(str, arguments)])
        try:
            status = module.main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        if isinstance(status, str):
            return 1, captured.out + status
        return status, captured.out + captured.err

    call.module = module
    return call


def test_a_failing_run_leaves_a_table_of_the_others(study, tmp_path):
    out = tmp_path / "out"
    methods = [DEMO, "--variant", "thick", DEMO, "stack.policy=keep_thick"]
    call = [*methods, "--seeds", 2, "--out", out, "--resamples", 100]
    status, printed = study(*call)
    assert status == 1
    assert "2 methods x 2 seeds: 0 runs done, 4 to do" in printed
    assert "thick, seed 1: FAILED (train: exit status 1)" in printed
    assert printed.rstrip().splitlines()[-1].startswith("failed: thick, seed 1.")
    assert "thick                1 |" in printed and "nofusion_3slice      2 |" in printed

    content = json.loads((out / "study.json").read_text())
    averages = {
        name: groups["all"]["average"]["seeds"]
        for name, groups in content["test_sets"][0]["methods"].items()
    }
    assert len(averages["nofusion_3slice"]) == 2 and len(averages["thick"]) == 1
    # A method's first seed finds a quarter of the images' lesions, another policy or seed more.
    assert averages["nofusion_3slice"][0] < averages["nofusion_3slice"][1] == averages["thick"][0]
    assert content["methods"]["thick"]["cost"]["parameters"] > 1e5

    # From what is there alone, with another reference.
    for file in out.glob("study.*"):
        file.unlink()
    status, printed = study("--out", out, "--report", "--reference", "thick", "--resamples", 100)
    assert status == 0 and "difference from thick" in printed
    assert (out / "study.html").is_file()
    for ignored, message in (
        (["--reference", "thik"], "reference thik is none of the methods nofusion_3slice, thick"),
        (["--seeds", "5"], "--seeds"),
        (["--cfg-options", "stack.num_slices=5", "--dry-run"], "--dry-run, --cfg-options"),
        ([DEMO, "--jobs", "2"], "--jobs: --report runs nothing"),
    ):
        status, printed = study("--out", out, "--report", *ignored)
        assert status == 1 and message in printed

    # Of one of the methods, perhaps beside a study that runs: what that one noted stays.
    before = (out / "plan.json").read_bytes()
    status, printed = study(DEMO, "--out", out, "--report", "--resamples", 100)
    assert status == 0 and "nofusion_3slice      2 |" in printed and "thick     " not in printed
    assert (out / "plan.json").read_bytes() == before


def test_a_phantom_is_made_by_one_call_alone(study, phantom, tmp_path, monkeypatch):
    """Two calls would write the same files. To look makes none, and takes no lock."""
    out, module = tmp_path / "out", study.module
    held, made = [], []

    def lock(file, elsewhere):
        held.append(file)
        return nullcontext()

    def make(root, *_, **__):
        made.append(len(held))

    def prepare(root, **_):
        shutil.copytree(phantom, root)

    monkeypatch.setattr(module, "only_writer", lock)
    monkeypatch.setattr(module, "make_phantom", make)
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(module, "run", lambda *_: [])
    monkeypatch.setattr(module, "report", lambda *_: None)
    call = [DEMO, "--out", out, "--phantom", 12]
    for look in ("--dry-run", "--report"):
        status, printed = study(*call, look)
        assert status == 1 and f"{look} makes no phantom" in printed and not out.exists()
    assert study(*call)[0] == 0 and made == [1]
    assert study(*call, "--dry-run")[0] == 0
    assert held == [out / "study.lock"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a CONFIG"),
        (["--report"], "holds no study"),
        ([DEMO, "--seeds", "0"], "--seeds must be at least 1"),
        ([DEMO, "--reference", "none"], "--reference none is none of the methods nofusion_3slice"),
        ([DEMO, "--data", "nowhere"], "there is no folder nowhere"),
        ([DEMO, "--cfg-options", "stack.polcy=keep_thick"], "did you mean stack.policy"),
        ([DEMO, "--variant", "x", DEMO, "stack.num_slices=3"], "are the same"),
        ([DEMO, "--cfg-options", "randomness.seed=7"], "randomness.seed is the study's own"),
        (["--variant", "x", DEMO, "work_dir=w"], "x: work_dir is the study's own"),
        ([DEMO, "--cfg-options", "test_evaluator.iou_threshold=0.3"], "test_evaluator: a study's"),
        ([DEMO, "--cfg-options", *NO_FROC], "test_evaluator has no FROCMetric"),
        ([DEMO, "--slurm", "cluster=local", "--jobs", "2"], "--jobs"),
        ([DEMO, "--slurm", "gpu"], "name=value, got 'gpu'"),
        (
            ["--variant", "x", DEMO, 'test_dataloader.dataset.ann_file=["annotations/test.json"]'],
            "x: its test: DeepLesionDataset: ann_file=",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(study, tmp_path, arguments, message):
    status, printed = study(*arguments, "--out", tmp_path / "out")
    assert status in (1, 2) and message in printed
    assert not list((tmp_path / "out").glob("runs/*"))


def test_methods_that_are_given_other_slices_are_named(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study.module, "cost_of", lambda config: dict(note=""))
    methods = DEMO, "configs/demo/alignshift_3slice.py"
    for options, said in (((), True), (("--cfg-options", "stack.policy=keep_thick"), False)):
        status, printed = study(*methods, *options, "--out", tmp_path / "out", "--dry-run")
        assert status == 0, printed
        assert printed.count("note: the methods differ in their slices too") == said


def test_options_that_are_given_twice_all_count(study, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(study.module, "run_on_slurm", lambda *a, **k: seen.update(a=a, k=k) or [])
    monkeypatch.setattr(study.module, "write_study", lambda *a: "")
    status, printed = study(
        DEMO, "--out", tmp_path / "out", "--seeds", 1, "--slurm", "slurm_partition=gpu",
        "--cfg-options", "stack.num_slices=5", "--cfg-options", "stack.policy=keep_thick",
        "--slurm", "mem_gb=32",
    )  # fmt: skip
    assert status == 0, printed
    (job,), *_, parameters, _ = seen["a"]
    assert job.methods[0].options == ("stack.num_slices=5", "stack.policy=keep_thick")
    assert parameters == {"slurm_partition": "gpu", "mem_gb": 32}
    # Slurm need not pass the environment on.
    assert seen["k"]["environment"] == {"DEEPLESION_ROOT": os.environ["DEEPLESION_ROOT"]}


def test_costs_are_counted_again_when_the_code_is_another(study, tmp_path, monkeypatch):
    module, counted = study.module, []
    monkeypatch.setattr(module, "run", lambda *a: [])
    monkeypatch.setattr(module, "report", lambda *a: None)
    monkeypatch.setattr(module, "cost_of", lambda config: counted.append(config) or dict(note=""))
    out = tmp_path / "out"
    for code, times in (("a", 1), ("a", 1), ("b", 2)):
        both = dict(training=code, test=code)
        monkeypatch.setattr(module, "code_hashes", lambda *a, both=both: both)
        study(DEMO, "--out", out)
        assert len(counted) == times
    # A plan that is damaged is written anew; without configs it is named.
    for text in ("{", "[]", '{"reference": "a", "methods": [{}]}'):
        (out / "plan.json").write_text(text)
        status, printed = study("--out", out, "--report")
        assert status == 1 and f"{out / 'plan.json'} is not the plan of a study" in printed
    assert study(DEMO, "--out", out)[0] == 0
    assert json.loads((out / "plan.json").read_text())["reference"] == "nofusion_3slice"


@pytest.mark.slow
def test_two_methods_with_two_seeds_for_real(repository, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}

    def call(*arguments):
        return subprocess.run(
            [sys.executable, "tools/study.py", *map(str, arguments), "--out", out], cwd=repository,
            env=environment, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    methods = [DEMO, "--variant", "thick", DEMO, "stack.policy=keep_thick"]
    call_of_all = [*methods, "--phantom", 12, "--seeds", 2, "--cfg-options", *SMALL]
    printed = call(*call_of_all)
    assert "[4/4] thick, seed 1: average " in printed and len(printed.splitlines()) < 25
    runs = sorted(out.glob("runs/*/run.json"))
    assert len(runs) == 4
    for run in runs:
        note = json.loads(run.read_text())
        assert note["training"]["device"] and note["training"]["memory_mb"] > 100
        (test,) = note["tests"]
        assert (run.parent / test / "evaluation/report.html").is_file()
    assert "4 runs done, 2 to do" in call(*call_of_all, "--dry-run", "--seeds", 3)
    again = call(*call_of_all)
    assert "4 runs done, 0 to do" in again
    assert again.split("\n\n", 1)[1] == printed.split("\n\n", 1)[1]
