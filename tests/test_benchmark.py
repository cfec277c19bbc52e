"""The benchmarks measure what they say; no time is asserted."""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from benchmarks import (
    backbone,
    detect,
    froc,
    gpu_recipe,
    inference,
    loader,
    ops,
    prepare,
    roi_align,
    train_step,
)
from benchmarks.measure import Case, environment, format_results, measure, peak_memory
from tools import benchmark, mask_ceiling


def test_baseline_and_ours_agree_on_ties_several_lesions_and_nothing_found():
    detections, ground_truths = froc.synthetic(60, 20)
    detections[3], ground_truths[4] = np.zeros((0, 5)), np.zeros((0, 4))
    assert len({len(g) for g in ground_truths}) == 3
    for offset in (0, 1):
        expected = froc.plain_froc(detections, ground_truths, 0.5, offset)
        found = froc.points(froc.froc(detections, ground_truths, 0.5, offset))
        np.testing.assert_array_equal(found, expected)
    assert expected[1][-1] > 0.9 and expected[0][-1] > 10


@pytest.fixture
def own_threads():
    """Leaves the numbers of threads as they were."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def test_loader_ours_are_the_stepwise_samples(cached_phantom, own_threads):
    cases = loader.cases(cached_phantom, size=128)
    assert [case.name.partition(", ")[2] for case in cases] == [
        f"{policy}, from {source}"
        for policy in ("keep_thick", "normalize")
        for source in ("PNG", "slice cache")
    ]
    plain = cases[0].baseline()
    assert len(plain) >= 5 and not np.array_equal(plain[0][1], plain[1][1])
    for case in cases:
        case.check(case.ours(), case.baseline())


@pytest.mark.parametrize("shift", [(0, 1, 0), (0, 0, 1), (1, 0, 0)])
def test_loader_check_notices_a_pixel_and_a_slice(cached_phantom, own_threads, shift):
    case = loader.cases(cached_phantom, size=128)[0]
    ours, plain = case.ours(), case.baseline()
    moved = [(image.roll(shift, (1, 2, 3)), masks) for image, masks in plain]
    with pytest.raises(AssertionError):
        case.check(ours, moved)
    moved = [(image, np.roll(masks, shift, (0, 1, 2))) for image, masks in plain]
    if shift[0] == 0:
        with pytest.raises(AssertionError):
            case.check(ours, moved)


def test_prepare_masks_on_the_whole_slice_are_much_alike(phantom, own_threads):
    for case in prepare.cases(phantom):
        ours, plain = case.ours(), case.baseline()
        case.check(ours, plain)
        assert any((a != b).any() for a, b in zip(ours, plain))
        with pytest.raises(AssertionError):
            case.check(ours, [~mask for mask in plain])


def test_both_run_in_turn_and_the_warm_up_does_not_count():
    calls = []

    def side(name):
        return lambda: calls.append(name) or 1

    result = measure(Case("x", side("ours"), side("baseline"), np.testing.assert_equal), rounds=3)
    assert calls == ["baseline", "ours", "ours", "baseline"] * 2
    assert {side: len(times) for side, times in result["seconds"].items()} == dict(
        ours=3, baseline=3
    )
    median = result["median"]
    assert result["ratio"] == median["baseline"] / median["ours"]
    assert median["ours"] == sorted(result["seconds"]["ours"])[1]


def test_peak_memory_is_what_tensors_take_at_once():
    def three_then_one():
        sums = torch.ones(1 << 20) + torch.ones(1 << 20)
        return sums.sum()

    assert peak_memory(three_then_one) == pytest.approx(3 * 4 << 20, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        lambda: backbone.cases((("AlignShiftConv", 3, 64, 1), ("A3DConv", 3, 32, 2))),
        lambda: ops.cases(3, 8, 32, names=("A3DConv", "SoftACSConv")),
        lambda: train_step.cases(size=32),
        lambda: inference.cases(size=64, experiments=("alignshift_3slice",)),
        lambda: roi_align.cases(size=64, channels=8),
    ],
    ids=["backbone", "ops", "train_step", "inference", "roi_align"],
)
def test_network_benchmarks_agree_with_their_baselines(cases):
    for case in cases():
        ours = case.ours()
        case.check(ours, case.baseline())
        if case.parts:
            parts = case.parts()
            assert len(parts) == 3 and min(parts.values()) > 0
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


SMALL_NETWORK = {
    "model.backbone.block_config": (1, 1, 1),
    "model.neck.in_channels": (96, 80, 72),
}


@pytest.mark.slow
def test_detect_agrees_with_the_plain_path_and_times_all_stages(monkeypatch):
    network, *roi_aligns = detect.cases(64, 6, (8,), SMALL_NETWORK, bags=())
    calls = []
    forward = roi_align.RoIAlign.forward
    monkeypatch.setattr(
        roi_align.RoIAlign, "forward", lambda *args: calls.append(args) or forward(*args)
    )
    ours = network.ours()
    # Of 8 boxes on each of 3 slices about 4.
    assert not calls and 9 <= sum(len(found.masks) for found in ours) <= 16
    baseline = network.baseline()
    assert len(calls) == 2 * 3  # boxes and masks, one stack after the other
    network.check(ours, baseline)
    some = next(i for i, found in enumerate(baseline) if len(found.scores))
    baseline[some] = replace(baseline[some], scores=baseline[some].scores + 0.02)
    with pytest.raises(AssertionError):
        network.check(ours, baseline)
    parts = network.parts()
    assert len(parts) == 2 * 7 and min(parts.values()) > 0
    for case in roi_aligns:
        case.check(case.ours(), case.baseline())


def test_detect_counts_images_and_agrees_on_attention_between_them(monkeypatch):
    monkeypatch.setattr(detect, "ATTENTION_SLICES", 6)
    (case,) = detect.cases(64, boxes=(), bags=(3,))[:1]
    # Around every 2 mm from 0 to 12, and of the first and of the last slice alone.
    assert case.name == "bag of 3, 6 slices: 9 and 18 images"
    case.check(case.ours(), case.baseline())


def test_backbone_check_notices_a_slice(monkeypatch):
    (case,) = backbone.cases((("AlignShiftConv", 3, 64, 1),))
    ours = case.ours()
    with pytest.raises(AssertionError):
        case.check(ours, case.baseline() + 1e-2 * ours.abs().max())


def test_results_that_differ_are_no_measurement():
    results = iter([1, 1, 1, 1, 1, 2])
    case = Case("x", lambda: next(results), lambda: next(results), np.testing.assert_equal)
    with pytest.raises(AssertionError):
        measure(case, rounds=3)


def test_table_shows_medians_and_ratio():
    result = dict(
        name="x",
        seconds=dict(ours=[0.02, 0.03, 0.01], baseline=[2.0, 1.0, 1.5]),
        median=dict(ours=0.02, baseline=1.5),
        ratio=75.0,
    )
    line = format_results([result]).splitlines()[2]
    assert line.split() == ["x", "20.0", "(10.0..30.0)", "1500", "(1000..2000)", "75.00x"]


def test_environment_says_what_a_time_depends_on(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment()
    assert found["threads"]["OMP_NUM_THREADS"] == "3" and found["cores"] >= 1
    assert found["packages"]["numpy"] == np.__version__ and found["processor"]
    json.dumps(found)


def test_command_prints_and_writes(repository, tmp_path):
    arguments = ["froc", "--rounds", "1", "--out", tmp_path / "x.json"]
    run = subprocess.run(
        [sys.executable, "tools/benchmark.py", *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "4817 images x 50 boxes" in run.stdout
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["benchmark"] == "froc" and content["results"][0]["ratio"] > 0
    assert "commit" in content["environment"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--reference", "9", "--iterations", "8"], "--reference must be 1 to --iterations (8)"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--size", "64"], "size is 64: give a whole number"),
        (["--weights", "nowhere.pth"], "--weights nowhere.pth: no such file"),
    ],
)
def test_gpu_recipe_refuses_arguments_before_the_work(monkeypatch, arguments, text):
    monkeypatch.setattr(gpu_recipe, "prepare", lambda *_: pytest.fail("it began to work"))
    monkeypatch.setattr(sys, "argv", ["benchmark", "gpu-recipe", *arguments])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code.startswith(f"benchmark: {text}")


def test_an_error_within_gpu_recipe_is_none_of_the_user(monkeypatch):
    def fails(**_):
        raise ValueError("oh")

    monkeypatch.setattr(gpu_recipe, "results", fails)
    monkeypatch.setattr(sys, "argv", ["benchmark", "gpu-recipe"])
    with pytest.raises(ValueError, match="oh"):
        benchmark.main()


def test_gpu_recipe_does_not_end_with_who_started_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = set(threading.enumerate())
    with gpu_recipe.process_group_of_one(Config()):
        assert torch.distributed.get_backend() == "gloo"
        started = set(threading.enumerate()) - threads
    assert not [thread for thread in started if "parent" in thread.name]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["alignshift_3slice"], "alignshift_3slice is not of a detector on LiTS"),
        (["acs_volumes/lits_acs"], "acs_volumes/lits_acs is not of a detector on LiTS"),
        (["demo/lits", "--sizes", "28", "-1"], "--sizes must be at least 1, got -1"),
    ],
)
def test_mask_ceiling_refuses_what_it_cannot_draw(monkeypatch, arguments, text):
    monkeypatch.setattr(mask_ceiling, "ceilings", lambda *_: pytest.fail("it began to work"))
    monkeypatch.setattr(sys, "argv", ["mask_ceiling", *arguments])
    with pytest.raises(SystemExit) as end:
        mask_ceiling.main()
    assert end.value.code.startswith(f"mask_ceiling: {text}")


@pytest.mark.slow
def test_gpu_recipe_repeats_the_losses_of_the_cpu(phantom, monkeypatch, own_threads):
    """Both runs are on the CPU then: the second, of a process group, is to see the same samples."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = gpu_recipe.results(
        iterations=4,
        reference=3,
        size=64,
        batch=2,
        experiment="demo/alignshift_3slice",
        root=phantom,
        overrides={
            "model.backbone.block_config": (1, 1, 1),
            "model.backbone.with_cp": True,
            "model.neck.in_channels": (36, 30, 27),
            "train_dataloader.num_workers": 0,
            "train_dataloader.persistent_workers": False,
        },
    )
    cpu, ours = found
    assert (
        [len(result["losses"]) for result in found]
        == [3, 4]
        == [len(result["seconds"]) for result in found]
    )
    assert len(set(ours["losses"])) == 4  # other batches, or trained
    np.testing.assert_allclose(ours["losses"][:3], cpu["losses"], rtol=1e-4)
    assert len(ours["differences"]) == 3 and max(ours["differences"]) < 1e-4
    assert ours["images_per_second"] > 0 and 0 < ours["waiting"] < 1
    assert not torch.distributed.is_initialized()
    json.dumps(found)
    table = gpu_recipe.format_results([cpu, {**ours, "peak_bytes": 3 << 30, "error": "oh"}])
    assert "3.0" in table and "FAILED: oh" in table and "BatchNorm3d" in table
