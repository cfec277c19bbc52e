"""Whole phantom scans: the body lies as CTVolume says, and the truth is what was drawn."""

import numpy as np
import pytest
from skimage.draw import polygon2mask

from deeplesion.data.recist import recist_from_mask
from deeplesion.phantom import scans
from deeplesion.phantom.body import Body, sub_heights
from deeplesion.phantom.findings import ANGLES
from deeplesion.phantom.render import draw_spacing
from deeplesion.phantom.scans import FIRST_PATIENT, ScanPlan, draw_scan


@pytest.fixture(scope="module", params=[1, 2], ids=["thin", "thick"])
def drawn(request):
    """(scan, its body, the findings it was drawn with)."""
    findings, draw_findings = [], scans.draw_findings

    def noted(*arguments):
        found = draw_findings(*arguments)
        findings.extend(finding for finding, _, _ in found)
        return found

    plan = ScanPlan(request.param, 128, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "draw_findings", noted)
        scan = draw_scan(plan)
    rng = np.random.default_rng([3, FIRST_PATIENT + request.param, 0])
    return scan, Body(rng, 128, draw_spacing(rng, 128)), findings


def true_lesions(findings):
    return [finding for finding in findings if finding.is_lesion]


def test_shape_and_slices_by_number():
    assert [ScanPlan(n, 128, 0).thickness for n in (1, 2, 3)] == [1.0, 5.0, 1.0]
    assert ScanPlan(7, 128, 0).name == "phantom_007"


def test_the_body_runs_head_to_feet_and_left_and_posterior_are_last(drawn):
    scan, body, _ = drawn
    assert scan.hu.shape == scan.labels.shape == (600 / scan.scan.thickness, 128, 128)
    assert scan.hu.dtype == np.int16

    def median(x, y, z):
        column, row = body.centre + np.multiply((x, y), (body.half_width, body.half_height))
        k, row, column = round(z / scan.scan.thickness), round(row), round(column)
        return np.median(scan.hu[k, row - 1 : row + 2, column - 1 : column + 2])

    for side in (-1, 1):
        assert median(0.42 * side, 0.02, 150) < -600  # the lungs, near the head
    assert median(-0.36, -0.08, 320) > 40  # the liver, on the right, hence first columns
    assert median(0, -0.2, 575) == pytest.approx(8, abs=40)  # the bladder, near the feet
    for z in (50, 300, 590):
        assert median(0, 0.55, z) > 150  # the spine, posterior, hence last rows
        assert median(0, -1.15, z) < -900  # nothing but air in front


def test_boxes_are_around_the_voxels_and_margins_around_the_boxes(drawn):
    scan, _, findings = drawn
    assert len(scan.lesions) == len(true_lesions(findings)) >= 4
    assert len(scan.distractors) == len(findings) - len(scan.lesions) == len(scan.lesions)
    assert np.unique(scan.labels).tolist() == list(range(len(scan.lesions) + 1))
    for number, lesion in enumerate(scan.lesions, 1):
        assert lesion.number == number
        voxels = np.argwhere(scan.labels == number)[:, ::-1]
        assert lesion.tight_box.tolist() == [*voxels.min(0), *voxels.max(0)]
        x1, y1, z1, x2, y2, z2 = lesion.tight_box.tolist()
        expected = [max(x1 - 5, 0), max(y1 - 5, 0), z1, min(x2 + 5, 127), min(y2 + 5, 127), z2]
        assert lesion.box.tolist() == expected


def fine_shares(finding, box, fine=9):
    """Share of each voxel in (x1, y1, z1, x2, y2, z2) that the sharp star fills, by its outline
    drawn on a grid `fine` times as fine, section by section."""
    x1, y1, z1, x2, y2, z2 = box
    spacing, thickness = finding.scan.spacing, finding.scan.thickness
    shares = np.zeros((z2 - z1 + 1, y2 - y1 + 1, x2 - x1 + 1))
    rows, columns = shares.shape[1] * fine, shares.shape[2] * fine
    for k in range(z1, z2 + 1):
        for dz in sub_heights(thickness):
            height = k * thickness + dz - (finding.z - finding.offset)
            if abs(height) >= finding.half_depth:
                continue
            radius = finding.outline.radius * np.sqrt(1 - (height / finding.half_depth) ** 2)
            x = finding.centre[0] + radius * np.cos(ANGLES) / spacing - x1
            y = finding.centre[1] + radius * np.sin(ANGLES) / spacing - y1
            corners = (np.stack([y, x], axis=1) + 0.5) * fine - 0.5
            inside = polygon2mask((rows, columns), corners)
            cells = inside.reshape(shares.shape[1], fine, shares.shape[2], fine)
            shares[k - z1] += cells.mean(axis=(1, 3)) / len(sub_heights(thickness))
    return shares


def test_voxels_and_volume_are_those_of_the_drawn_shape(drawn):
    """The oracle knows no bone and no gas: lesions beside them are compared where they pass."""
    scan, body, findings = drawn
    compared = 0
    for lesion, finding in zip(scan.lesions, true_lesions(findings), strict=True):
        x1, y1, z1, x2, y2, z2 = lesion.tight_box.tolist()
        z1, z2 = max(z1 - 3, 0), min(z2 + 3, len(scan.hu) - 1)
        x1, y1, x2, y2 = max(x1 - 3, 0), max(y1 - 3, 0), min(x2 + 3, 127), min(y2 + 3, 127)
        shares = fine_shares(finding, (x1, y1, z1, x2, y2, z2))
        window = np.s_[y1 : y2 + 1, x1 : x2 + 1]
        passable = np.stack(
            [
                body.slab(k * scan.scan.thickness, scan.scan.thickness)[1][window]
                for k in range(z1, z2 + 1)
            ]
        )
        shares *= passable
        expected = shares >= 0.5 * shares.max()
        got = scan.labels[z1 : z2 + 1, y1 : y2 + 1, x1 : x2 + 1] == lesion.number
        dice = 2 * (got & expected).sum() / (got.sum() + expected.sum())
        assert dice > 0.85, (lesion, dice)
        voxel = scan.scan.spacing**2 * scan.scan.thickness
        assert lesion.volume_mm3 == pytest.approx(shares.sum() * voxel, rel=0.05, abs=15)
        if passable.all() and scan.scan.thickness == 1:
            # Sections are the star scaled by sqrt(1 - (h / d)^2): of the widest one 4/3 d.
            area = 0.5 * (finding.outline.radius**2).sum() * (ANGLES[1] - ANGLES[0])
            volume = area * 4 / 3 * finding.half_depth
            assert lesion.volume_mm3 == pytest.approx(volume, rel=0.1)
            compared += 1
    assert compared or scan.scan.thickness > 1


def test_diameters_and_centroid_against_the_outline_drawn_finely(drawn):
    scan, _, findings = drawn
    for lesion, finding in zip(scan.lesions, true_lesions(findings), strict=True):
        fine = 0.1  # mm
        x, y = (finding.outline.radius * f(ANGLES) / fine + 300 for f in (np.cos, np.sin))
        mask = polygon2mask((601, 601), np.stack([y, x], axis=1))
        measured = recist_from_mask(mask, fine).lengths_mm
        assert lesion.diameters_mm[0] == pytest.approx(measured[0], abs=0.3)
        assert lesion.diameters_mm[0] == pytest.approx(finding.outline.diameter, rel=1e-3)
        assert lesion.diameters_mm[1] == pytest.approx(measured[1], rel=0.1)
        middle = (np.argwhere(mask).mean(axis=0)[::-1] - 300) * fine / scan.scan.spacing
        np.testing.assert_allclose(lesion.centroid[:2], finding.centre + middle, atol=0.05)
        top, bottom = lesion.tight_box[[2, 5]] * scan.scan.thickness
        assert top - scan.scan.thickness <= lesion.centroid[2] <= bottom + scan.scan.thickness


def test_lesions_and_distractors_are_seen_and_only_lesions_are_labelled(drawn):
    scan, _, findings = drawn
    for finding in findings:
        k = round(finding.z / scan.scan.thickness)
        x, y = np.rint(finding.centre).astype(int)
        seen = np.median(scan.hu[k, y - 1 : y + 2, x - 1 : x + 2])
        lesion = [each for each in true_lesions(findings) if each is finding]
        assert (scan.labels[k, y, x] > 0) == bool(lesion)
        if scan.scan.thickness == 1:  # no other slice's tissue is mixed in
            assert seen == pytest.approx(finding.hu + finding.core, abs=60)
        if not lesion:  # where it has moved on to
            away = round(8 / scan.scan.thickness) * scan.scan.thickness
            x, y = np.rint(finding.centre + away * finding.velocity).astype(int)
            if 0 <= x < 128 and 0 <= y < 128:
                assert not scan.labels[round((finding.z + away) / scan.scan.thickness), y, x]


def test_the_same_plan_gives_the_same_scan_and_no_patient_of_make_phantom(monkeypatch):
    monkeypatch.setattr(scans, "BODY_LENGTH", 120.0)
    one, again, other = (draw_scan(ScanPlan(1, 128, seed)) for seed in (0, 0, 1))
    assert (one.hu == again.hu).all() and (one.labels == again.labels).all()
    assert one.hu.shape == other.hu.shape and (one.hu != other.hu).mean() > 0.5
    trained = [draw_spacing(np.random.default_rng([0, p, 0]), 128) for p in range(1, 400)]
    assert one.scan.spacing not in trained
