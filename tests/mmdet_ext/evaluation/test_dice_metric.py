"""DiceMetric against stacking by hand: slices to cases, lesions within livers, the files' grid."""

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch

from ct_volumes import dice
from ct_volumes.lits import find_cases, read_case, resample
from deeplesion.errors import DataError, MissingDataError
from mmdet_ext.evaluation.dice_metric import DiceMetric, dice_table

STEP = 1.5


@pytest.fixture(scope="module")
def cases(phantom_lits):
    return {n: read_case(f) for n, f in find_cases(phantom_lits / "files").cases.items()}


@pytest.fixture
def metric(phantom_lits):
    def build(**options):
        found = DiceMetric(**options)
        found.dataset_meta = {"lits": dict(folder=str(phantom_lits / "files"), step_mm=STEP)}
        return found

    return build


def predicted(case, seed=0):
    """Of each slice masks, labels and scores: true regions shifted, halves, and noise outside."""
    rng = np.random.default_rng(seed)
    for labels in resample(case, STEP).labels:
        liver, lesion = labels >= 1, labels == 2
        far = np.zeros_like(liver)
        far[:8, :8] = rng.random() < 0.3
        masks = [np.roll(liver, 2, 0), np.roll(liver, -3, 1), lesion, np.roll(lesion, 2, 1), far]
        scores = np.round(rng.random(5), 2)
        yield np.stack(masks), np.array([0, 0, 1, 1, 1]), scores


def samples(case, slices):
    for index, (masks, labels, scores) in enumerate(slices):
        found = dict(
            masks=torch.from_numpy(masks), labels=torch.from_numpy(labels),
            scores=torch.from_numpy(scores),
        )  # fmt: skip
        yield dict(
            patient=case.number, file_name=f"lits_{case.number:03d}/{index:03d}.png",
            slice_range=(0, len(resample(case, STEP).labels) - 1), pred_instances=found,
        )  # fmt: skip


def by_hand(case, slices, liver_score, lesion_score):
    """Labels on the grid of the files, one voxel class after the other."""
    resampled = resample(case, STEP)
    stack = np.zeros_like(resampled.labels)
    for index, (masks, labels, scores) in enumerate(slices):
        liver, lesion = np.zeros((2, *stack.shape[1:]), bool)
        for mask, label, score in zip(masks, labels, scores):
            if label == 0 and score >= liver_score:
                liver |= mask
            if label == 1 and score >= lesion_score:
                lesion |= mask
        stack[index][liver] = 1
        stack[index][liver & lesion] = 2
    places, wanted = resampled.volume.positions_mm, case.volume.positions_mm
    nearest = [int(np.argmin(np.abs(places - place))) for place in wanted]
    return stack[nearest]


def test_figures_are_those_of_cases_stacked_by_hand(metric, cases, tmp_path):
    scores = (0.5, 0.2)
    found = metric(
        liver_score=0.4, lesion_scores=scores, result_file=str(tmp_path / "dice.json"),
        segmentations=str(tmp_path / "segmentations"),
    )  # fmt: skip
    made = {number: list(predicted(case, number)) for number, case in cases.items()}
    records = [s for n, case in cases.items() for s in samples(case, made[n])]
    found.process({}, records[::-1])  # the order of slices does not matter
    figures = found.compute_metrics(found.results)
    content = json.loads((tmp_path / "dice.json").read_text())
    assert [part["lesion_score"] for part in content["scores"]] == [0.5, 0.2]
    for part, least in zip(content["scores"], scores):
        labels = {n: by_hand(case, made[n], 0.4, least) for n, case in cases.items()}
        expected = [
            dice.score_case(labels[n], case.labels, case.volume.spacing_mm)
            for n, case in cases.items()
        ]
        # Case 0 alone states its geometry, so it alone has size classes.
        sized = dice.summarise(expected[:1])
        for name, value in dice.summarise(expected).items():
            value = sized[name] if name.endswith(("small", "medium", "large")) else value
            value *= 100 if "dice" in name else 1
            ours = part["figures"][name]
            assert (ours is None and math.isnan(value)) or ours == pytest.approx(value), name
        for number, score in zip(cases, expected):
            assert part["cases"][str(number)]["lesion"] == pytest.approx(score.lesion)
        if least == scores[0]:
            assert 0 < figures["lesion_dice_per_case"] < 100
            assert 0 < figures["liver_dice_per_case"] < 100
            for number, case in cases.items():
                image = nib.load(tmp_path / f"segmentations/prediction-{number}.nii")
                own = nib.load(find_cases_path(case))
                np.testing.assert_allclose(image.affine, own.affine, atol=1e-5)
                mine = case.volume.in_source(labels[number])
                np.testing.assert_array_equal(np.asarray(image.dataobj), mine)
    name = "lesion_dice_per_case_of_score_0.2"
    assert figures[name] == content["scores"][1]["figures"]["lesion_dice_per_case"]
    table = dice_table(content).splitlines()
    assert len(table) == 4 and table[2].split()[0] == "0.5"
    assert float(table[2].split()[1]) == pytest.approx(figures["lesion_dice_per_case"], abs=0.05)


def find_cases_path(case):
    return case.volume.source.path


def test_true_masks_lose_only_what_the_distance_of_slices_takes(metric, cases):
    found = metric()
    for case in cases.values():
        truth = resample(case, STEP).labels
        slices = [(np.stack([x >= 1, x == 2]), np.array([0, 1]), np.ones(2)) for x in truth]
        found.process({}, list(samples(case, slices)))
    figures = found.compute_metrics(found.results)
    # Slices of 6 mm and more, and of case 28 and 29, whose distance is taken as 1 mm, two thirds.
    assert figures["liver_dice_per_case"] > 97
    assert figures["lesion_precision"] > 0.7


def test_nothing_found_is_no_liver_and_no_lesion(metric, cases):
    found, case = metric(), cases[29]
    nothing = np.zeros((0, 128, 128), bool), np.zeros(0, int), np.zeros(0)
    found.process({}, list(samples(case, [nothing] * len(resample(case, STEP).labels))))
    figures = found.compute_metrics(found.results)
    assert figures["liver_dice_per_case"] == figures["lesion_dice_per_case"] == 0
    assert math.isnan(figures["lesion_precision"])


def test_cases_that_are_not_whole_or_not_there_are_refused(metric, cases, tmp_path):
    found, case = metric(), cases[29]
    records = list(samples(case, predicted(case)))
    found.process({}, records[:-1])
    with pytest.raises(DataError, match=f"of case 29 {len(records) - 1} of {len(records)} slices"):
        found.compute_metrics(found.results)
    found = metric()
    found.process({}, [{**record, "patient": 7} for record in records])
    with pytest.raises(MissingDataError, match="no files of case 7"):
        found.compute_metrics(found.results)
    with pytest.raises(ValueError, match="lesion_scores is empty"):
        DiceMetric(lesion_scores=())
