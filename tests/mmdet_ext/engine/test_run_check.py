"""Ranges of sound runs: where they hold, what lies outside, what the log of a run says."""

import json
import math
import subprocess
import sys

import pytest

from mmdet_ext.engine.run_check import (
    CAUSES,
    QUANTITIES,
    REFERENCES,
    VALIDATION,
    Plan,
    Reference,
    causes,
    check,
    medians,
    plot,
    read_log,
    read_plan,
    record,
    table,
)

PLAN = Plan(total_batch=8, updates_per_epoch=1000, max_epochs=20, drops=(9, 16))


def reference(*points):
    recipe = dict(total_batch=8, updates_per_epoch=1000)
    return Reference(dict(source="a test", recipe=recipe, points=points))


def test_medians_are_of_the_last_hundred_updates_and_of_means_of_their_parts():
    values = [1000.0] * 50 + [float(i) for i in range(100)]
    assert medians({"loss_cls": values}) == {"loss_cls": 49.5}
    assert medians({"loss_cls": [3.0, 1.0, 2.0], "loss_mask": []}) == {"loss_cls": 2.0}
    # Updates of three parts: means 2, 5, 8; the tenth belongs to an update that is not over.
    assert medians({"loss_cls": [1, 2, 3, 4, 5, 6, 7, 8, 9, 99]}, accumulated=3) == {"loss_cls": 5}


def test_a_range_is_interpolated_in_logarithms_between_its_points():
    found = reference(dict(update=100, loss_cls=[0.1, 0.4]), dict(epoch=1, loss_cls=[0.001, 0.1]))
    assert found.range_at(PLAN, "loss_cls", 99) is None
    assert found.range_at(PLAN, "loss_cls", 100) == (0.1, 0.4)
    middle = round(math.sqrt(100 * 1000))
    assert found.range_at(PLAN, "loss_cls", middle) == pytest.approx((0.01, 0.2), rel=1e-2)
    assert found.range_at(PLAN, "loss_cls", 1000) == pytest.approx((0.001, 0.1))
    assert found.range_at(PLAN, "loss_cls", 9999) == pytest.approx((0.001, 0.1))
    assert found.range_at(PLAN, "loss_mask", 500) is None


def test_points_follow_the_schedule_of_the_run():
    found = reference(
        dict(epoch=4, loss_cls=[1, 2]),
        dict(after_drop=0, loss_cls=[3, 4]),
        dict(after_drop=1, loss_cls=[5, 6]),
        dict(end=True, loss_cls=[7, 8]),
    )
    assert [p[0] for p in found.ranges(PLAN, "loss_cls")] == [4000, 9000, 10000, 20000]
    early = Plan(8, 1000, 20, (3,))
    assert [p[0] for p in found.ranges(early, "loss_cls")] == [3000, 4000, 20000]
    steady = Plan(8, 1000, 20)
    assert [p[0] for p in found.ranges(steady, "loss_cls")] == [4000]


@pytest.mark.parametrize("value, outside", [(0.09, "below"), (0.1, None), (0.4, None),
                                            (0.41, "above"), (math.inf, "above"),
                                            (math.nan, "above")])  # fmt: skip
def test_what_lies_outside_is_found_with_its_side(value, outside):
    found = check(reference(dict(update=1, loss_cls=[0.1, 0.4])), PLAN, 7, {"loss_cls": value})
    assert [f.side for f in found] == ([outside] if outside else [])
    if outside:
        assert str(found[0]).startswith(f"update 7: loss_cls {value:.4g} is {outside} the 0.1 to")
        assert causes(found) == [f"loss_cls {outside}: {CAUSES['loss_cls', outside]}"]


def test_another_recipe_is_not_compared():
    found = reference()
    assert found.misfit(PLAN) is None
    assert "total batch is 64, that of the reference is 8" in found.misfit(Plan(64, 1000, 20))
    assert "updates per epoch is 90" in found.misfit(Plan(8, 90, 20))


def test_each_side_of_each_quantity_has_a_cause():
    assert set(CAUSES) == {(q, side) for q in QUANTITIES for side in ("above", "below")}


@pytest.mark.parametrize("path", sorted(REFERENCES.glob("*.json")), ids=lambda p: p.stem)
def test_the_references_that_come_along_are_ranges(path):
    found = Reference.read(path.stem)
    plan = Plan(**found.recipe, max_epochs=20, drops=(9, 16))
    assert found.source and found.misfit(plan) is None
    assert {"loss_rpn_cls", "loss_cls", VALIDATION} <= {q for p in found.points for q in p}
    for quantity in QUANTITIES:
        points = found.ranges(plan, quantity)
        assert all(0 <= low < high for _, low, high in points)
        said = [p for p in found.points if quantity in p]
        assert len(points) == len(said), "points are not in order"


def test_an_unknown_reference_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="none of deeplesion, demo"):
        Reference.read("demi")


def test_a_recorded_reference_holds_its_runs_and_little_more():
    plan = Plan(4, 100, 3)
    logs = [
        {50: {"loss_cls": 9.0}, 100: {"loss_cls": 0.2}, 300: {"loss_cls": 0.1, VALIDATION: 70.0}},
        {100: {"loss_cls": 0.3}, 300: {VALIDATION: 95.0}},
    ]
    content = json.loads(json.dumps(record(logs, plan, "a test")))
    assert content["points"] == [
        {"update": 100, "loss_cls": [0.16, 0.375]},
        {"update": 300, "loss_cls": [0.08, 0.125], VALIDATION: [58.0, 100]},
    ]
    found = Reference(content)
    assert found.misfit(plan) is None
    assert not [f for log in logs for u, v in log.items() for f in check(found, plan, u, v)]


@pytest.fixture
def work_dir(tmp_path):
    """A run of 2 epochs of 100 updates, interrupted at 130 and resumed from 100."""

    def start(name, lines):
        folder = tmp_path / name / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("\n".join(map(json.dumps, lines)) + '\n{"median/lo')

    def line(step, value):
        return {"median/loss_cls": value, "step": step}

    start("1", [line(50, 0.5), {"loss": 1.0, "step": 60}, line(100, 0.25),
                {VALIDATION: 40.0, "step": 1}, line(130, 9.0)])  # fmt: skip
    start("2", [line(110, 0.2), line(200, 0.3)])
    training = dict(total_batch=8, updates_per_epoch=100, max_epochs=2, drops=[], reference=None)
    (tmp_path / "run_1.json").write_text(json.dumps(dict(training=training)))
    (tmp_path / "run_2.json").write_text(json.dumps(dict(seed=1)))  # of a test
    return tmp_path


def test_the_log_of_a_run_that_was_resumed_is_read_while_it_is_written(work_dir):
    plan, name = read_plan(work_dir)
    assert (plan, name) == (Plan(8, 100, 2), None)
    assert read_log(work_dir, 100) == {
        50: {"loss_cls": 0.5}, 100: {"loss_cls": 0.25, VALIDATION: 40.0},
        110: {"loss_cls": 0.2}, 200: {"loss_cls": 0.3},
    }  # fmt: skip


def test_the_table_marks_what_is_out_of_range(work_dir, tmp_path):
    found = Reference(dict(source="", recipe={}, points=[dict(update=50, loss_cls=[0.2, 0.26])]))
    plan, log = read_plan(work_dir)[0], read_log(work_dir, 100)
    lines = table(found, plan, log)
    assert [line.split()[0] for line in lines[1:]] == ["100", "200"]
    assert "0.25 " in lines[1] and "40" in lines[1] and "!" not in lines[1]
    assert "0.3!" in lines[2]
    plot(found, plan, log, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_says_what_is_out_of_range_and_why(work_dir, repository, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, repository / "tools/check_run.py", *arguments],
            capture_output=True, text=True, cwd=repository,
        )  # fmt: skip

    run = command(work_dir)
    assert run.returncode == 2 and "the config names no reference" in run.stdout
    run = command(work_dir, "--reference", "demo")
    assert run.returncode == 2 and "total batch is 8, that of the reference is 4" in run.stdout
    (record,) = work_dir.glob("run_1.json")
    record.write_text(record.read_text().replace('batch": 8', 'batch": 4').replace("100", "90"))
    run = command(work_dir, "--reference", "demo")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "loss_cls 9" not in run.stdout and "usual causes" in run.stdout
    assert (work_dir / "check_run.png").is_file()
    ranges = tmp_path / "ranges.json"
    assert command(work_dir, "--record", ranges).returncode == 0
    assert "points" in json.loads(ranges.read_text())
    ranges.write_text("mine")
    run = command(work_dir, "--record", ranges)
    assert run.returncode == 2 and "ranges.json is there already: name another" in run.stderr
    assert ranges.read_text() == "mine"
    run = command(tmp_path / "none")
    assert run.returncode == 2 and "holds no run_*.json" in run.stderr
