"""The commands, as a user types them, from a phantom to the FROC table."""

import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from deeplesion.errors import UserError
from deeplesion.evaluation.evaluate import froc_table
from deeplesion.evaluation.results import Result, read_results, write_table
from mmdet_ext.config.experiment import config_name
from mmdet_ext.engine.run import find_checkpoint, framework_errors, load_config

from .run_command import command

DEMO = "configs/demo/alignshift_3slice.py"
# The total of the papers; 8 becomes the batch that the demo's learning rate is for.
BATCH = ["train_dataloader.batch_size=8", "auto_scale_lr.base_batch_size=8"]
QUICK = ["--cfg-options", "train_cfg.max_epochs=2", "train_cfg.val_interval=1", *BATCH]


@pytest.fixture(scope="module")
def trained(repository, phantom, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("work") / "run"
    output = command(
        repository, "tools/train.py", DEMO, "--work-dir", work_dir, *QUICK, root=phantom
    )
    return work_dir, output


def log(work_dir):
    """What the only run of a folder logged."""
    (file,) = work_dir.glob("*/*.log")
    return file.read_text()


def test_training_validates_each_epoch_and_keeps_the_best(trained):
    work_dir, _ = trained
    logged = log(work_dir)
    assert logged.count("Sensitivity (%) at false positives per image") == 2
    assert "Epoch(val) [2]" in logged
    assert (work_dir / "epoch_2.pth").exists()
    assert len(list(work_dir.glob("best_FROC_average_epoch_*.pth"))) == 1
    assert list(work_dir.rglob("events.out.tfevents.*")), "TensorBoard scalars are missing"


def test_training_prints_a_page_and_logs_the_rest(trained, phantom):
    work_dir, output = trained
    lines = output.splitlines()
    (file,) = work_dir.glob("*/*.log")
    content = json.loads((phantom / "annotations/train.json").read_text())
    counts = f"{len(content['images'])} images with {len(content['annotations'])} lesions"
    assert lines[:2] == [
        f"config      {DEMO}",
        f"training    {counts}, {phantom / 'annotations/train.json'} (DeepLesion: 22,478)",
    ]
    assert f"work dir    {work_dir}" in lines and f"log         {file}" in lines
    (best,) = work_dir.glob("best_*.pth")
    assert re.search(rf"^best        \d+\.\d\d, {best}$", output, re.M)
    epochs = [line for line in lines if line.startswith("epoch ")]
    form = r"epoch {}/2  loss \d\.\d{{4}}  lr \S+  left \d\d:\d\d  val FROC/average \d+\.\d\d"
    for number, line in enumerate(epochs, 1):
        assert re.match(form.format(number), line), line
    assert len(epochs) == 2 and len(lines) < 25, output
    # mmdet's words on optional packages, pycocotools' on its index.
    assert not re.search("OneDL|faster_coco_eval|index", output)
    logged = file.read_text()
    for fact in ("System environment", "Config:", "DeepLesionDataset", "paramwise_options"):
        assert fact in logged


def test_testing_prints_the_table_writes_json_and_draws(trained, repository, phantom, tmp_path):
    work_dir, _ = trained
    output = command(
        repository, "tools/test.py", DEMO, work_dir, "--work-dir", tmp_path, "--show-dir",
        tmp_path / "show", root=phantom,
    )  # fmt: skip
    assert output.count("Avg.[0.5,1,2,4]") == 1
    lines = output.splitlines()
    (best,) = work_dir.glob("best_*.pth")
    assert f"checkpoint  {best}" in lines and f"work dir    {tmp_path}" in lines
    assert len(lines) < 20 and "backend" not in output, output
    logged = log(tmp_path)
    assert "System environment" in logged and f"file backend from path: {best}" in logged
    records = read_results(tmp_path / "results.json.gz").records
    rows = json.loads((tmp_path / "results.froc.json").read_text())["froc"]
    assert froc_table(records) == rows
    content = json.loads((phantom / "annotations/test.json").read_text())
    assert [r["file_name"] for r in records] == [i["file_name"] for i in content["images"]]
    boxes = [lesion["bbox"] for r in records for lesion in r["lesions"]]
    expected = [a["bbox"] for a in content["annotations"]]
    expected = [[x, y, x + w, y + h] for x, y, w, h in expected]
    np.testing.assert_allclose(boxes, expected)
    pictures = sorted((tmp_path / "show").glob("*.png"))
    assert len(pictures) == len(records)
    assert cv2.imread(str(pictures[0])) is not None


def test_a_test_tells_what_it_is_of_and_what_it_replaces(trained, repository, phantom, tmp_path):
    """Of a part of the data, too."""
    checkpoint = trained[0] / "epoch_1.pth"
    before = dict(config="x", checkpoint="best_of_another.pth", checkpoint_sha256="0" * 64)
    write_table(tmp_path / "results.froc.json", [], Result("", [], model=before))
    output = command(
        repository, "tools/test.py", DEMO, checkpoint, "--work-dir", tmp_path, "--cfg-options",
        "test_dataloader.dataset.indices=2", root=phantom,
    )  # fmt: skip
    assert output.count("results.json.gz: replaces the result of best_of_another.pth") == 1
    images = len(json.loads((phantom / "annotations/test.json").read_text())["images"])
    assert f"PARTIAL DATA: 2 of {images} key slices" in output
    model = read_results(tmp_path / "results.json.gz").model
    assert model == dict(
        config="demo/alignshift_3slice",
        checkpoint="epoch_1.pth",
        checkpoint_sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
    )
    assert json.loads((tmp_path / "results.froc.json").read_text())["model"] == model


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(trained, repository, phantom, tmp_path):
    work_dir, _ = trained
    # Of an odd number of images one process has one more.
    options = ["--cfg-options", "test_dataloader.dataset.ann_file=annotations/train.json"]
    options += ["test_dataloader.dataset.indices=5"]
    one, two = tmp_path / "one", tmp_path / "two"
    command(repository, "tools/test.py", DEMO, work_dir, "--work-dir", one, *options, root=phantom)
    run = subprocess.run(
        [repository / "scripts/dist_test.sh", repository / DEMO, work_dir, "2", "--work-dir", two,
         *options],
        cwd=tmp_path,
        env={**os.environ, "DEEPLESION_ROOT": str(phantom), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("detections: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    table = json.loads((one / "results.froc.json").read_text())["froc"]
    assert table == json.loads((two / "results.froc.json").read_text())["froc"]
    assert table[0]["images"] == 5
    one, two = (read_results(path / "results.json.gz").records for path in (one, two))
    assert [r["file_name"] for r in one] == [r["file_name"] for r in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a["scores"], b["scores"], atol=1e-4)


def train_by_two_processes(repository, phantom, work_dir):
    return subprocess.run(
        [repository / "scripts/dist_train.sh", repository / DEMO, "2", "--work-dir", work_dir,
         *QUICK],
        env={**os.environ, "DEEPLESION_ROOT": str(phantom), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip


def test_two_processes_train_by_the_recipe_of_one(trained, repository, phantom, tmp_path):
    """The batch of the config is that of both together: as many updates, at the same rates."""
    run = train_by_two_processes(repository, phantom, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (torch.load(d / "epoch_2.pth", weights_only=True) for d in (trained[0], tmp_path))
    images = len(json.loads((phantom / "annotations/train.json").read_text())["images"])
    expected = 2 * math.ceil(images / 8)
    updates = [{s["step"].item() for s in c["optimizer"]["state"].values()} for c in (one, two)]
    assert updates == [{expected}, {expected}]
    assert one["meta"]["iter"] == two["meta"]["iter"] == expected
    assert one["param_schedulers"] == two["param_schedulers"]
    assert one["training"]["total_batch"] == two["training"]["total_batch"] == 8
    (record,) = tmp_path.glob("run_*.json")
    assert json.loads(record.read_text())["config"]["train_dataloader"]["batch_size"] == 8


@pytest.mark.slow
def test_two_processes_do_not_replace_a_training(trained, repository, phantom):
    """One of them refuses; both end, and neither leaves anything behind."""
    work_dir, _ = trained
    before = {f: f.stat().st_mtime_ns for f in work_dir.rglob("*")}
    run = train_by_two_processes(repository, phantom, work_dir)
    assert run.returncode != 0 and "holds a training already (epoch_2.pth)" in run.stderr
    assert {f: f.stat().st_mtime_ns for f in work_dir.rglob("*")} == before


@pytest.mark.slow
def test_resuming_continues_after_the_last_epoch(trained, repository, phantom, tmp_path):
    work_dir, _ = trained
    last = torch.load(work_dir / "epoch_2.pth", weights_only=True)
    options = ["--cfg-options", "train_cfg.max_epochs=3", *BATCH]
    output = command(
        repository, "tools/train.py", DEMO, "--work-dir", tmp_path, "--resume",
        work_dir / "epoch_2.pth", *options, root=phantom,
    )  # fmt: skip
    logged = log(tmp_path)
    assert "Epoch(train) [3]" in logged and "Epoch(train) [2]" not in logged
    assert f"resumed     {work_dir / 'epoch_2.pth'}, goes on with epoch 3, iteration" in output
    assert "\nepoch 3/3 " in output and "epoch 2/3" not in output
    resumed = torch.load(tmp_path / "epoch_3.pth", weights_only=True)
    assert resumed["meta"]["iter"] > last["meta"]["iter"]


def test_missing_data_says_how_to_get_it(repository, tmp_path):
    output = command(
        repository, "tools/train.py", DEMO, "--work-dir", tmp_path, root=tmp_path, expect=1
    )
    assert "make_phantom.py" in output and "prepare_data.py" in output


def test_missing_config_and_checkpoint_are_named(repository, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"configs/none\.py"):
        load_config("configs/none.py")
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        find_checkpoint(str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "name, arguments, wrong",
    [
        ("observe_phantom", ["nowhere"], "folder"),
        ("optimize_anchors", ["nowhere.json"], "folder"),
        ("benchmark", ["nothing"], "folder"),
        ("show_attention", ["nowhere.py", "nowhere.pth"], "file"),
        ("study", ["nowhere.py"], "file"),
        ("evaluate", ["nowhere.json"], "file"),
    ],
)
def test_an_out_that_cannot_be_written_is_refused_first(
    name, arguments, wrong, repository, tmp_path, monkeypatch
):
    """Before the work, and before what it needs is looked for."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    module = importlib.import_module(f"tools.{name}")
    if name == "benchmark":
        monkeypatch.setattr(module, "BENCHMARKS", dict(nothing="of which there is no module"))
    command = [name, *arguments, "--out", str(tmp_path / wrong)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=f"--out .* is a {wrong}: give a"):
        module.main()


def test_best_checkpoint_comes_before_the_last(tmp_path):
    for name in ("epoch_9.pth", "epoch_10.pth"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    assert Path(find_checkpoint(str(tmp_path))).name == "epoch_10.pth"
    (tmp_path / "best_FROC_average_epoch_3.pth").touch()
    assert Path(find_checkpoint(str(tmp_path))).name == "best_FROC_average_epoch_3.pth"
    older = tmp_path / "best_FROC_average_epoch_8.pth"
    older.touch()
    os.utime(older, (1, 1))
    assert Path(find_checkpoint(str(tmp_path))).name == "best_FROC_average_epoch_3.pth"


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_options_that_lower_it(error):
    advice = r"with_cp=True[\s\S]*--amp[\s\S]*accumulative_counts=4"
    detector = dict(model=dict(type="KeySliceMaskRCNN", backbone={}))
    with pytest.raises(UserError, match=advice), framework_errors(detector):
        raise error
    # A segmentor of volumes has neither backbone nor stacks.
    segmentor = dict(model=dict(type="VolumeSegmentor", network={}))
    advice = r"--amp[\s\S]*accumulative_counts=4"
    with pytest.raises(UserError, match=advice) as caught, framework_errors(segmentor):
        raise error
    assert "backbone" not in str(caught.value) and "pipeline.0.size" in str(caught.value)


def test_other_runtime_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes"), framework_errors(dict(model={})):
        raise RuntimeError("shapes differ")


def test_config_reads_the_data_root_from_the_environment(monkeypatch, repository):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("DEEPLESION_ROOT", "/somewhere/else")
    assert load_config(DEMO).train_dataloader.dataset.data_root == "/somewhere/else"
    monkeypatch.delenv("DEEPLESION_ROOT")
    assert load_config(DEMO).train_dataloader.dataset.data_root == "data/DeepLesion"


def test_work_dir_is_the_option_then_the_configs_word_then_its_place(
    monkeypatch, repository, tmp_path
):
    monkeypatch.chdir(tmp_path)  # away from the repository
    demo = str(repository / DEMO)
    assert load_config(demo).work_dir == "work_dirs/demo/alignshift_3slice"
    assert load_config("demo/alignshift_3slice").work_dir == "work_dirs/demo/alignshift_3slice"
    assert load_config("alignshift_3slice").work_dir == "work_dirs/alignshift_3slice"
    own = tmp_path / "folder/own.py"
    own.parent.mkdir()
    own.write_text(f"_base_ = {demo!r}")
    assert load_config(str(own)).work_dir == "work_dirs/own"
    assert load_config(demo, {"work_dir": "said"}).work_dir == "said"
    assert load_config(demo, {"work_dir": "said"}, "elsewhere").work_dir == "elsewhere"


def test_every_config_has_a_work_dir_of_its_own(repository):
    files = [f for f in repository.glob("configs/**/*.py") if f.parent.name != "_base_"]
    assert len({config_name(file) for file in files}) == len(files) > 50


def test_a_test_lies_beside_its_checkpoint(monkeypatch, repository, tmp_path):
    monkeypatch.chdir(tmp_path)
    demo = str(repository / DEMO)
    (tmp_path / "run").mkdir()
    for checkpoint in ("run", "run/epoch_2.pth"):
        assert load_config(demo, checkpoint=checkpoint).work_dir == "run"
        assert load_config(demo, None, "elsewhere", checkpoint).work_dir == "elsewhere"
    assert load_config(demo, {"work_dir": "said"}, checkpoint="run").work_dir == "said"
    assert load_config(demo, checkpoint="mean.pth").work_dir == "."
