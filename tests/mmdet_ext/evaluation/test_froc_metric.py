"""FROCMetric, fed by samples as the detector returns them."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.data.coco import encode_mask
from deeplesion.evaluation.evaluate import froc_table
from deeplesion.evaluation.results import read_results
from mmdet_ext.evaluation.froc_metric import FROCMetric


def sample(box, boxes, scores, thickness=1.0, name="a/001.png", masks=None):
    """As mmengine's evaluator hands it over: `box` in file, `boxes` in mmdet coordinates."""
    found = InstanceData(bboxes=torch.tensor(boxes).reshape(-1, 4), scores=torch.tensor(scores))
    if masks is not None:
        found.masks = masks
    lesion_mask = np.zeros((64, 80), bool)
    x1, y1, x2, y2 = (int(v) for v in box)
    lesion_mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return dict(
        pred_instances=found,
        file_name=name,
        patient=1,
        study=3,
        series=2,
        slice_range=(1, 9),
        ori_shape=(64, 80),
        spacing_mm=0.8,
        file_thickness_mm=thickness,
        lesions=[
            dict(
                bbox=list(box),
                mask=encode_mask(lesion_mask),
                recist=[x1, y1, x2, y2, x1, y2, x2, y1],
                diameters_mm=[20.0, 10.0],
                lesion_type=1,
            )
        ],
    )


def shifted(box):
    return [v + PIXEL_CENTRE for v in box]


def test_predictions_lose_the_half_pixel_that_annotations_got():
    metric = FROCMetric()
    box = [10.0, 12.0, 30.0, 33.0]
    metric.process({}, [sample(box, [shifted(box)], [0.9])])
    assert metric.results[0]["boxes"] == [box]
    assert metric.results[0]["lesions"][0]["bbox"] == box


def test_a_record_says_what_the_image_is():
    metric = FROCMetric()
    metric.process({}, [sample([10.0, 12, 30, 33], [], [], thickness=2.5, name="b/007.png")])
    (record,) = metric.results
    of_image = (
        "file_name", "patient", "study", "series", "slice_range", "height", "width",
        "spacing_mm", "thickness_mm",
    )  # fmt: skip
    assert [record[key] for key in of_image] == ["b/007.png", 1, 3, 2, [1, 9], 64, 80, 0.8, 2.5]


def test_scores_keep_their_order_and_boxes_three_digits(tmp_path):
    """Failed before: scores of six digits are ties, and a box was of 30.100000381469727."""
    metric = FROCMetric(result_file=str(tmp_path / "results.json.gz"))
    high = torch.tensor(0.9999999)
    scores = [float(high), float(torch.nextafter(high, torch.tensor(0.0)))]
    box, elsewhere = [10.0, 10.0, 30.1, 30.1], [40.0, 40.0, 60.0, 60.0]
    metric.process({}, [sample(box, [shifted(box), elsewhere], scores)])
    assert metric.evaluate(size=1)["FROC/S@0.5"] == 100
    (record,) = read_results(tmp_path / "results.json.gz").records
    assert record["scores"] == scores and record["boxes"][0] == box


def test_numbers_of_a_case_worked_out_by_hand():
    """Two thin images hit without a false positive, one thick image missed with one above."""
    metric = FROCMetric()
    box, elsewhere = [10.0, 10.0, 30.0, 30.0], [40.0, 40.0, 60.0, 60.0]
    metric.process(
        {},
        [
            sample(box, [shifted(box)], [0.9], 1.0),
            sample(box, [shifted(box)], [0.8], 2.0),
            sample(box, [elsewhere], [0.95], 5.0),
        ],
    )
    numbers = metric.evaluate(size=3)
    assert numbers["FROC/S@0.5"] == pytest.approx(200 / 3)
    assert numbers["FROC/average"] == pytest.approx(200 / 3)
    assert numbers["FROC/thin_average"] == pytest.approx(100)
    assert numbers["FROC/thick_average"] == 0


def test_result_file_gives_the_same_table_again(tmp_path):
    metric = FROCMetric(result_file=str(tmp_path / "results.json.gz"))
    box = [10.0, 10.0, 30.0, 30.0]
    masks = torch.zeros(1, 64, 80, dtype=torch.bool)
    masks[0, 10:31, 10:31] = True
    metric.process({}, [sample(box, [shifted(box)], [0.9], masks=masks)])
    numbers = metric.evaluate(size=1)
    records = read_results(tmp_path / "results.json.gz").records
    assert froc_table(records)[0]["average"] == numbers["FROC/average"] == 100
    np.testing.assert_array_equal(coco_mask.decode(records[0]["masks"][0]), masks[0].numpy())
    assert (tmp_path / "results.froc.json").exists()


def test_no_detections_at_all():
    metric = FROCMetric()
    metric.process({}, [sample([10.0, 10, 30, 30], [], [])])
    assert metric.evaluate(size=1)["FROC/average"] == 0


def healthy(**options):
    return {**sample([10.0, 10, 30, 30], [[1.0, 1, 9, 9]], [0.6], **options), "lesions": []}


def test_without_lesions_false_positives_are_reported(tmp_path):
    metric = FROCMetric(result_file=str(tmp_path / "results.json.gz"))
    metric.process({}, [healthy(name=f"a/00{i}.png") for i in range(2)])
    numbers = metric.evaluate(size=2)
    assert np.isnan(numbers["FROC/average"])
    assert numbers["FROC/false_positives_of_score_0.5"] == 1
    assert numbers["FROC/false_positives_of_score_0.7"] == 0
    assert len(read_results(tmp_path / "results.json.gz").records) == 2
    assert (tmp_path / "results.froc.json").exists()


def test_results_are_on_disk_before_they_are_scored(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a mistake in scoring")

    monkeypatch.setattr("mmdet_ext.evaluation.froc_metric.froc_table", fail)
    metric = FROCMetric(result_file=str(tmp_path / "results.json.gz"))
    box = [10.0, 10.0, 30.0, 30.0]
    metric.process({}, [sample(box, [shifted(box)], [0.9])])
    with pytest.raises(RuntimeError, match="a mistake in scoring"):
        metric.evaluate(size=1)
    (record,) = read_results(tmp_path / "results.json.gz").records
    assert record["scores"] == pytest.approx([0.9])


def test_a_part_of_the_key_slices_is_said_to_be_one(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(
        "mmdet_ext.evaluation.froc_metric.print_log", lambda text, **_: printed.append(text)
    )
    metric = FROCMetric(result_file=str(tmp_path / "results.json.gz"))
    metric.dataset_meta = dict(table_key_slices=4817)
    box = [10.0, 10.0, 30.0, 30.0]
    metric.process({}, [sample(box, [shifted(box)], [0.9])])
    metric.evaluate(size=1)
    assert "PARTIAL DATA: 1 of 4,817 key slices" in printed[0]
    assert read_results(tmp_path / "results.json.gz").table_key_slices == 4817


def test_images_of_others_know_less(tmp_path):
    unknown = dict(patient=None, study=None, series=None, slice_range=None, spacing_mm=None)
    metric = FROCMetric(result_file=str(tmp_path / "results.json.gz"))
    box = [10.0, 10.0, 30.0, 30.0]
    image = {**sample(box, [shifted(box)], [0.9]), **unknown, "file_thickness_mm": float("nan")}
    image["lesions"][0].update(mask=None, recist=None, diameters_mm=None, lesion_idx=None)
    metric.process({}, [image])
    assert metric.evaluate(size=1)["FROC/average"] == 100
    (record,) = read_results(tmp_path / "results.json.gz").records
    assert record["patient"] is record["slice_range"] is record["spacing_mm"] is None
