"""What is computed from a result file, and result files."""

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplesion.data.coco import encode_mask
from deeplesion.evaluation.breakdowns import by_column, by_diameter, by_thickness, by_type
from deeplesion.evaluation.diameters import diameter_errors
from deeplesion.evaluation.evaluate import (
    AVERAGED,
    POINTS,
    band,
    compare,
    evaluate,
    froc_table,
    resampled,
    table,
)
from deeplesion.evaluation.froc import TABLE_FPS, froc
from deeplesion.evaluation.matching import match
from deeplesion.evaluation.results import (
    Result,
    default_names,
    read_results,
    table_file,
    write_results,
    write_table,
)
from deeplesion.report.page import write_figures, write_report
from deeplesion.report.tables import (
    all_tables,
    as_files,
    format_table,
    partial_data,
    to_csv,
    to_latex,
    to_markdown,
    to_text,
)

LESION = [10.0, 10, 30, 30]


def record(thickness, hit, name="a/001.png", false_positives=0):
    """One lesion; found with score 0.9 or not, after so many false positives of score 0.95."""
    boxes = [[60.0, 60, 70, 70]] * false_positives + ([LESION] if hit else [])
    return dict(
        file_name=name,
        patient=1,
        height=96,
        width=96,
        spacing_mm=0.8,
        thickness_mm=thickness,
        lesions=[dict(bbox=LESION, mask=None, recist=None, diameters_mm=None)],
        boxes=boxes,
        scores=[0.95] * false_positives + [0.9] * hit,
    )


def test_thin_and_thick_are_told_apart_at_2_mm():
    records = [record(1.0, True), record(2.0, True), record(2.5, False), record(5.0, True)]
    rows = {row["group"]: row for row in froc_table(records)}
    assert [rows[g]["images"] for g in ("all", "thin", "thick")] == [4, 2, 2]
    assert rows["all"]["average"] == pytest.approx(75)
    assert rows["thin"]["average"] == pytest.approx(100)
    assert rows["thick"]["average"] == pytest.approx(50)
    assert rows["thick"]["difference"] == pytest.approx(-25)
    assert list(rows["all"]["sensitivity"]) == ["0.5", "1", "2", "4", "8", "16"]


def test_sensitivity_between_points_by_hand():
    """Two images, one false positive above both hits: the curve jumps at 0.5 an image."""
    rows = froc_table([record(1.0, True, false_positives=1), record(1.0, True)])
    assert rows[0]["sensitivity"]["0.5"] == pytest.approx(100)
    rows = froc_table([record(1.0, True, false_positives=2), record(1.0, False)])
    assert rows[0]["sensitivity"]["0.5"] == pytest.approx(0)
    assert rows[0]["sensitivity"]["1"] == pytest.approx(50)


def test_unknown_thickness_counts_in_all_only():
    rows = froc_table([record(math.nan, True), record(1.0, False)])
    assert [(r["group"], r["images"]) for r in rows] == [("all", 2), ("thin", 1)]


@pytest.mark.parametrize("name", ["results.json", "results.json.gz"])
def test_result_file_round_trip(tmp_path, name):
    records = [record(1.0, True), record(math.nan, False, name="a/002.png")]
    write_results(tmp_path / "new" / name, records)
    back = read_results(tmp_path / "new" / name).records
    assert math.isnan(back[1].pop("thickness_mm")) and math.isnan(records[1].pop("thickness_mm"))
    assert back == records
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", b"{"),
        ("a.json", b"[]"),
        ("a.json", b'{"images": []}'),
        ("a.json", b'{"format": "deeplesion-results-1", "images": []}'),
        ("a.json.gz", b"not gzip"),
        ("a.json.gz", b"\x1f\x8b\x08\x00"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_results(tmp_path / name)


def test_table_goes_beside_the_result_file(tmp_path):
    assert table_file(tmp_path / "results.json.gz") == tmp_path / "results.froc.json"
    rows = froc_table([record(1.0, True)])
    write_table(tmp_path / "x.froc.json", rows, Result("", [record(1.0, True)]))
    assert json.loads((tmp_path / "x.froc.json").read_text())["froc"] == rows
    assert np.isfinite(rows[0]["average"])


@pytest.mark.parametrize("key", ["patient", "scores"])
def test_a_record_that_lacks_something_is_refused(tmp_path, key):
    broken = record(1.0, True)
    del broken[key]
    (tmp_path / "a.json").write_text(
        json.dumps({"format": "deeplesion-results-1", "images": [broken]})
    )
    with pytest.raises(ValueError, match=rf"a\.json: an image lacks {key}"):
        read_results(tmp_path / "a.json")


def test_runs_are_called_by_their_folder_or_their_file(tmp_path):
    results = [tmp_path / "a3d" / "results.json.gz", tmp_path / "acs" / "results.json"]
    assert default_names(results) == ["a3d", "acs"]
    assert default_names([tmp_path / "x" / "a3d.json.gz", tmp_path / "acs.json"]) == ["a3d", "acs"]
    for name in ("results_tta.json.gz", "mine.json"):
        assert default_names([tmp_path / "a3d" / name, tmp_path / "acs" / name]) == ["a3d", "acs"]
    for name in ("results.json.gz", "results_tta.json.gz", "results_tta_horizontal_both.json.gz"):
        assert default_names([tmp_path / "a3d" / name]) == ["a3d"]
    assert default_names([tmp_path / "a3d" / "results_of_mine.json"]) == ["results_of_mine"]
    assert default_names([tmp_path / "a3d" / "mine.json"]) == ["mine"]


corner = st.integers(0, 5)
a_box = st.tuples(corner, corner, corner, corner).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
)


@settings(max_examples=200, deadline=None)
@given(
    boxes=st.lists(a_box, max_size=7),
    lesions=st.lists(a_box, min_size=1, max_size=3),
    data=st.data(),
    offset=st.sampled_from([0, 1]),
)
def test_match_tells_what_froc_counts(boxes, lesions, data, offset):
    scores = data.draw(
        st.lists(st.sampled_from([0.1, 0.5]), min_size=len(boxes), max_size=len(boxes))
    )
    image = dict(boxes=boxes, scores=scores, lesions=[dict(bbox=b) for b in lesions])
    verdicts, hit_by = match(image, 0.5, offset)
    curve = froc([np.column_stack([np.reshape(boxes, (-1, 4)), scores])], [lesions], 0.5, offset)
    order = np.argsort(-np.array(scores), kind="stable")
    false_positive = np.array([v == "false positive" for v in verdicts], bool)
    np.testing.assert_array_equal(false_positive[order], curve.false_positives)
    place = {int(i): rank for rank, i in enumerate(order)}
    ranks = [len(boxes) if i is None else place[i] for i in hit_by]
    np.testing.assert_array_equal(ranks, curve.hit_at)
    assert [v == "hit" for v in verdicts] == [i in hit_by for i in range(len(boxes))]


def test_of_many_equal_scores_the_first_row_hits():
    image = dict(boxes=[LESION] * 200, scores=[0.5, 0.6] * 100, lesions=[dict(bbox=LESION)])
    verdicts, hit_by = match(image)
    assert hit_by == [1] and verdicts == ["repeat", "hit"] + ["repeat"] * 198


def test_match_of_an_image_without_lesions():
    image = dict(boxes=[[0, 0, 5, 5]], scores=[0.5], lesions=[])
    assert match(image) == (["false positive"], [])


def lesion(diameter, kind=5):
    return dict(diameters_mm=None if diameter is None else [diameter, 1.0], lesion_type=kind)


def synthetic_run(name="a", seed=0, skill=1.0, images=60):
    """Images of 15 patients with one or two lesions each, of every kind; the lesions do not depend
    on the seed."""
    truth, rng = np.random.default_rng(7), np.random.default_rng(seed)
    records = []
    for i in range(images):
        lesions, boxes, scores = [], [], []
        for j in range(1 + (i % 4 == 0)):
            bbox = [20.0 + 100 * j, 20.0, 60.0 + 100 * j, 60.0]
            kind = lesion(float(truth.choice([5, 10, 20, 30, 50])), int(truth.integers(1, 9)))
            lesions.append(dict(bbox=bbox, mask=None, recist=None, **kind))
            if rng.uniform() < 0.8:
                boxes.append([v + 1 for v in bbox])
                scores.append(float(rng.normal(skill, 1)))
        for j in range(4):
            boxes.append([300.0 + 30 * j, 300.0, 320.0 + 30 * j, 320.0])
            scores.append(float(rng.normal(0, 1)))
        records.append(
            dict(
                file_name=f"{i:06d}_01_01/001.png",
                patient=i % 15,
                height=512,
                width=512,
                spacing_mm=0.8,
                thickness_mm=1.0 if i % 2 else 5.0,
                ward="east" if i % 3 else "west",
                lesions=lesions,
                boxes=boxes,
                scores=scores,
            )
        )
    return Result(name, records)


def test_lesions_are_grouped_by_type_and_long_diameter():
    diameters = [9.99, 10, 10.01, 29.99, 30, 30.01, None]
    image = record(1.0, False)
    image["lesions"] = [
        dict(bbox=[0, 0, 1, 1], **lesion(d, kind))
        for d, kind in zip(diameters, [1, 1, 2, 8, -1, -1, -1])
    ]
    result = Result("a", [image])
    sizes = {name: curve.num_lesions for name, curve in by_diameter(result).items()}
    assert sizes == {"< 10 mm": 1, "10-30 mm": 4, "> 30 mm": 1, "unknown": 1}
    types = {
        name: curve.num_lesions for name, curve in by_type(result).items() if curve.num_lesions
    }
    assert types == {"bone": 2, "abdomen": 1, "pelvis": 1, "unknown": 3}
    del image["lesions"][0]["lesion_type"], image["lesions"][0]["diameters_mm"]
    assert by_type(result)["unknown"].num_lesions == by_diameter(result)["unknown"].num_lesions + 2


def test_breakdowns_by_the_image_take_its_own_false_positives_those_by_the_lesion_all():
    """One image finds its lesion below two false positives, the other finds its own at once."""
    records = [record(1.0, True, "a/1.png", false_positives=2), record(5.0, True, "b/1.png")]
    for image, kind, where in zip(records, (1, 2), ("east", "west")):
        image["lesions"][0].update(lesion(20.0, kind))
        image["ward"] = where
    result = Result("a", records)
    of = {
        name: curve.sensitivity_at((0.5, 1, 2)).tolist()
        for groups in (by_thickness(result), by_column(result, "ward"), by_type(result))
        for name, curve in groups.items()
        if curve.num_lesions
    }
    assert of["thin"] == of["east"] == [0, 0, 1]
    assert of["thick"] == of["west"] == [1, 1, 1]
    # Two false positives, on two images: one an image.
    assert of["bone"] == of["abdomen"] == [0, 1, 1]


def test_an_evaluation_is_json_and_holds_every_table():
    evaluation = evaluate(synthetic_run(), by=["ward"], resamples=100)
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation
    settings = dict(iou_threshold=0.5, pixel_offset=1, resamples=100, seed=0, resampled="patients")
    assert evaluation["settings"] == settings
    assert evaluation["by_lesion"] == ["lesion type", "lesion diameter"]
    assert [row["group"] for row in evaluation["froc"]] == ["all", "thin", "thick"]
    assert list(evaluation["breakdowns"]) == ["lesion type", "lesion diameter", "ward"]
    assert [row["group"] for row in evaluation["breakdowns"]["ward"]] == ["east", "west"]
    assert evaluation["ap50"]["bbox"] > 0 and evaluation["ap50"]["segm"] is None
    assert evaluation["diameters"] is None
    plain = froc_table(synthetic_run().records)
    assert [
        {k: v for k, v in row.items() if k != "interval"} for row in evaluation["froc"]
    ] == plain
    for row in evaluation["froc"]:
        for key, value in {**row["sensitivity"], "average": row["average"]}.items():
            low, high = row["interval"][key]
            assert low <= value <= high


def test_an_evaluation_is_by_the_rule_and_the_seed_that_it_names():
    """Detections that overlap with their lesion by 0.43 hit it at 0.3, not at 0.5."""
    records = synthetic_run().records
    for image in records[::3]:
        image["boxes"] = [[x1 + 16, y1 - 1, x2 + 16, y2 - 1] for x1, y1, x2, y2 in image["boxes"]]
    for image in records:
        masks = np.zeros((len(image["boxes"]), 512, 512), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, np.array(image["boxes"], int)):
            mask[y1:y2, x1:x2] = True
        image["masks"] = [encode_mask(mask) for mask in masks]
    result = Result("a", records, iou_threshold=0.3, pixel_offset=0)
    found = evaluate(result, by=["ward"], resamples=100, seed=1)
    assert found["settings"] == dict(
        iou_threshold=0.3, pixel_offset=0, resamples=100, seed=1, resampled="patients"
    )
    assert found["froc"] == table(result, by_thickness(result), 100, 1)
    assert found["breakdowns"] == {
        "lesion type": table(result, by_type(result), 100, 1),
        "lesion diameter": table(result, by_diameter(result), 100, 1),
        "ward": table(result, by_column(result, "ward"), 100, 1),
    }
    assert found["diameters"] == diameter_errors(records, 0.3, 0, 100, 1)
    stricter = evaluate(replace(result, iou_threshold=0.5), ["ward"], resamples=100, seed=1)
    redrawn = evaluate(result, ["ward"], resamples=100, seed=0)
    for part in ("froc", "breakdowns", "diameters"):
        assert found[part] != stricter[part] and found[part] != redrawn[part], part


def test_intervals_are_the_quantiles_of_the_drawn_averages_and_differences():
    result = synthetic_run()
    curve = by_thickness(result)["thin"]
    (row,) = table(result, {"thin": curve}, resamples=200, seed=4)
    drawn, overall = (
        c.bootstrap(result.patients, TABLE_FPS, 200, 4) for c in (curve, result.curve)
    )
    averages = 100 * drawn[:, AVERAGED].mean(axis=1)
    differences = averages - 100 * overall[:, AVERAGED].mean(axis=1)
    for key, values in (
        ("average", averages),
        ("difference", differences),
        ("2", 100 * drawn[:, 2]),
    ):
        np.testing.assert_allclose(row["interval"][key], np.quantile(values, (0.025, 0.975)))


def test_a_group_that_some_draws_miss_still_has_an_interval():
    result = synthetic_run()
    rare = np.zeros(len(result.curve.hit_at), bool)
    rare[[0, 2]] = True  # of two patients of 15
    (row,) = table(result, {"rare": result.curve.of_lesions(rare)}, resamples=100)
    assert row["lesions"] == 2 and np.isfinite(list(row["interval"].values())).all()


def test_band_is_of_the_patients_not_the_images():
    """Patients that are all hit or all missed: their number counts, not that of their images."""
    records = [record(1.0, hit=i < 10, name=f"{i}/1.png") for i in range(20)]
    few = Result(
        "a", [{**r, "patient": i % 2 if i < 10 else 2 + i % 2} for i, r in enumerate(records)]
    )
    many = Result("b", [{**r, "patient": i} for i, r in enumerate(records)])
    widths = [np.diff(band(r.curve, r.patients, (1,), 2000), axis=0).item() for r in (few, many)]
    assert widths[0] == pytest.approx(1)  # of four patients one draw in 16 is all of one kind
    assert widths[1] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 20), abs=0.07)
    assert band(few.curve, few.patients, (0.5, 1, 2), 100, 3).shape == (2, 3)


def test_a_run_does_not_differ_from_itself():
    result = synthetic_run()
    for row in compare(result, replace(result, name="b"), resamples=100)["rows"]:
        assert all(row[key] == [0, 0, 0, 1] for key in ("0.5", "16", "average"))


def test_difference_is_that_of_the_tables_and_turns_with_the_runs():
    first, second = synthetic_run(), synthetic_run("b", seed=1, skill=2.0)
    forth, back = compare(first, second), compare(second, first)
    assert (forth["first"], forth["second"]) == ("a", "b")
    tables = [froc_table(result.records) for result in (first, second)]
    for row, turned, a, b in zip(forth["rows"], back["rows"], *tables):
        assert row["group"] == turned["group"] == a["group"]
        value, low, high, p = row["average"]
        assert value == pytest.approx(b["average"] - a["average"])
        np.testing.assert_allclose(turned["average"], [-value, -high, -low, p])
    value, low, high, p = forth["rows"][0]["average"]
    assert 0 < low < value < high and p == 2 / 1001


def test_p_value_counts_the_draws_on_the_rarer_side():
    first, second = synthetic_run(), synthetic_run("b", seed=1)
    (row, *_) = compare(first, second, resamples=200, seed=2)["rows"]
    a, b = (
        result.curve.bootstrap(first.patients, (1,), 200, 2)[:, 0] for result in (first, second)
    )
    rarer = min((b <= a).sum(), (b >= a).sum())
    _, low, high, p = row["1"]
    assert p == pytest.approx(min(1, 2 * (rarer + 1) / 201)) and 0.02 < p < 1
    np.testing.assert_allclose([low, high], 100 * np.quantile(b - a, (0.025, 0.975)))


def test_pairing_takes_out_what_both_runs_share():
    """The second result loses one lesion in twenty: paired, the interval is narrower."""
    first = synthetic_run(images=120)
    records = [dict(r) for r in first.records]
    for image in records[::20]:
        image["scores"] = [-9.0] * len(image["scores"])
    second = Result("b", records)
    _, low, high, _ = compare(first, second)["rows"][0]["1"]
    intervals = [table(r, {"all": r.curve}, 1000)[0]["interval"]["1"] for r in (first, second)]
    assert high - low < 0.6 * min(b - a for a, b in intervals)


def test_records_in_another_order_compare_alike():
    first, second = synthetic_run(), synthetic_run("b", seed=1)
    shuffled = Result("b", second.records[::-1])
    assert compare(first, shuffled, 100) == compare(first, second, 100)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rs: rs[2:], "a and b cannot.*b lacks 000000_01_01/001.png, 000001_01_01/001.png"),
        (lambda rs: [*rs, {**rs[0], "file_name": "new/1.png"}], "a lacks new/1.png"),
        (lambda rs: rs[:1] * 2 + rs[1:], "b holds images more than once: 000000_01_01/001.png"),
        (lambda rs: [{**rs[0], "lesions": []}, *rs[1:]], "ground truth differs in 000000_01_01/0"),
    ],
)
def test_runs_on_other_images_are_not_compared(change, message):
    result = synthetic_run()
    with pytest.raises(ValueError, match=message):
        compare(result, Result("b", change(result.records)), resamples=100)


@pytest.mark.parametrize("key", ["thickness_mm", "patient"])
def test_what_an_image_is_is_said_by_the_first_run(key):
    """A second annotation file may lack thickness or patient, or give other ones: the difference
    is still that of the same images, drawn alike."""
    first, second = synthetic_run(), synthetic_run("b", seed=1)
    unknown = dict(thickness_mm=math.nan, patient=None)[key]
    for other in (unknown, 7.0):
        changed = Result("b", [r | {key: other} for r in second.records])
        assert compare(first, changed, 100) == compare(first, second, 100)


def test_many_missing_images_are_counted():
    result = synthetic_run()
    with pytest.raises(ValueError, match=r"001\.png and 45 more"):
        compare(result, Result("b", result.records[50:]), resamples=100)


@pytest.mark.parametrize("call", [evaluate, lambda r, **o: compare(r, r, **o)])
def test_too_few_resamples_are_refused(call):
    with pytest.raises(ValueError, match="at least 100"):
        call(synthetic_run(), resamples=99)


# Where there is little to evaluate


def healthy(result):
    """The same detections on patients without lesions."""
    return replace(result, records=[{**r, "lesions": []} for r in result.records])


def test_without_lesions_false_positives_are_what_there_is():
    result = healthy(synthetic_run())
    evaluation = evaluate(result, by=["ward"], resamples=100)
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation
    scores = np.concatenate([r["scores"] for r in result.records])
    rows = {row["group"]: row for row in evaluation["froc"]}
    assert list(rows) == ["all", "thin", "thick"] and list(evaluation["breakdowns"]) == ["ward"]
    for score, count in rows["all"]["false_positives"].items():
        assert count == pytest.approx((scores >= float(score)).sum() / len(result.records))
    assert rows["all"]["average"] is None and rows["all"]["lesions"] == 0
    assert evaluation["ap50"] == {"bbox": None, "segm": None}
    tables = all_tables([evaluation], [compare(result, result)])
    text = "\n".join(map(to_text, tables))
    assert "no lesions, hence no sensitivity" in text and "score 0.05 score 0.1" in text
    # In the CSV nothing reads as a sensitivity.
    numbers = list(csv.DictReader(io.StringIO(to_csv(tables))))
    assert {row["table"] for row in numbers} == {"slices, false positives", "ward, false positives"}
    assert not {row["measure"] for row in numbers} & set(POINTS)
    assert "no lesions" in format_table(froc_table(result.records))


def test_the_report_of_healthy_patients(tmp_path):
    results = [healthy(synthetic_run())]
    evaluations = [evaluate(results[0], resamples=100)]
    for name in ("froc.png", "groups.svg", "mine.png"):  # of an earlier evaluation, and the user's
        (tmp_path / name).touch()
    assert write_figures(results, tmp_path, 100) == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
    page = write_report(results, evaluations, tmp_path).read_text()
    assert "There are no lesions in these images" in page and "nan" not in page.lower()


def one_patient(result):
    return replace(result, records=[{**r, "patient": 1} for r in result.records])


def test_one_patient_has_no_interval(tmp_path):
    """All resamples are equal: the interval had no width, and the p-value said what it liked."""
    first, second = one_patient(synthetic_run()), one_patient(synthetic_run("b", 1, 0.5))
    evaluations = [evaluate(result, resamples=100) for result in (first, second)]
    rows = [r for e in evaluations for rows in (e["froc"], *e["breakdowns"].values()) for r in rows]
    assert rows and not any("interval" in row for row in rows)
    comparison = compare(first, second, resamples=100)
    assert comparison["rows"][0]["average"][0] < 0
    assert all(row["average"][1:] == [None, None, None] for row in comparison["rows"])
    text = "\n".join(map(to_text, all_tables(evaluations, [comparison])))
    assert "[" not in text.replace("Avg.[0.5,1,2,4]", "")
    assert len(write_figures([first, second], tmp_path, 100)) == 4
    assert "nan" not in write_report([first, second], evaluations, tmp_path).read_text().lower()


def test_groups_of_one_patient_have_no_interval():
    result = synthetic_run()
    alone = result.patients[result.curve.lesion_images] == 3
    (row,) = table(result, {"alone": result.curve.of_lesions(alone)}, resamples=100)
    assert row["lesions"] == alone.sum() > 1 and "interval" not in row


def test_unknown_patients_are_drawn_image_by_image():
    result = synthetic_run()
    unknown = replace(result, records=[{**r, "patient": None} for r in result.records])
    single = replace(result, records=[{**r, "patient": i} for i, r in enumerate(result.records)])
    a, b = evaluate(unknown, resamples=200), evaluate(single, resamples=200)
    width = [np.ptp(e["froc"][0]["interval"]["average"]) for e in (a, b)]
    assert width[0] == pytest.approx(width[1], rel=0.2)
    assert a["settings"]["resampled"] == "images, as patients are unknown"
    assert "bootstrap over images, as patients are unknown" in to_text(all_tables([a])[0])
    half = [{**r, "patient": None if i < 20 else 1} for i, r in enumerate(result.records)]
    assert resampled(replace(result, records=half)) == (
        "patients, 20 images of unknown ones each as one"
    )


def test_a_part_of_the_key_slices_is_said_to_be_one(tmp_path):
    result = replace(synthetic_run(), table_key_slices=4817)
    evaluation = evaluate(result, resamples=100)
    note = "PARTIAL DATA: 60 of 4,817 key slices"
    assert (evaluation["key_slices"], evaluation["table_key_slices"]) == (60, 4817)
    tables = all_tables([evaluation])
    for text in (to_text(tables[0]), to_markdown(tables[0]), to_latex(tables[0]), to_csv(tables)):
        assert note in text
    line = partial_data([result, result])
    assert line == f"{note}. This does not compare with published results."
    files = as_files(tables, line)
    assert files["md"].startswith(line) and f"\n% {line}\n" in files["tex"]
    assert f"<strong>{line}</strong>" in write_report([result], [evaluation], tmp_path).read_text()
    rows = froc_table(result.records)
    write_table(tmp_path / "x.froc.json", rows, result)
    content = json.loads((tmp_path / "x.froc.json").read_text())
    assert (content["key_slices"], content["table_key_slices"]) == (60, 4817)
    whole = replace(result, table_key_slices=60)
    assert "PARTIAL" not in to_text(all_tables([evaluate(whole, resamples=100)])[0])
    assert partial_data([whole]) == ""
