"""The phantom: its files are DeepLesion's, one slice does not tell lesions from distractors, and
the neighbouring slices do."""

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage
from scipy.optimize import minimize
from scipy.stats import rankdata
from skimage.measure import regionprops

from deeplesion.data.dl_info import read_dl_info
from deeplesion.phantom import body as phantom_body
from deeplesion.phantom import make as phantom
from deeplesion.phantom.body import Body
from deeplesion.phantom.findings import Scan, draw_finding
from deeplesion.phantom.make import make_phantom, plan_series

TOOL = Path(__file__).parents[3] / "tools" / "make_phantom.py"
NIH_HEADER = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,"
    "Bounding_boxes,Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,"
    "Possibly_noisy,Slice_range,Spacing_mm_px_,Image_size,DICOM_windows,Patient_gender,"
    "Patient_age,Train_Val_Test"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    make_phantom(root, patients=90, size=128, seed=11, progress=False)
    return root


@pytest.fixture(scope="module")
def rows(root):
    with open(root / "DL_info.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(text):
    return np.array([float(value) for value in text.split(", ")])


def read_hu(root, series, index):
    pixels = cv2.imread(str(root / "Images_png" / series / f"{index:03d}.png"), -1)
    assert pixels.dtype == np.uint16
    return pixels.astype(np.float32) - 32768


def read_labels(root, key):
    return cv2.imread(str(root / "phantom_truth" / "masks" / key.replace("/", "_")), -1)


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def some_findings(thickness, count, seed=0):
    rng = np.random.default_rng(seed)
    body = Body(rng, 192, 1.2)
    scan = Scan(192, 1.2, thickness)
    found = []
    while len(found) < count:
        z = 5.0 * rng.integers(10, 110)
        finding = draw_finding(rng, scan, *body.plane(z), z)
        found += [finding] if finding is not None else []
    return found


# --- the files ------------------------------------------------------------------------------------


def test_csv_has_nih_columns_and_formatting(root, rows):
    text = (root / "DL_info.csv").read_text()
    assert text.splitlines()[0] == NIH_HEADER
    widths = {
        "Measurement_coordinates": 8,
        "Bounding_boxes": 4,
        "Lesion_diameters_Pixel_": 2,
        "Normalized_lesion_location": 3,
        "Slice_range": 2,
        "Spacing_mm_px_": 3,
        "Image_size": 2,
        "DICOM_windows": 2,
    }
    for row in rows:
        for column, width in widths.items():
            assert len(numbers(row[column])) == width
            assert f'"{row[column]}"' in text
        parts = (row[c] for c in ("Patient_index", "Study_index", "Series_ID", "Key_slice_index"))
        assert row["File_name"] == "{:06d}_{:02d}_{:02d}_{:03d}.png".format(*map(int, parts))
        assert row["Image_size"] == "128, 128"
        assert row["Patient_gender"] in ("M", "F")
        assert row["Patient_age"] == "NaN" or 0 < int(row["Patient_age"]) < 120
    assert {row["Patient_age"] == "NaN" for row in rows} == {True, False}
    assert {row["Possibly_noisy"] for row in rows} == {"0", "1"}


def test_every_slice_of_a_range_is_there_and_no_other(root, rows):
    expected = set()
    for row in rows:
        first, last = map(int, row["Slice_range"].split(", "))
        assert first <= int(row["Key_slice_index"]) <= last
        folder = root / "Images_png" / row["File_name"][:12]
        expected |= {folder / f"{index:03d}.png" for index in range(first, last + 1)}
    assert set((root / "Images_png").rglob("*.*")) == expected
    assert {cv2.imread(str(path), -1).shape for path in list(expected)[::40]} == {(128, 128)}


def test_ranges_hold_seven_slices_unless_the_scan_ends(rows):
    short = 0
    for row in rows:
        first, last = map(int, row["Slice_range"].split(", "))
        thickness = numbers(row["Spacing_mm_px_"])[2]
        key = int(row["Key_slice_index"])
        need = 3 if thickness == 5 else 6 / thickness
        short += min(key - first, last - key) < need
    assert 0 < short < 0.3 * len(rows)


def test_boxes_are_recist_extents_plus_five(rows):
    for row in rows:
        points = numbers(row["Measurement_coordinates"]).reshape(4, 2)
        box = numbers(row["Bounding_boxes"])
        np.testing.assert_allclose(box[:2], points.min(0) - 5, atol=2e-3)
        np.testing.assert_allclose(box[2:], points.max(0) + 5, atol=2e-3)
        lengths = np.hypot(*(points[1::2] - points[::2]).T)
        np.testing.assert_allclose(numbers(row["Lesion_diameters_Pixel_"]), lengths, atol=2e-3)


def test_coordinates_count_from_one(root, rows):
    """A wrong origin would shift all boxes against all masks by one pixel."""
    shifts = []
    order = {}
    for row in rows:
        key = f"{row['File_name'][:12]}/{row['File_name'][13:]}"
        order[key] = order.get(key, 0) + 1
        y, x = np.nonzero(read_labels(root, key) == order[key])
        middle = np.array([x.min() + x.max(), y.min() + y.max()]) / 2
        box = numbers(row["Bounding_boxes"])
        if row["Possibly_noisy"] == "0":
            shifts.append((box[:2] + box[2:]) / 2 - 1 - middle)
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.2
    assert np.abs(shifts).max() < 2.5


def test_splits_types_and_thicknesses(rows):
    split_of = {}
    for row in rows:
        assert split_of.setdefault(row["Patient_index"], row["Train_Val_Test"]) in "123"
        assert split_of[row["Patient_index"]] == row["Train_Val_Test"]
        lesion_type = int(row["Coarse_lesion_type"])
        assert lesion_type == -1 if row["Train_Val_Test"] == "1" else 1 <= lesion_type <= 8
    counts = [list(split_of.values()).count(split) for split in "123"]
    assert counts == [62, 14, 14]
    for split in "123":
        series = {
            (row["File_name"][:12], numbers(row["Spacing_mm_px_"])[2])
            for row in rows
            if row["Train_Val_Test"] == split
        }
        thick = np.mean([thickness == 5 for _, thickness in series])
        assert {thickness for _, thickness in series} <= {1, 2, 5}
        assert 0.4 <= thick <= 0.6


@pytest.mark.parametrize("patients", [3, 4, 5, 7, 20])
def test_small_phantoms_have_thin_and_thick_in_each_split(patients):
    for seed in range(10):
        kinds = {(s.split, s.thickness > 2) for s in plan_series(patients, 128, seed)}
        assert kinds == {(split, thick) for split in (1, 2, 3) for thick in (False, True)}


def test_the_benchmark_reads_it(root, rows):
    lesions = read_dl_info(root / "DL_info.csv")
    assert len(lesions) == len(rows)
    boxes = np.stack(lesions.bbox[~lesions.noisy].to_list())
    assert boxes.min() >= 0 and boxes.max() <= 127


# --- what is in them ------------------------------------------------------------------------------


def test_truth_lists_as_many_distractors_as_lesions_each_with_its_mask(root, rows):
    truth = json.loads((root / "phantom_truth" / "truth.json").read_text())
    names = [row["File_name"] for row in rows]
    for key, entry in truth.items():
        lesions, distractors = entry["lesions"], entry["distractors"]
        assert len(lesions) == len(distractors) == names.count(key.replace("/", "_")) <= 3
        labels = read_labels(root, key)
        numbered = [*range(1, len(lesions) + 1), *range(101, len(distractors) + 101)]
        assert np.unique(labels).tolist() == [0, *numbered]
        for label, finding in zip(numbered, lesions + distractors, strict=True):
            y, x = np.nonzero(labels == label)
            x1, y1, x2, y2 = finding["bbox"]
            assert x1 < x.min() and x.max() < x2 and y1 < y.min() and y.max() < y2
            assert finding["speed_px_per_mm"] >= 1  # 2 px in 2 mm
            near = cv2.dilate((labels == label).astype(np.uint8), np.ones((3, 3)))
            assert set(np.unique(labels[near > 0])) <= {0, label}
    assert len(truth) == len(set(names))


def test_true_diameters_against_brute_force_over_mask_pixels(root, rows):
    truth = json.loads((root / "phantom_truth" / "truth.json").read_text())
    spacing = {
        f"{r['File_name'][:12]}/{r['File_name'][13:]}": numbers(r["Spacing_mm_px_"])[0]
        for r in rows
    }
    measured = {key: [] for key in truth}
    for row in rows:
        key = f"{row['File_name'][:12]}/{row['File_name'][13:]}"
        measured[key].append((numbers(row["Lesion_diameters_Pixel_"]), row["Possibly_noisy"]))
    lengths_mm = []
    for key in truth:
        labels = read_labels(root, key)
        for label, lesion in enumerate(truth[key]["lesions"], 1):
            points = np.argwhere(labels == label).astype(float)
            brute = max(np.hypot(*(points - point).T).max() for point in points)
            long, short = np.array(lesion["diameters_mm"]) / spacing[key]
            # The contour passes less than a pixel outside the outermost pixel centres.
            assert brute - 1e-6 <= long < brute + 2
            assert 2.5 <= short <= long and long >= 5
            lengths_mm.append(lesion["diameters_mm"][0])
            csv_lengths, noisy = measured[key][label - 1]
            if noisy == "0":
                np.testing.assert_allclose(csv_lengths, [long, short], atol=1.5)
    assert max(lengths_mm) < 31 and 8 < np.median(lengths_mm) < 18


def test_axes_cross_where_the_segments_meet():
    rng = np.random.default_rng(2)
    met = 0
    for _ in range(300):
        a, b, c, d = recist = rng.uniform(0, 10, (4, 2))
        # The crossing as the solution of a + s (b - a) = c + t (d - c).
        s, t = np.linalg.solve(np.stack([b - a, c - d], 1), c - a)
        assert phantom.axes_cross(recist) == (0 <= s <= 1 and 0 <= t <= 1)
        met += phantom.axes_cross(recist)
    assert 30 < met < 270


def test_axes_that_are_written_cross_at_about_right_angles(rows):
    for row in rows:
        a, b, c, d = points = np.array(row["Measurement_coordinates"].split(","), float).reshape(
            4, 2
        )
        assert phantom.axes_cross(points)
        long, short = b - a, d - c
        off = abs(long @ short) / np.hypot(*long) / np.hypot(*short)
        assert off < 0.5 or row["Possibly_noisy"] == "1"


def test_hounsfield_units_are_plausible():
    expected = {
        phantom_body.LUNG: (-900, -700),
        phantom_body.LIVER: (70, 130),
        phantom_body.SPLEEN: (90, 150),
        phantom_body.KIDNEY: (110, 210),
        phantom_body.MUSCLE: (40, 75),
        phantom_body.ABDOMEN: (-125, -85),
        phantom_body.SUBCUTANEOUS: (-125, -85),
        phantom_body.MARROW: (130, 250),
    }
    for seed in range(3):
        body = Body(np.random.default_rng(seed), 128, 1.5)
        planes = [body.plane(z) for z in range(60, 600, 20)]
        hu, tissue = (np.stack(part) for part in zip(*planes, strict=True))
        for kind, (low, high) in expected.items():
            assert low < np.median(hu[tissue == kind]) < high
        assert np.median(hu[:, :5, :5]) == -1000
        bone = hu[(tissue == phantom_body.BLOCKED) & (hu > 300)]
        assert bone.size > 2000 and 300 < np.median(bone) < 1000


def test_thick_slices_have_less_noise(root, rows):
    """Noise of air in a corner: 1 mm against 5 mm is sqrt(5)."""
    noise = {1.0: [], 2.0: [], 5.0: []}
    for row in rows:
        hu = read_hu(root, row["File_name"][:12], int(row["Key_slice_index"]))
        noise[numbers(row["Spacing_mm_px_"])[2]].append(hu[:12, :24].std())
    thin, middle, thick = (np.median(noise[t]) for t in (1.0, 2.0, 5.0))
    assert 12 < thin < 28
    assert thin > 1.2 * middle > 1.2 * 1.2 * thick
    assert thin / thick == pytest.approx(np.sqrt(5), rel=0.25)


# --- lesions and distractors ----------------------------------------------------------------------


@pytest.mark.parametrize("thickness", [1.0, 2.0, 5.0])
def test_key_slice_section_does_not_depend_on_the_kind(thickness):
    for finding in some_findings(thickness, 10):
        lesion, tube = (finding.section(finding.z, kind) for kind in (True, False))
        assert lesion[0] == tube[0]
        np.testing.assert_array_equal(lesion[1], tube[1])
        np.testing.assert_array_equal(lesion[2], tube[2])


def centre_and_area(section):
    box, opacity, _ = section
    y, x = np.mgrid[box]
    return np.array([(x * opacity).sum(), (y * opacity).sum()]) / opacity.sum(), opacity.sum()


@pytest.mark.parametrize(("thickness", "step"), [(1.0, 2.0), (2.0, 2.0), (5.0, 5.0)])
def test_lesions_stay_and_shrink_and_distractors_move_on_unchanged(thickness, step):
    for finding in some_findings(thickness, 15, seed=1):
        start, area = centre_and_area(finding.section(finding.z, True))
        for side in (-1, 1):
            # From the widest section on, which is at most 0.2 half depths off the key slice.
            away, last = 0.2 * finding.half_depth, np.inf
            while (section := finding.section(finding.z + side * away, True)) is not None:
                centre, now = centre_and_area(section)
                assert now <= last + 1e-9
                assert now < 2 or np.linalg.norm(centre - start) < 0.15 * finding.reach + 0.5
                last = now
                away += thickness / 2
            assert away < 0.6 * finding.outline.diameter + thickness
            moved, same = centre_and_area(finding.section(finding.z + side * step, False))
            inside = (moved > 20).all() and (moved < 170).all()
            if inside:
                assert np.linalg.norm(moved - start) >= step
                assert same == pytest.approx(area, rel=0.1, abs=1)


def test_no_object_shows_in_another_key_slice():
    several = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        scan = Scan(128, 1.5, (1.0, 2.0, 5.0)[seed % 3])
        keys = phantom._draw_key_slices(rng, Body(rng, 128, 1.5), scan)
        several += len(keys) > 1
        for key in keys:
            for other in keys:
                for finding, _, _ in other.findings if other is not key else []:
                    assert finding.section(key.index * scan.thickness, finding.is_lesion) is None
    assert several >= 5


def key_slice_features(hu, labels, region):
    """Everything a reader could go by who sees the key slice only."""
    mask = labels == region.label
    outside, inside = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
    ring = (outside > 2) & (outside <= 6)
    smooth = cv2.GaussianBlur(hu, (0, 0), 1)
    gradient = np.hypot(*np.gradient(smooth))
    y, x = region.centroid[0] - 60, region.centroid[1] - 64
    contrast = hu[mask].mean() - hu[ring].mean()
    others = (labels > 0) & ~mask
    profile = [hu[(outside > a) & (outside <= a + 1)].mean() - hu[mask].mean() for a in range(4)]
    core = hu[inside >= inside.max() - 0.5].mean() - hu[mask].mean()
    shape = [region.area, region.eccentricity, region.solidity, region.extent, region.orientation]
    look = [hu[mask].mean(), hu[mask].std(), contrast, abs(contrast), hu[ring].std(), core]
    texture = [(hu - smooth)[mask].std(), smooth[mask].std()]
    edge = gradient[(outside <= 1) & (inside <= 1)].mean()
    neighbours = [outside[others].min(), np.mean(others)]
    return (
        shape
        + look
        + texture
        + [edge, edge / (abs(contrast) + 10)]
        + profile
        + neighbours
        + [*(x, y, abs(x), np.hypot(x, y))]
    )


def neighbour_features(hu, steps, mask, least):
    """How well the object is found again, in place and displaced, one step up and down.

    steps: [(side, neighbouring slice)]; the displacement is taken to be opposite on both sides.
    """
    y, x = np.nonzero(mask)
    reach = 16
    box = np.s_[max(y.min() - 3, 0) : y.max() + 4, max(x.min() - 3, 0) : x.max() + 4]
    wide = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))).astype(np.float32)[box]
    patch = cv2.GaussianBlur(hu, (0, 0), 0.8)[box].copy()
    found = []
    for side, slice_ in steps:
        padded = cv2.copyMakeBorder(cv2.GaussianBlur(slice_, (0, 0), 0.8), *[reach] * 4, 2)
        field = padded[box[0].start : box[0].stop + 2 * reach, box[1].start :]
        field = field[:, : patch.shape[1] + 2 * reach].copy()
        match = cv2.matchTemplate(field, patch, cv2.TM_CCOEFF_NORMED, mask=wide)
        found.append(np.nan_to_num(match, posinf=0, neginf=0)[::side, ::side])
    match = np.mean(found, axis=0)
    offsets = np.arange(match.shape[0]) - reach, np.arange(match.shape[1]) - reach
    distance = np.hypot(*np.meshgrid(*offsets, indexing="ij"))
    here, there = match[distance <= 1].max(), match[distance >= least].max()
    return [match[distance == 0][0], here, there, there - here, distance.flat[match.argmax()]]


@pytest.fixture(scope="module")
def objects(root, rows):
    """(key slice features, neighbour features, is lesion, is thick, patient) of every object."""
    table = []
    for name, row in {row["File_name"]: row for row in rows}.items():
        series, key = name[:12], int(row["Key_slice_index"])
        first, last = map(int, row["Slice_range"].split(", "))
        thickness = numbers(row["Spacing_mm_px_"])[2]
        step = max(round(2 / thickness), 1)
        hu = read_hu(root, series, key)
        steps = [
            (side, read_hu(root, series, key + side * step))
            for side in (-1, 1)
            if first <= key + side * step <= last
        ]
        labels = read_labels(root, f"{series}/{key:03d}.png")
        for region in regionprops(labels):
            mask = labels == region.label
            table.append(
                (
                    key_slice_features(hu, labels, region),
                    neighbour_features(hu, steps, mask, least=0.9 * step * thickness),
                    region.label < 100,
                    thickness > 2,
                    int(row["Patient_index"]),
                )
            )
    return [np.array(column) for column in zip(*table, strict=True)]


def auc(scores, positive):
    ranks, n = rankdata(scores), positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum())


def test_auc_against_counting_pairs():
    scores, positive = np.array([1.0, 3, 2, 2, 5]), np.array([False, True, False, True, True])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(pairs))


def cross_validated_auc(features, positive, patient):
    """Ridge logistic regression on ranks, five folds by patient."""
    x = np.stack([rankdata(column) / len(column) - 0.5 for column in features.T], 1)
    x = np.hstack([3.5 * x, 12 * x**2 - 1, np.ones((len(x), 1))])
    scores = np.empty(len(x))
    for fold in range(5):
        held_out = patient % 5 == fold
        train, sign = x[~held_out], np.where(positive[~held_out], 1, -1)

        def loss(w, train=train, sign=sign):
            margin = sign * (train @ w)
            pull = -train.T @ (sign / (1 + np.exp(np.clip(margin, -50, 50))))
            return np.logaddexp(0, -margin).sum() + 2 * w @ w, pull + 4 * w

        weights = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
        scores[held_out] = x[held_out] @ weights
    return auc(scores, positive)


def test_the_key_slice_alone_does_not_tell(objects):
    features, _, is_lesion, is_thick, patient = objects
    assert len(features) > 350
    assert cross_validated_auc(features, is_lesion, patient) < 0.6
    for column in features.T:
        assert 0.4 < auc(column, is_lesion) < 0.6
    for some in (is_thick, ~is_thick):
        assert cross_validated_auc(features[some], is_lesion[some], patient[some]) < 0.6
        for column in features[some].T:
            assert 0.37 < auc(column, is_lesion[some]) < 0.63


def test_the_neighbouring_slices_tell(objects):
    _, features, is_lesion, is_thick, patient = objects
    assert cross_validated_auc(features, is_lesion, patient) > 0.9
    for some in (is_thick, ~is_thick):
        assert cross_validated_auc(features[some], is_lesion[some], patient[some]) > 0.85


# --- making it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    make_phantom(root, patients=3, size=128, seed=5, progress=False)
    return root


# Of `small`, before distractors could be chosen: the option leaves what was there as it is.
DIGEST = "ea29ac12a47b09347479307a647bd30759c03aa7309abe91c98e9c94fd1af5cc"


def test_a_phantom_made_before_there_were_options_is_still_the_same(small):
    digest = hashlib.sha256()
    for path in sorted(path for path in small.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(small)).encode())
        # A PNG's bytes depend on the library that packs it; its pixels do not.
        if path.suffix == ".png":
            digest.update(cv2.imread(str(path), -1).tobytes())
        elif path.name == "truth.json":
            # NumPy's last digits depend on the processor.
            truth = json.loads(path.read_text(), parse_float=lambda n: f"{float(n):.9g}")
            digest.update(json.dumps(truth).encode())
        else:
            digest.update(path.read_bytes())
    assert digest.hexdigest() == DIGEST


def test_same_bytes_whatever_the_workers(small, tmp_path):
    make_phantom(tmp_path / "new", patients=3, size=128, seed=5, workers=2, progress=False)
    assert contents(tmp_path / "new") == contents(small)


def test_another_seed_is_another_phantom(small, tmp_path):
    make_phantom(tmp_path, patients=3, size=128, seed=6, progress=False)
    assert (tmp_path / "DL_info.csv").read_bytes() != (small / "DL_info.csv").read_bytes()


def test_goes_on_after_an_interruption(small, tmp_path, monkeypatch):
    made, make_series, write_slice = [], phantom.make_series, phantom.write_slice

    def interrupted(path, hu):
        if len(made) == 3:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".part").write_bytes(b"half a pic")
            raise KeyboardInterrupt
        write_slice(path, hu)

    def counted(root, series):
        made.append(series.name)
        return make_series(root, series)

    monkeypatch.setattr(phantom, "make_series", counted)
    monkeypatch.setattr(phantom, "write_slice", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path, patients=3, size=128, seed=5, progress=False)
    assert not (tmp_path / "DL_info.csv").exists()

    drawn = []
    monkeypatch.setattr(phantom, "write_slice", lambda p, x: (drawn.append(p), write_slice(p, x)))
    make_phantom(tmp_path, patients=3, size=128, seed=5, progress=False)
    assert contents(tmp_path) == contents(small)
    redone = {path.parent.name for path in drawn if path.parent.name != "masks"}
    assert redone.isdisjoint(made[:2]) and made[2] in redone


def test_a_finished_phantom_is_left_alone(small, monkeypatch):
    monkeypatch.setattr(phantom, "make_series", None)
    before = contents(small)
    make_phantom(small, patients=3, size=128, seed=5, progress=False)
    assert contents(small) == before


def test_refuses_a_folder_of_something_else(small, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty and holds no phantom"):
        make_phantom(tmp_path, patients=3, size=128)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match=r"'seed': 5.*'seed': 6"):
        make_phantom(small, patients=3, size=128, seed=6)


@pytest.mark.parametrize(
    ("option", "value"),
    [("patients", 2), ("size", 127), ("size", 2000), ("seed", -1), ("workers", 0)],
)
def test_refuses_options_out_of_range(tmp_path, option, value):
    options = {"patients": 3, "size": 128, option: value}
    with pytest.raises(ValueError, match=rf"{option} is {value}: .* from \d+ to \d+"):
        make_phantom(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_the_tool_works_from_anywhere_and_explains_itself(small, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(TOOL), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("p", "--patients", "3", "--size", "128", "--seed", "5")
    assert done.returncode == 0 and "series" in done.stderr  # the progress bar
    assert contents(tmp_path / "p") == contents(small)
    refused = run("p", "--patients", "2")
    assert refused.returncode != 0
    assert refused.stderr.startswith("make_phantom: patients is 2") and not refused.stdout
