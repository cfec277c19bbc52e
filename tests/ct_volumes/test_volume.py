"""CTVolume: pixels to millimetres, the way back to the source, what is refused."""

from pathlib import Path

import numpy as np
import pytest

from ct_volumes.lesions import Patch
from ct_volumes.volume import CTVolume, Instance, Source

SIGNS = [(i, j, k) for i in (False, True) for j in (False, True) for k in (False, True)]


def volume(shape=(4, 5, 6), steps=(1.0, 2.0, 5.0), shift=0.0, **source):
    """Slices `steps` mm apart; by `shift` mm each is moved to posterior, as by a tilted gantry."""
    below = np.append(0, np.cumsum(steps))[: shape[0]]
    origins = np.stack([0 * below - 20, below * shift - 30, 100 - below], axis=1)
    hu = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    source = dict(dict(path=Path("scan"), format="dicom", shape=shape), **source)
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), (0.8, 0.5), Source(**source))


def test_positions_run_from_head_to_feet_and_intervals_reach_to_the_next_slice():
    scan = volume()
    assert scan.normal.tolist() == [0, 0, -1]
    np.testing.assert_allclose(np.diff(scan.positions_mm), [1, 2, 5])
    np.testing.assert_allclose(scan.interval_mm, [1, 2, 5, 5])


def test_extents_tile_the_scan():
    scan = volume((5, 5, 6), steps=(1.0, 2.0, 5.0, 5.0))
    np.testing.assert_allclose(scan.extent_mm, [1, 1.5, 3.5, 5, 5])
    ends = scan.positions_mm[:, None] + scan.reach_mm * [-1, 1]
    np.testing.assert_allclose(ends[1:, 0], ends[:-1, 1])


def test_beside_a_gap_slices_end_as_at_an_end_of_the_scan():
    """Each part is as a volume of its own."""
    scan = volume((7, 5, 6), steps=(1.0, 2.0, 300.0, 1.5, 1.5, 80.0), slice_thickness_mm=3.0)
    np.testing.assert_allclose(scan.extent_mm, [1, 1.5, 2, 1.5, 1.5, 1.5, 3])
    np.testing.assert_allclose(scan.reach_mm[2], [1, 1])
    assert volume((2, 5, 6), steps=(300.0,)).extent_mm.tolist() == [1, 1]


def test_a_single_slice_has_no_neighbours_and_its_own_thickness():
    scan = volume((1, 5, 6), slice_thickness_mm=5.0)
    assert scan.interval_mm.tolist() == [np.inf]
    assert scan.extent_mm.tolist() == [5.0]


def test_to_world_follows_the_tilt():
    scan = volume(shift=0.25)
    world = scan.to_world(2, 3, 2)
    np.testing.assert_allclose(world, [-20 + 2 * 0.5, -30 + 0.25 * 3 + 3 * 0.8, 100 - 3])
    assert scan.to_world(np.zeros((7, 2)), 1.0, 0).shape == (7, 2, 3)
    with pytest.raises(IndexError, match=r"0\.\.3"):
        scan.to_world(0, 0, 4)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("flipped", SIGNS)
def test_arrays_and_points_go_back_to_the_source(axes, flipped):
    """Every voxel of the volume, found by its number in the source's array."""
    scan = volume(axes=axes, flipped=flipped)
    there = scan.in_source(scan.hu)
    index, y, x = np.indices(scan.hu.shape).reshape(3, -1)
    where = scan.points_in_source(x, y, index).astype(int)
    assert there[tuple(where.T)].tolist() == scan.hu.ravel().tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hu=np.zeros((4, 5, 6), np.float32)), "int16"),
        (dict(origins_mm=np.zeros((3, 3))), "origins_mm"),
        (dict(origins_mm=np.zeros((4, 3))), "head to feet"),
        (dict(row_direction=(1, 1, 0)), "right angles"),
        (dict(row_direction=(-1, 0, 0), column_direction=(0, -1, 0)), "left"),
        (dict(row_direction=(1, 0, 0), column_direction=(0, 0, -1)), "axial"),
        (dict(spacing_mm=(0.5, 0)), "positive"),
        (dict(spacing_mm=(0.5, np.nan)), "finite"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    scan = volume()
    fields = {n: getattr(scan, n) for n in scan.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        CTVolume(**{**fields, **change})


def test_a_volume_keeps_its_own_geometry():
    origins = volume().origins_mm.copy()
    scan = CTVolume(
        np.zeros((4, 5, 6), np.int16), origins, (1, 0, 0), (0, 1, 0), (1, 1), volume().source
    )
    origins[:] = 0
    assert scan.origins_mm.any()


@pytest.mark.parametrize(
    "path, files, text, expected",
    [
        ("/d/DOE", ("/d/DOE/1", "/d/DOE/2"), "/d/DOE/1 has no UID", "a file has no UID"),
        ("/d/DOE", ("/d/DOE/1",), "cannot read /d/DOE/12: gone", "cannot read the scan/12: gone"),
        ("/d/DOE.zip", ("DOE/1",), "DOE/1 in /d/DOE.zip is bad.", "a file in the scan is bad."),
        ("ct", ("ct/1",), "ct.b, out/ct/x, ct-2, act; ct.", "ct.b, out/ct/x, ct-2, act; the scan."),
        ("7", ("7/1",), "7 is read; 7.5 mm, 17 slices", "the scan is read; 7.5 mm, 17 slices"),
        (".", ("1", "2"), "1 has no UID. Uneven.", "a file has no UID. Uneven."),
    ],
)  # fmt: skip
def test_paths_of_a_scan_are_taken_out_of_a_text(path, files, text, expected):
    zipped = path.endswith(".zip")
    instances = tuple(
        Instance(Path(path), "1.2", member=file) if zipped else Instance(Path(file), "1.2")
        for file in files
    )
    source = Source(Path(path), "dicom", (len(files), 5, 6), instances=instances)
    assert source.without_paths(text) == expected


def test_a_patch_is_the_mask_where_it_is_not_empty():
    mask = np.zeros((9, 8), bool)
    mask[2:5, 3:4] = True
    patch = Patch.of(mask)
    assert (patch.x, patch.y, patch.mask.shape) == (3, 2, (3, 1))
    painted = np.zeros_like(mask)
    patch.paint(painted)
    assert (painted == mask).all()
    assert Patch.of(np.zeros((9, 8))).mask.size == 0


def test_the_same_scan_is_known_by_its_hash():
    scan = volume()
    assert scan.sha256 == volume().sha256 and len(scan.sha256) == 64
    other = volume().hu.copy()
    other[1, 2, 3] += 1
    changed = [
        CTVolume(other, scan.origins_mm, (1, 0, 0), (0, 1, 0), scan.spacing_mm, scan.source),
        CTVolume(scan.hu, scan.origins_mm, (1, 0, 0), (0, 1, 0), (0.8, 0.6), scan.source),
        volume(steps=(1.0, 2.0, 5.1)),
        volume(shift=0.1),
    ]
    assert len({scan.sha256, *(each.sha256 for each in changed)}) == 5
