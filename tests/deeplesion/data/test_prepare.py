"""Preparation of small data sets in NIH's layout: content, completeness, interruption, command."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from pycocotools.coco import COCO

from deeplesion.data import prepare as module
from deeplesion.data import recist, slices
from deeplesion.data.coco import image_folders
from deeplesion.data.dl_info import read_dl_info
from deeplesion.data.prepare import PUBLISHED_KEY_SLICES, Preparation, prepare
from deeplesion.data.recist import mask_from_recist, released_mask_from_recist
from deeplesion.data.slice_cache import fill_cache
from deeplesion.data.slices import SliceFolder
from deeplesion.errors import DataError, MissingDataError, WriteError

TOOL = Path(__file__).parents[3] / "tools" / "prepare_data.py"
SIZE = 96
FILES = ("train.json", "val.json", "test.json", "report.csv")


def lesion(patient=1, key_slice=20, center=(48, 48), axes=(20, 12), split=1, **own):
    """A row of DL_info.csv: an upright ellipse, `center` in 0-based pixels."""
    (x, y), (long, short) = np.add(center, 1), axes
    ends = [x, y - long / 2, x, y + long / 2, x - short / 2, y, x + short / 2, y]
    box = [x - short / 2 - 5, y - long / 2 - 5, x + short / 2 + 5, y + long / 2 + 5]
    return {
        "File_name": f"{patient:06d}_01_01_{key_slice:03d}.png",
        "Patient_index": patient,
        "Study_index": 1,
        "Series_ID": 1,
        "Key_slice_index": key_slice,
        "Measurement_coordinates": ", ".join(map(str, ends)),
        "Bounding_boxes": ", ".join(map(str, box)),
        "Lesion_diameters_Pixel_": f"{long}, {short}",
        "Normalized_lesion_location": "0.4, 0.3, 0.5",
        "Coarse_lesion_type": -1,
        "Possibly_noisy": 0,
        "Slice_range": f"{key_slice - 4}, {key_slice + 4}",
        "Spacing_mm_px_": "0.8, 0.8, 5",
        "Image_size": f"{SIZE}, {SIZE}",
        "DICOM_windows": "-175, 275",
        "Patient_gender": "F",
        "Patient_age": 62,
        "Train_Val_Test": split,
        **own,
    }


def ellipse(center, axes, size=SIZE):
    y, x = np.mgrid[:size, :size]
    return ((x - center[0]) * 2 / axes[1]) ** 2 + ((y - center[1]) * 2 / axes[0]) ** 2 <= 1


def write_table(root, rows):
    with open(root / "DL_info.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_slice(path, hu):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), (hu + 32768).astype(np.uint16))


def write_data(root, rows, size=SIZE):
    """The table, and every slice of every slice range: bright ellipses (60 HU) in fat (-80 HU)."""
    root.mkdir(parents=True, exist_ok=True)
    write_table(root, rows)
    rng = np.random.default_rng(0)
    volumes = {}
    for row in rows:
        low, high = map(int, row["Slice_range"].split(","))
        for index in range(low, high + 1):
            path = root / "Images_png" / row["File_name"][:12] / f"{index:03d}.png"
            hu = volumes.setdefault(path, rng.normal(-80, 5, (size, size)))
            ends = np.array(row["Measurement_coordinates"].split(","), float) - 1
            center = ((ends[0] + ends[2]) / 2, (ends[1] + ends[3]) / 2)
            axes = (ends[3] - ends[1], ends[6] - ends[4])
            hu[ellipse(center, axes, size)] += 140
    for path, hu in volumes.items():
        write_slice(path, hu.round())
    return root


def mixed_rows():
    return [
        lesion(1, 20, (30, 30)),
        lesion(1, 20, (70, 66), (24, 14)),
        lesion(1, 40, Spacing_mm_px_="0.8, 0.8, 1.25", Slice_range="30, 50"),
        lesion(2, 20, split=2, Spacing_mm_px_="0.8, 0.8, NaN", Slice_range="20, 20"),
        lesion(3, 9, split=3),
        lesion(3, 30, split=3, Possibly_noisy=1),
        lesion(4, 12, split=3, Spacing_mm_px_="0.8, 0.8, 2"),
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = write_data(tmp_path_factory.mktemp("data") / "DeepLesion", mixed_rows())
    return root, prepare(root, workers=1)


@pytest.fixture
def data(prepared, tmp_path):
    """A copy of that data set, not prepared yet."""
    root = tmp_path / "DeepLesion"
    shutil.copytree(prepared[0], root, ignore=shutil.ignore_patterns("annotations"))
    return root


def coco(root, split):
    return COCO(str(root / "annotations" / f"{split}.json"))


def written(root):
    return {name: (root / "annotations" / name).read_bytes() for name in FILES}


def image_names(root):
    files = [json.loads((root / "annotations" / name).read_text()) for name in FILES[:3]]
    return [image["file_name"] for content in files for image in content["images"]]


def run_tool(*args, **kwargs):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, **kwargs
    )


# Content


def test_clean_rows_become_key_slices_by_split(prepared, capsys):
    root, preparation = prepared
    names = {split: [i["file_name"] for i in coco(root, split).dataset["images"]] for split in
             ("train", "val", "test")}  # fmt: skip
    assert names == {
        "train": ["000001_01_01/020.png", "000001_01_01/040.png"],
        "val": ["000002_01_01/020.png"],
        "test": ["000003_01_01/009.png", "000004_01_01/012.png"],
    }
    counts = preparation.counts
    assert counts.key_slices.to_dict() == {"train": 2, "val": 1, "test": 2}
    assert counts.lesions.to_dict() == {"train": 3, "val": 1, "test": 2}
    assert counts.thin.to_dict() == {"train": 1, "val": 0, "test": 1}
    assert counts.thick.to_dict() == {"train": 1, "val": 0, "test": 1}
    assert counts.published.to_dict() == {"train": 22478, "val": 4791, "test": 4817}
    assert preparation.noisy == 1
    assert preparation.exit_code == 0
    assert len(preparation.problems) == 0


def test_masks_are_those_of_recist_and_find_the_lesions(prepared, capsys):
    root, _ = prepared
    table = read_dl_info(root / "DL_info.csv")
    folder = SliceFolder(root / "Images_png")
    for split in ("train", "val", "test"):
        opened = coco(root, split)
        rows = table[(table.split == split) & ~table.noisy]
        annotations = opened.loadAnns(opened.getAnnIds())
        for annotation, row in zip(annotations, rows.itertuples(), strict=True):
            assert opened.imgs[annotation["image_id"]]["file_name"] == row.file_name
            mask = opened.annToMask(annotation).astype(bool)
            drawn = mask_from_recist(folder.read(row.file_name), row.bbox, row.recist)
            assert np.array_equal(mask, drawn)
            truth = ellipse(row.recist.mean(0), row.diameters_px)
            assert (mask & truth).sum() / (mask | truth).sum() > 0.7


def test_released_masks_have_files_of_their_own(prepared, data):
    done = run_tool(data, "--workers", 1, "--masks", "released", "--cache", 3)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(data / "annotations_released")) == sorted(FILES)
    assert not (data / "annotations").exists() and (data / "slice_cache").is_dir()
    prepare(data, workers=1)
    assert written(data) == written(prepared[0])
    table = read_dl_info(data / "DL_info.csv")
    rows = table[(table.split == "train") & ~table.noisy].itertuples()
    folder = SliceFolder(data / "Images_png")
    default, released = (
        json.loads((data / name / "train.json").read_text())
        for name in ("annotations", "annotations_released")
    )
    drawn = COCO(str(data / "annotations_released" / "train.json"))
    for row, annotation in zip(rows, released["annotations"], strict=True):
        mask = released_mask_from_recist(folder.read(row.file_name), row.bbox, row.recist)
        assert np.array_equal(drawn.annToMask(annotation).astype(bool), mask)
    assert [c["info"].pop("masks") for c in (default, released)] == ["default", "released"]
    for content in (default, released):  # they differ in the masks alone
        for annotation in content["annotations"]:
            assert annotation.pop("segmentation") and annotation.pop("area")
    assert default == released


def test_masks_of_an_unknown_recipe_are_refused(data):
    with pytest.raises(ValueError, match="masks must be one of default, released, got 'grabcut'"):
        prepare(data, masks="grabcut")


def test_nothing_but_the_files_is_left(prepared):
    root, _ = prepared
    assert sorted(os.listdir(root / "annotations")) == sorted(FILES)


def test_same_bytes_whatever_the_number_of_workers(prepared, data):
    prepare(data, workers=3)
    assert written(data) == written(prepared[0])


def test_again_over_existing_files(prepared, data):
    prepare(data, workers=1)
    prepare(data, workers=1)
    assert written(data) == written(prepared[0])


def test_table_elsewhere(prepared, data, tmp_path):
    elsewhere = (data / "DL_info.csv").rename(tmp_path / "table.csv")
    prepare(data, csv=elsewhere, workers=1)
    assert written(data) == written(prepared[0])


def test_empty_splits_are_valid_coco(tmp_path, capsys):
    root = write_data(tmp_path, [lesion(1)])
    assert prepare(root, workers=1).counts.key_slices.to_dict() == {"train": 1, "val": 0, "test": 0}
    for split in ("val", "test"):
        assert coco(root, split).getImgIds() == []
        assert coco(root, split).getCatIds() == [1]


# Completeness


def test_partial_download_is_usable_and_said_to_be_partial(data):
    shutil.rmtree(data / "Images_png" / "000003_01_01")
    shutil.rmtree(data / "Images_png" / "000001_01_01")
    preparation = prepare(data, workers=1)
    assert image_names(data) == ["000002_01_01/020.png", "000004_01_01/012.png"]
    assert preparation.counts.not_downloaded.to_dict() == {"train": 2, "val": 0, "test": 1}
    assert preparation.exit_code == 0
    assert "PARTIAL DOWNLOAD: 3 of 5 key slices" in str(preparation)
    report = pd.read_csv(data / "annotations" / "report.csv")
    assert report.file_name.tolist() == [
        "000001_01_01/020.png",
        "000001_01_01/040.png",
        "000003_01_01/009.png",
    ]
    assert set(report.problem) == {"series not downloaded"}
    assert report.left_out.all()


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:500])


def make_8_bit(path):
    cv2.imwrite(str(path), np.zeros((SIZE, SIZE), np.uint8))


def make_smaller(path):
    write_slice(path, np.zeros((SIZE, SIZE - 1)))


@pytest.mark.parametrize(
    ("damage", "slice_file", "problem"),
    [
        (remove, "000003_01_01/009.png", "missing slice"),
        (remove, "000003_01_01/010.png", "missing slice"),
        (remove, "000003_01_01/006.png", "missing slice"),
        (truncate, "000003_01_01/009.png", "unreadable slice"),
        (make_8_bit, "000003_01_01/009.png", "unreadable slice"),
        (make_smaller, "000003_01_01/009.png", "wrong image size"),
    ],
)
def test_broken_key_slices_are_left_out_and_reported(data, damage, slice_file, problem):
    damage(data / "Images_png" / slice_file)
    preparation = prepare(data, workers=1)
    names = image_names(data)
    assert "000003_01_01/009.png" not in names
    assert len(names) == 4
    assert preparation.exit_code == 1
    assert preparation.counts.broken.to_dict() == {"train": 0, "val": 0, "test": 1}
    assert "MISSING OR UNREADABLE DATA: 1 key slices" in str(preparation)
    assert ("1 of them have another size than the table says" in str(preparation)) == (
        problem == "wrong image size"
    )
    report = pd.read_csv(data / "annotations" / "report.csv")
    pd.testing.assert_frame_equal(report, preparation.problems, check_dtype=False)
    assert report.file_name.tolist() == ["000003_01_01/009.png"]
    assert report.problem.tolist() == [problem]
    if problem != "wrong image size":
        assert slice_file in report.detail[0]


def test_neighbours_out_of_reach_may_be_missing(data):
    # 5 mm: a stack of 7 own slices reaches 3 away; 1.25 mm: 6 mm are 4.8 slices.
    for name in ("000003_01_01/005.png", "000001_01_01/034.png", "000001_01_01/046.png"):
        (data / "Images_png" / name).unlink()
    assert prepare(data, workers=1).exit_code == 0
    assert len(image_names(data)) == 5
    (data / "Images_png" / "000001_01_01/035.png").unlink()
    preparation = prepare(data, workers=1)
    assert preparation.exit_code == 1
    assert preparation.problems.file_name.tolist() == ["000001_01_01/040.png"]


# Where the data lies


def move_series(data, names, folder):
    (data / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (data / "Images_png" / name).rename(data / folder / name)


ALL_SERIES = [f"{patient:06d}_01_01" for patient in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "where",
    [
        {"Images_png/Images_png": ALL_SERIES},
        {"Images_png_01/Images_png": ALL_SERIES[:2], "Images_png_02/Images_png": ALL_SERIES[2:]},
        {"Images_png/Images_png": ALL_SERIES[2:]},
        {"Images_png/Images_png_03/Images_png": ALL_SERIES[:1], "png": ALL_SERIES[1:3]},
        {".": ALL_SERIES},
    ],
)
def test_series_are_found_wherever_archives_were_unpacked(prepared, data, where):
    """Each archive of NIH holds a folder Images_png of its own."""
    for folder, names in where.items():
        move_series(data, names, folder)
    preparation = prepare(data, workers=1)
    assert preparation.counts.not_downloaded.sum() == preparation.exit_code == 0
    for folder, names in where.items():
        assert f"{len(names)} series were found in {data / folder} and are taken" in str(
            preparation
        )
    for split in ("train", "val", "test"):
        content, expected = (
            json.loads((root / "annotations" / f"{split}.json").read_text())
            for root in (data, prepared[0])
        )
        recorded = content["info"].pop("images")
        assert set(where) <= set(recorded) and not any(os.path.isabs(name) for name in recorded)
        del expected["info"]["images"]
        assert content == expected
        slices = SliceFolder(*image_folders(content | {"info": {"images": recorded}}, data))
        for image in content["images"]:
            assert slices.read(image["file_name"]).shape == (SIZE, SIZE)


def test_a_series_in_two_places_is_not_guessed(data):
    for part in ("Images_png_01", "Images_png_02"):
        shutil.copytree(data / "Images_png" / ALL_SERIES[0], data / part / ALL_SERIES[0])
    assert prepare(data, workers=1).exit_code == 0, "it is where it is expected"
    shutil.rmtree(data / "Images_png" / ALL_SERIES[0])
    with pytest.raises(DataError, match="1 series lie in more than one place") as error:
        prepare(data, workers=1)
    assert str(data / "Images_png_02" / ALL_SERIES[0]) in str(error.value)
    given = [data / "Images_png", data / "Images_png_02"]
    preparation = prepare(data, workers=1, images=given)
    assert preparation.counts.not_downloaded.sum() == 0
    info = json.loads((data / "annotations" / "train.json").read_text())["info"]
    assert info["images"] == ["Images_png", "Images_png_02"] and info["masks"] == "default"


def test_copies_without_slices_do_not_count(data):
    """The slice cache, say, has folders called like the series."""
    move_series(data, ALL_SERIES[:1], "elsewhere")
    (data / "slice_cache" / ALL_SERIES[0]).mkdir(parents=True)
    (data / "slice_cache" / ALL_SERIES[0] / "020.b2nd").write_bytes(b"1")
    assert prepare(data, workers=1).counts.not_downloaded.sum() == 0


def test_the_table_is_found_near(prepared, data):
    (data / "doc").mkdir()
    (data / "DL_info.csv").rename(data / "doc" / "DL_info.csv")
    assert f"The table of lesions is {data / 'doc' / 'DL_info.csv'}" in str(
        prepare(data, workers=1)
    )
    assert written(data) == written(prepared[0])
    shutil.copytree(data / "doc", data / "copy")
    with pytest.raises(DataError, match="say with --csv which one"):
        prepare(data, workers=1)


def test_the_folder_of_images_given_as_root_finds_its_table(prepared, data):
    prepare(data / "Images_png", workers=1)
    content = json.loads((data / "Images_png" / "annotations" / "test.json").read_text())
    assert content["info"].pop("images") == ["."]
    assert len(content["images"]) == 2


def test_an_absent_folder_of_images_is_named(data):
    with pytest.raises(MissingDataError, match=r"--images .*nowhere: there is no such folder"):
        prepare(data, workers=1, images=[data / "nowhere"])


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_read_only_data_is_prepared_elsewhere(prepared, data, tmp_path):
    before, out = tree(data), tmp_path / "new" / "prepared"
    prepare(data, workers=1, out=out)
    assert tree(data) == before
    assert sorted(os.listdir(out)) == ["annotations"]
    content = json.loads((out / "annotations" / "train.json").read_text())
    assert content["info"].pop("images") == [str(data / "Images_png")]
    expected = json.loads((prepared[0] / "annotations" / "train.json").read_text())
    assert expected["info"].pop("images") == ["Images_png"] and content == expected
    report = fill_cache(out, 7, workers=1)
    assert report.written == report.slices > 7 and report.folder == out / "slice_cache"
    assert tree(data) == before


def test_a_root_that_cannot_be_written_to_is_told_of_out(data, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(WriteError, match=r"Read-only file system.*--out DIR"):
        prepare(data, workers=1)


def test_a_part_says_of_how_many_key_slices(data):
    shutil.rmtree(data / "Images_png" / "000003_01_01")
    prepare(data, workers=1)
    info = json.loads((data / "annotations" / "test.json").read_text())["info"]
    assert (info["key_slices"], info["table_key_slices"]) == (1, 2)


# What looks ordinary and is not


def test_slices_without_the_offset_are_refused_by_name(data):
    """Read as they are they would be -32,768 HU and a little more: all black."""
    path = data / "Images_png" / "000003_01_01" / "009.png"
    cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) - np.uint16(31744))
    preparation = prepare(data, workers=1)
    assert preparation.counts.broken["test"] == 1
    assert "holds no Hounsfield units" in preparation.problems.detail[0]


def test_a_blank_key_slice_holds_no_lesion(data):
    write_slice(data / "Images_png" / "000003_01_01" / "009.png", np.full((SIZE, SIZE), -1000))
    preparation = prepare(data, workers=1)
    assert preparation.problems.problem.tolist() == ["blank slice"]
    assert preparation.problems.detail.tolist() == ["all of it is -1000 HU"]


def test_a_table_of_noisy_lesions_alone_is_refused(tmp_path):
    root = write_data(tmp_path, [lesion(1, Possibly_noisy=1)])
    with pytest.raises(ValueError, match="all of its 1 lesions are flagged as noisy"):
        prepare(root, workers=1)
    assert not (root / "annotations").exists()


def test_boxes_out_of_their_image_and_recist_out_of_its_box_are_kept(tmp_path):
    rows = [
        lesion(1, 20, (91, 48)),
        lesion(2, 20, Bounding_boxes="41, 41, 57, 57"),
        lesion(3, 20),
    ]
    preparation = prepare(write_data(tmp_path, rows), workers=1)
    assert preparation.exit_code == 0
    assert len(image_names(tmp_path)) == 3
    problems = preparation.problems
    assert problems.file_name.tolist() == ["000001_01_01/020.png"] * 2 + ["000002_01_01/020.png"]
    assert problems.problem.tolist()[0] == "box outside image"
    assert set(problems.problem[1:]) == {"RECIST outside box"}
    assert not problems.left_out.any()
    assert "box outside image: 1 key slices, kept" in str(preparation)


def test_another_slice_range_of_one_key_slice_is_reported_and_kept(tmp_path, capfd):
    ranges = ("33, 39", "33, 38", "33, 39", "32, 38")
    rows = [
        lesion(1, 36, (20 * i, 48), (10, 6), Slice_range=ends) for i, ends in enumerate(ranges, 1)
    ]
    preparation = prepare(write_data(tmp_path, [*rows, lesion(2)]), workers=1)
    report = pd.read_csv(tmp_path / "annotations/report.csv")
    assert report.values.tolist() == [
        ["000001_01_01/036.png", "train", "several slice ranges",
         "33..39 counts, not 33..38, 32..38", False],
    ]  # fmt: skip
    assert "several slice ranges: 1 key slices, kept" in str(preparation)
    (image, _) = coco(tmp_path, "train").dataset["images"]
    assert image["slice_range"] == [33, 39]
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("missing", ["DL_info.csv", "Images_png", "all"])
def test_nothing_to_work_on_says_where_to_get_it(data, missing):
    if missing == "all":
        shutil.rmtree(data)
    elif missing == "Images_png":
        shutil.rmtree(data / missing)
    else:
        (data / missing).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        prepare(data)
    assert "https://nihcc.app.box.com/v/DeepLesion" in str(caught.value)
    assert f"make_phantom.py {data}" in str(caught.value)
    assert not (data / "annotations").exists()


def test_folder_of_other_images(data):
    images = data / "Images_png"
    for series in images.iterdir():
        series.rename(images / f"9{series.name[1:]}")
    with pytest.raises(FileNotFoundError, match="no image found"):
        prepare(data)


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(data, workers):
    with pytest.raises(ValueError, match="workers"):
        prepare(data, workers=workers)


@pytest.mark.parametrize("published", [True, False])
def test_published_counts_are_recognised(published):
    key_slices = {**PUBLISHED_KEY_SLICES, **({} if published else {"test": 4816})}
    counts = pd.DataFrame({"key_slices": key_slices, "published": PUBLISHED_KEY_SLICES})
    counts[["thin", "thick", "lesions", "not_downloaded", "broken"]] = 0
    problems = pd.DataFrame(columns=["file_name", "split", "problem", "detail", "left_out"])
    summary = str(Preparation(Path("x"), counts, problems, 35))
    assert ("are the published ones" in summary) == published
    assert ("published counts differ" in summary) != published
    assert "22,478" in summary


# Interruption


def interrupted(*args):
    raise KeyboardInterrupt


def interrupt_before_writing(root, monkeypatch, **options):
    """Stop once all masks are drawn, before a file is written; the cache is what remains."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write_annotations", interrupted)
        prepare(root, workers=1, **options)
    cache = options.get("out", root) / "annotations" / "unfinished.jsonl"
    assert os.listdir(cache.parent) == [cache.name]
    return cache


def repaint(root, folder="Images_png"):
    """Give every key slice a content that yields other masks: to see which are drawn again."""
    for path in (root / folder).rglob("*.png"):
        write_slice(path, np.random.default_rng(1).integers(-500, 500, (SIZE, SIZE)))


def test_finished_key_slices_are_not_drawn_again(prepared, data, monkeypatch):
    interrupt_before_writing(data, monkeypatch)
    repaint(data)
    prepare(data, workers=1)
    assert written(data) == written(prepared[0])
    # The cache is gone with the end of the work: now they are drawn anew.
    prepare(data, workers=1)
    assert written(data) != written(prepared[0])


@pytest.mark.parametrize("torn", [b'{"file_name":"0', b"\0" * 9999, b'{"a":1}'])
@pytest.mark.parametrize("kept_lines", [0, 1, 3])
def test_torn_cache_is_cut_where_it_is_torn(prepared, data, monkeypatch, kept_lines, torn):
    cache = interrupt_before_writing(data, monkeypatch)
    lines = cache.read_bytes().splitlines(keepends=True)
    cache.write_bytes(b"".join(lines[:kept_lines]) + torn)
    interrupt_before_writing(data, monkeypatch)
    assert cache.read_bytes() == b"".join(lines)
    prepare(data, workers=1)
    assert written(data) == written(prepared[0])


def test_cache_of_other_images_is_not_used(data, tmp_path, monkeypatch):
    shutil.copytree(data / "Images_png", data / "other")
    repaint(data, "other")
    out = tmp_path / "out"
    interrupt_before_writing(data, monkeypatch, out=out)
    prepare(data, workers=1, out=out, images=[data / "other"])
    prepare(data, workers=1, out=tmp_path / "anew", images=[data / "other"])
    assert written(out) == written(tmp_path / "anew")


def test_cache_of_another_table_or_mask_code_is_not_used(data, monkeypatch):
    cache = interrupt_before_writing(data, monkeypatch)
    before = cache.read_bytes()
    rows = mixed_rows()
    rows[0]["Patient_age"] = 63
    write_table(data, rows)
    repaint(data)
    interrupt_before_writing(data, monkeypatch)
    assert cache.read_bytes().splitlines()[0] != before.splitlines()[0]
    assert cache.read_bytes().splitlines()[1] != before.splitlines()[1]
    drawn = cache.read_bytes().splitlines()[0]
    for code in (recist, slices):
        with monkeypatch.context() as patch:
            patch.setattr(code, "__file__", str(TOOL))
            interrupt_before_writing(data, monkeypatch)
        assert cache.read_bytes().splitlines()[0] != drawn


def test_what_was_broken_is_looked_at_again(prepared, data, monkeypatch):
    broken = data / "Images_png" / "000003_01_01" / "009.png"
    content = broken.read_bytes()
    truncate(broken)
    interrupt_before_writing(data, monkeypatch)
    broken.write_bytes(content)
    prepare(data, workers=1)
    assert written(data) == written(prepared[0])


def test_unfinished_files_never_bear_the_final_name(prepared, data, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupted)
        prepare(data, workers=1)
    assert not any((data / "annotations" / name).exists() for name in FILES)
    prepare(data, workers=1)
    assert written(data) == written(prepared[0])
    assert sorted(os.listdir(data / "annotations")) == sorted(FILES)


def hear_interrupts():
    """What a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_for_real_it_continues(tmp_path, sent):
    # Lesions large enough for GrabCut to take a while, all on copies of one slice.
    own = {"Slice_range": "1, 1", "Image_size": "256, 256"}
    rows = [lesion(patient, 1, (128, 128), (110, 90), **own) for patient in range(1, 41)]
    root = write_data(tmp_path / "data", rows[:1], size=256)
    write_table(root, rows)
    for row in rows[1:]:
        series = root / "Images_png" / row["File_name"][:12]
        shutil.copytree(root / "Images_png" / "000001_01_01", series)
    cache = root / "annotations" / "unfinished.jsonl"
    running = subprocess.Popen(
        [sys.executable, TOOL, root, "--workers", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    while not (cache.exists() and cache.read_bytes().count(b"\n") > 3) and running.poll() is None:
        time.sleep(0.005)
    workers = children(running.pid)
    assert len(workers) >= 2
    # As a terminal does it: Ctrl-C goes to every process of the group.
    (os.killpg if sent == signal.SIGINT else os.kill)(running.pid, sent)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert (b"the same command continues" in errors) == (sent == signal.SIGINT)
    # A killed process leaves its lock, which the next call takes over.
    locks = {"prepare.lock"} if sent == signal.SIGKILL else set()
    assert {*os.listdir(root / "annotations")} == {cache.name, *locks}
    finished = cache.read_bytes().count(b"\n") - 1
    assert 3 <= finished < 40

    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.02)

    resumed = run_tool(root, "--workers", 2)
    assert resumed.returncode == 0
    after_break = written(root)
    prepare(root, workers=1)
    assert written(root) == after_break
    assert len(image_names(root)) == 40


# The command


def test_command_works_from_anywhere(prepared, data, tmp_path):
    done = run_tool("DeepLesion", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "key slices" in done.stdout
    assert written(data) == written(prepared[0])


def test_command_takes_the_places_of_images_and_of_what_it_writes(prepared, data, tmp_path):
    (data / "Images_png").rename(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / ALL_SERIES[0]).rename(tmp_path / "b" / ALL_SERIES[0])
    done = run_tool(
        data, "--workers", 1, "--images", tmp_path / "a", "--images", tmp_path / "b",
        "--out", tmp_path / "out", "--cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PARTIAL" not in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["annotations", "slice_cache"]
    assert image_names(tmp_path / "out") == image_names(prepared[0])
    assert os.listdir(data) == ["DL_info.csv"]


def test_command_fails_on_missing_data(data):
    (data / "Images_png" / "000003_01_01" / "009.png").unlink()
    done = run_tool(data, "--workers", 1)
    assert done.returncode == 1
    assert "missing slice: 1 key slices, left out" in done.stdout


def test_command_names_bad_rows(data):
    rows = mixed_rows()
    rows[4]["Bounding_boxes"] = "1, 2, 3"
    write_table(data, rows)
    done = run_tool(data)
    assert done.returncode == 2
    assert "line 6, Bounding_boxes = '1, 2, 3'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (data / "annotations").exists()


def test_command_without_data(tmp_path):
    done = run_tool(tmp_path / "nothing")
    assert done.returncode == 2
    assert "https://nihcc.app.box.com/v/DeepLesion" in done.stderr
    assert "Traceback" not in done.stderr
