"""tools/export.py, and tools/detect.py with what it writes: the same files as with the checkpoint,
without MMDetection, of ONNX without torch either."""

import csv
import os
import runpy
import subprocess
import sys

import pytest

from ct_volumes.scan_out import write_nifti_scan

from .mmdet_ext.small_detector import ROOT, SMALL, body_of, config_of, volume_of, write_checkpoint

# Runs a command of tools/ where some libraries cannot be imported.
WITHOUT = """
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ImportError(f'{{name}} is blocked')

sys.meta_path.insert(0, Refuse())
sys.argv = {arguments!r}
runpy.run_path({command!r}, run_name='__main__')
"""
BLOCKED = {
    "onnx": ["torch", "torchvision", "mmengine", "mmcv", "mmdet"],
    "torch-export": ["mmengine", "mmcv", "mmdet"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(config_of(), tmp_path_factory.mktemp("weights") / "epoch_1.pth")


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.nii"
    write_nifti_scan(volume_of(body_of(4), 1.0, (3.0, 3.0)), path)
    return path


def run(monkeypatch, capsys, command, *arguments):
    """A command in this process; returns its exit status, and what it printed."""
    main = runpy.run_path(str(ROOT / "tools" / command))["main"]
    monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
    try:
        status = main()
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status)
            status = 1
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def of_network(checkpoint):
    options = [f"{name}={value}".replace(" ", "") for name, value in SMALL.items()]
    return ["demo/alignshift_3slice", checkpoint], ["--cfg-options", *options]


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def without(kind, *arguments):
    """tools/detect.py where what an export of a kind does not need cannot be imported."""
    code = WITHOUT.format(
        blocked=BLOCKED[kind], command=str(ROOT / "tools/detect.py"),
        arguments=["detect.py", *map(str, arguments)],
    )  # fmt: skip
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


def test_the_command_itself_needs_no_framework(scan, tmp_path):
    done = without("onnx", scan, "--model", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"{tmp_path} holds no manifest.json" in done.stderr and "blocked" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKED)
def test_an_export_detects_without_the_framework(
    kind, checkpoint, scan, tmp_path, monkeypatch, capsys
):
    if kind == "onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name, reason=f"needs {name}, docs/export.md")
    network, options = of_network(checkpoint)
    export = [*network, "--out", tmp_path / "export", "--format", kind, *options]
    status, text = run(monkeypatch, capsys, "export.py", *export)
    assert status is None and "compared with its networks" in text, text

    common = ["--min-score", "0.3", "--interval", "1"]
    arguments = [scan, "--model", tmp_path / "export", "--out", tmp_path / "found", *common]
    done = without(kind, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"alignshift_3slice, {tmp_path / 'export'} ({kind}), on cpu" in done.stdout

    named = ["--config", network[0], "--checkpoint", network[1], "--device", "cpu"]
    detect = [scan, *named, "--out", tmp_path / "expected", *common, *options]
    status, text = run(monkeypatch, capsys, "detect.py", *detect)
    assert status is None, text
    found, expected = (rows(tmp_path / name / "lesions.csv") for name in ("found", "expected"))
    assert len(found) == len(expected) > 3
    for one, other in zip(found, expected):
        assert float(one["score"]) == pytest.approx(float(other["score"]), abs=2e-3)
    # An export whose program is damaged is refused before the work.
    program = next((tmp_path / "export").glob("boxes-*"))
    program.write_bytes(b"damaged")
    again = [scan, "--model", tmp_path / "export", "--out", tmp_path / "again"]
    status, text = run(monkeypatch, capsys, "detect.py", *again)
    assert status == 1 and "is damaged: it is not as it was written" in text
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", "a"], "leave out --config"),
        (["--cfg-options", "a=1"], "leave out --cfg-options"),
        (["--device", "cuda"], "an exported detector runs on the cpu"),
        ([], "no folder of an exported detector"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(
    options, message, scan, tmp_path, monkeypatch, capsys
):
    detect = [scan, "--model", tmp_path / "nothing", "--out", tmp_path / "out", *options]
    status, text = run(monkeypatch, capsys, "detect.py", *detect)
    assert status in (1, 2) and message in text and "Traceback" not in text


def test_a_detector_of_another_kind_is_named(tmp_path, monkeypatch, capsys):
    """It is refused before a checkpoint is asked for."""
    arguments = ["demo/volumetric_attention", tmp_path / "epoch_1.pth", "--out", tmp_path / "out"]
    status, text = run(monkeypatch, capsys, "export.py", *arguments)
    assert status == 1 and "SliceGroupFasterRCNN cannot be exported" in text
    assert "KeySliceMaskRCNN" in text and not (tmp_path / "out").exists()
