"""Errors of predicted diameters, on boxes and rectangles worked out by hand and by plain loops."""

import numpy as np
import pytest

from deeplesion.data.coco import encode_mask
from deeplesion.data.recist import recist_from_mask
from deeplesion.evaluation.diameters import diameter_errors, diameters_of_mask

SPACING = 0.5
SIZE = 64


def drawn(x, y, width, height):
    """Mask of a rectangle with its box: x, y its first pixel."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[y : y + height, x : x + width] = True
    return [float(x), float(y), float(x + width - 1), float(y + height - 1)], encode_mask(mask)


def lengths_mm(mask):
    return diameters_of_mask(mask, SPACING).lengths_mm


def record(patient, annotated_mm, found, lesion=(10, 10, 20, 12), masks=True):
    """One lesion with these annotated diameters, and detections (rectangle, score)."""
    boxes, rles = zip(*(drawn(*rectangle) for rectangle, _ in found)) if found else ((), ())
    fields = dict(
        file_name="a/001.png",
        patient=patient,
        height=SIZE,
        width=SIZE,
        spacing_mm=SPACING,
        thickness_mm=1.0,
        lesions=[dict(bbox=drawn(*lesion)[0], mask=None, recist=None, diameters_mm=annotated_mm)],
        boxes=list(boxes),
        scores=[score for _, score in found],
    )
    return fields | {"masks": list(rles)} if masks else fields


def test_the_detection_that_hits_first_is_measured():
    first, second = (10, 10, 19, 12), (10, 10, 20, 12)
    elsewhere = (40, 40, 20, 12)
    records = [record(1, [9.0, 6.0], [(second, 0.4), (elsewhere, 0.9), (first, 0.8)])]
    errors = diameter_errors(records)
    expected = lengths_mm(drawn(*first)[1]) - (9, 6)
    assert errors["n"] == 1
    assert errors["long"]["mean"] == pytest.approx(expected[0])
    assert errors["short"]["median"] == pytest.approx(expected[1])
    assert errors["long"]["limits"] == pytest.approx([expected[0]] * 2)


def test_statistics_equal_plain_loops():
    rng = np.random.default_rng(0)
    records, errors, patients = [], [], []
    for i in range(40):
        rectangle = (10, 10, *(int(v) for v in rng.integers((17, 10), (23, 14))))
        annotated = sorted(rng.uniform(4, 14, 2).tolist(), reverse=True)
        records.append(record(i // 3, annotated, [(rectangle, 0.7)]))
        errors.append(lengths_mm(drawn(*rectangle)[1]) - annotated)
        patients.append(i // 3)
    result = diameter_errors(records, resamples=4000)
    errors, patients = np.array(errors), np.array(patients)
    assert result["n"] == 40
    generator = np.random.default_rng(1)
    for axis, values in zip(("long", "short"), errors.T, strict=True):
        assert result[axis]["mean"] == pytest.approx(np.mean(values))
        assert result[axis]["median"] == pytest.approx(np.median(values))
        assert result[axis]["mean_absolute"] == pytest.approx(np.mean(np.abs(values)))
        deviation = np.sqrt(sum((v - np.mean(values)) ** 2 for v in values) / 39)
        low, high = np.mean(values) - 1.96 * deviation, np.mean(values) + 1.96 * deviation
        assert result[axis]["limits"] == pytest.approx([low, high])
        means = []
        for _ in range(4000):
            drawn_patients = generator.choice(14, 14)
            means.append(np.mean(np.concatenate([values[patients == p] for p in drawn_patients])))
        # Two bootstraps of 4,000: alike to a few per cent of the interval.
        expected = np.quantile(means, (0.025, 0.975))
        width = expected[1] - expected[0]
        np.testing.assert_allclose(result[axis]["interval"], expected, atol=0.08 * width)


def test_same_seed_same_interval():
    annotated = np.random.default_rng(0).uniform(4, 14, (30, 2)).tolist()
    records = [record(p, mm, [((10, 10, 20, 12), 0.9)]) for p, mm in enumerate(annotated)]
    assert diameter_errors(records, seed=3) == diameter_errors(records, seed=3)
    assert diameter_errors(records, seed=3) != diameter_errors(records, seed=4)


def test_none_where_nothing_can_be_measured():
    hit, miss = [((10, 10, 20, 12), 0.9)], [((40, 40, 20, 12), 0.9)]
    assert diameter_errors([record(1, [9.0, 6.0], hit, masks=False)]) is None
    assert diameter_errors([record(1, None, hit)]) is None
    assert diameter_errors([record(1, [9.0, 6.0], miss)]) is None
    assert diameter_errors([record(1, [9.0, 6.0], [])]) is None
    assert diameter_errors([]) is None
    empty = record(1, [9.0, 6.0], hit)
    empty["masks"] = [encode_mask(np.zeros((SIZE, SIZE)))]
    assert diameter_errors([empty]) is None


def test_diameters_are_recist_of_the_decoded_mask():
    _, rle = drawn(5, 7, 30, 9)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[7:16, 5:35] = True
    np.testing.assert_array_equal(
        diameters_of_mask(rle, SPACING).recist, recist_from_mask(mask, SPACING).recist
    )
    assert diameters_of_mask(encode_mask(np.zeros((SIZE, SIZE))), SPACING) is None
