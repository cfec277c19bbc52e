"""Stacks from true positions: the benchmark's own on even volumes, linear in mm on uneven ones,
nothing across a gap; which slices are looked at."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from ct_volumes.gaps import gaps
from ct_volumes.stacks import has_body, key_slices, plan_volume_stack
from ct_volumes.volume import CTVolume, Source
from deeplesion.data.slices import INTERPOLATIONS, POLICIES, plan_stack
from deeplesion.errors import DataError
from deeplesion.phantom.body import Body

THICKNESSES = (0.45, 0.625, 0.7, 1.0, 1.25, 1.367, 2.0, 2.5, 3.0, 5.0, 7.5)


def positions_of(steps, start=-123.456):
    return start + np.append(0, np.cumsum(steps))


def volume_of(steps, size=4):
    below = positions_of(steps, 0)
    origins = np.stack([0 * below, 0 * below, 57.3 - below], axis=1)
    hu = np.zeros((len(below), size, size), np.int16)
    source = Source(Path("scan"), "dicom", hu.shape)
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), (0.8, 0.8), source)


def positions_looked_at(plan, positions):
    """Where each slice of a stack lies: of an interpolated one the place between its two."""
    return np.array([(1 - w) * positions[near] + w * positions[far] for near, far, w in plan])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("thickness", THICKNESSES)
def test_an_evenly_spaced_volume_has_the_stacks_of_the_benchmark(thickness, policy, interpolation):
    positions = positions_of([thickness] * 23)
    for num_slices in (1, 3, 7):
        options = (num_slices, policy, 2.0, interpolation)
        for key in range(24):
            expected = plan_stack(key, thickness, (0, 23), *options)
            assert plan_volume_stack(positions, key, *options) == expected


def test_headers_that_round_make_no_volume_uneven():
    rng = np.random.default_rng(0)
    positions = positions_of([1.25] * 30) + rng.uniform(-0.005, 0.005, 31)
    for key in range(31):
        plan, thickness = plan_volume_stack(positions, key, 3, "normalize")
        expected, _ = plan_stack(key, 1.25, (0, 30), 3, "normalize")
        assert thickness == 2
        assert [p[:2] for p in plan] == [p[:2] for p in expected]
        np.testing.assert_allclose([p[2] for p in plan], [p[2] for p in expected], atol=0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_uneven_thin_volume_is_resampled_where_the_slices_lie(policy):
    rng = np.random.default_rng(1)
    positions = positions_of(rng.uniform(0.8, 1.15, 40))  # no step is a gap
    assert not gaps(positions).any()
    for key in range(41):
        plan, thickness = plan_volume_stack(positions, key, 7, policy)
        wanted = positions[key] + np.arange(-3, 4) * 2.0
        wanted = np.clip(wanted, positions[0], positions[-1])
        assert thickness == 2.0
        np.testing.assert_allclose(positions_looked_at(plan, positions), wanted, atol=1e-5)
        for offset, (near, far, weight) in zip(range(-3, 4), plan):
            assert abs(near - far) <= 1 and (weight == 0) == (near == far)
            # as of plan_stack, near is the one on the side of the key slice
            assert near == far or abs(near - key) < abs(far - key) or offset == 0
        assert plan[3] == (key, key, 0.0)


def test_an_uneven_thick_volume_keeps_its_slices_and_says_the_local_interval():
    positions = positions_of([5, 5, 6, 7, 5, 5])
    assert not gaps(positions).any()
    plan, thickness = plan_volume_stack(positions, 3, 5, "keep_thick")
    assert plan == [(i, i, 0.0) for i in (1, 2, 3, 4, 5)]
    assert thickness == 6.5
    assert plan_volume_stack(positions, 0, 3, "keep_thick")[1] == 5


def test_where_thin_slices_go_over_into_thick_ones():
    positions = positions_of([1.0] * 10 + [5.0] * 5)
    assert not gaps(positions).any()
    for policy in POLICIES:
        assert plan_volume_stack(positions, 3, 3, policy) == plan_stack(3, 1.0, (0, 10), 3, policy)
    plan, _ = plan_volume_stack(positions, 9, 3, "normalize")
    assert plan == [(7, 7, 0.0), (9, 9, 0.0), (10, 11, 0.2)]
    plan, thickness = plan_volume_stack(positions, 10, 3, "keep_thick")  # 1 before, 5 after
    assert (plan, thickness) == ([(9, 9, 0.0), (10, 10, 0.0), (11, 11, 0.0)], 3.0)
    assert plan_volume_stack(positions, 13, 3, "keep_thick")[1] == 5.0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("interval", [1.0, 5.0])
@pytest.mark.parametrize("missing", [2, 10])
def test_nothing_is_taken_from_beyond_a_gap(interval, policy, missing):
    """Each part is as a volume of its own."""
    positions = positions_of([interval] * 7 + [interval * missing] + [interval] * 5)
    assert np.flatnonzero(gaps(positions)).tolist() == [7]
    for key in range(14):
        part = (0, 7) if key <= 7 else (8, 13)
        expected = plan_stack(key, interval, part, 7, policy)
        assert plan_volume_stack(positions, key, 7, policy) == expected


def test_a_slice_without_neighbours_is_repeated():
    expected = ([(1, 1, 0.0)] * 3, np.inf)
    assert plan_volume_stack(positions_of([80, 90]), 1, 3) == expected
    assert plan_volume_stack(positions_of([]), 0, 3) == ([(0, 0, 0.0)] * 3, np.inf)


def test_bad_options_are_refused():
    positions = positions_of([1.0] * 5)
    with pytest.raises(DataError, match=r"no slice 6: slices are 0\.\.5"):
        plan_volume_stack(positions, 6, 3)
    with pytest.raises(ValueError, match="num_slices must be odd"):
        plan_volume_stack(positions, 2, 4)
    with pytest.raises(ValueError, match="policy"):
        plan_volume_stack(positions, 2, 3, "thick")
    for bad in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="interval_mm"):
            key_slices(volume_of([1, 1]), bad)


def test_key_slices_are_the_nearest_to_every_nth_millimetre():
    assert key_slices(volume_of([1.0] * 9), 2.0) == [0, 2, 4, 6, 8]
    assert key_slices(volume_of([1.0] * 9)) == list(range(10))
    assert key_slices(volume_of([5.0] * 4), 2.0) == [0, 1, 2, 3, 4]
    assert key_slices(volume_of([0.5] * 9), 2.0) == [0, 4, 8]
    assert key_slices(volume_of([]), 2.0) == [0]
    # 0, 2, 4 ... of slices every 1.5 mm; between 1.5 and 3 lies nothing nearer to 2 than 1.5
    assert key_slices(volume_of([1.5] * 6), 2.0) == [0, 1, 3, 4, 5]
    rng = np.random.default_rng(2)
    scan = volume_of(rng.uniform(0.3, 4.0, 60))
    at = scan.positions_mm - scan.positions_mm[0]
    expected = {int(np.abs(at - wanted).argmin()) for wanted in np.arange(0, at[-1], 2.0)}
    assert key_slices(scan, 2.0) == sorted(expected)


def table(hu, thickness=2):
    """Two thin shells with foam in between, and a rail of metal, as tables have them."""
    hu[420 : 420 + thickness, 60:450] = 100
    hu[450 : 450 + thickness, 60:450] = 100
    hu[422:450, 60:450] = -880
    hu[430:436, 100:106] = 3000
    return hu


def test_air_and_a_table_are_no_body():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 30, (512, 512))
    air = (-1000 + noise).astype(np.int16)
    assert not has_body(air, (0.8, 0.8))
    assert not has_body(table(air.copy()), (0.8, 0.8))
    assert not has_body(np.full((512, 512), -3024, np.int16), (0.8, 0.8))
    padded = air.copy()
    padded[:, :40] = -3024
    assert not has_body(table(padded), (0.8, 0.8))


@pytest.mark.parametrize("radius_mm, found", [(10, False), (25, True), (150, True)])
@pytest.mark.parametrize("spacing_mm", [(0.8, 0.8), (0.8, 1.6), (4.5, 4.5)])
def test_soft_tissue_is_body_from_ten_square_centimetres_on(radius_mm, found, spacing_mm):
    rng = np.random.default_rng(0)
    shape = tuple(round(400 / mm) for mm in spacing_mm)
    y, x = (np.arange(n) * mm - 200 for n, mm in zip(shape, spacing_mm))
    inside = np.hypot(*np.meshgrid(y, x, indexing="ij")) < radius_mm
    noise = rng.normal(0, 60, shape)  # a low dose
    assert has_body((np.where(inside, -90, -1000) + noise).astype(np.int16), spacing_mm) == found


def test_lungs_within_their_wall_are_body():
    hu = np.full((512, 512), -1000, np.int16)
    cv2.ellipse(hu, (256, 240), (200, 140), 0, 0, 360, 40, -1)
    cv2.ellipse(hu, (256, 240), (178, 118), 0, 0, 360, -850, -1)
    assert has_body(hu, (0.8, 0.8))


def test_every_slice_of_the_phantoms_body_is_one():
    body = Body(np.random.default_rng(0), 128, 3.0)
    for z in np.linspace(0, 600, 13):
        assert has_body(np.rint(body.plane(z)[0]).astype(np.int16), (3.0, 3.0))
