"""VolumeDiceMetric: the scores of ct_volumes.dice, of every case once, on the files' own grid."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel", reason="needs nibabel, the extra [ct]")
import nibabel

from ct_volumes.dice import score_case, summarise
from ct_volumes.lits import find_cases, read_case
from deeplesion.errors import MissingDataError
from mmdet_ext.evaluation.dice_metric import dice_table
from mmdet_ext.evaluation.volume_dice_metric import VolumeDiceMetric


@pytest.fixture(scope="module")
def cases(phantom_lits):
    return {n: read_case(f) for n, f in find_cases(phantom_lits / "files").cases.items()}


def evaluate(phantom_lits, predictions, **options):
    metric = VolumeDiceMetric(**options)
    metric.dataset_meta = dict(lits=dict(folder=str(phantom_lits / "files")))
    for number, prediction in predictions:
        sample = dict(patient=number, prediction=torch.from_numpy(np.array(prediction)))
        metric.process({}, [sample])
    return metric.evaluate(len(predictions))


def test_truth_scores_100(phantom_lits, cases):
    figures = evaluate(phantom_lits, [(n, case.labels) for n, case in cases.items()])
    for name in ("liver_dice_per_case", "liver_dice_global", "lesion_dice_per_case"):
        assert figures[f"Dice/{name}"] == pytest.approx(100)
    assert figures["Dice/burden_rmse"] == 0


def test_figures_are_those_of_the_scorer_and_each_case_counts_once(
    phantom_lits, cases, tmp_path, capsys
):
    rng = np.random.default_rng(0)
    predictions, scores = [], []
    for number, case in cases.items():
        moved = np.roll(case.labels, (1, 4, 2), (0, 1, 2))
        prediction = np.where(rng.random(moved.shape) < 0.9, moved, 0).astype(np.uint8)
        predictions.append((number, prediction))
        score = score_case(prediction, case.labels, case.volume.spacing_mm)
        scores.append(score)
    path = tmp_path / "dice.json"
    options = dict(result_file=str(path), segmentations=str(tmp_path / "predicted"))
    figures = evaluate(phantom_lits, [*predictions, predictions[0]], **options)
    expected = summarise(scores)
    for name in ("lesion_dice_global", "lesion_dice_per_case", "liver_dice_global"):
        assert figures[f"Dice/{name}"] == pytest.approx(100 * expected[name])
        assert 0 < expected[name] < 1
    assert figures["Dice/lesion_recall"] == pytest.approx(expected["lesion_recall"], nan_ok=True)

    content = json.loads(path.read_text())
    assert content["scores"][0]["cases"].keys() == {"0", "28", "29"}
    # Without geometry lesions have no size.
    assert not any(content["scores"][0]["cases"][n]["lesions"] for n in ("28", "29"))
    assert content["scores"][0]["cases"]["0"]["liver"] == pytest.approx(scores[0].liver)
    row = dice_table(content).splitlines()[-1]
    assert f"{100 * expected['lesion_dice_per_case']:.1f}" in row and "score" not in row
    for number, prediction in predictions:
        image = nibabel.load(tmp_path / f"predicted/prediction-{number}.nii")
        source = cases[number].volume.in_source(prediction)
        np.testing.assert_array_equal(np.asarray(image.dataobj), source)


def test_files_that_are_gone_are_named(phantom_lits):
    with pytest.raises(MissingDataError, match="no files of case 5"):
        evaluate(phantom_lits, [(5, np.zeros((1, 1, 1), np.uint8))])
