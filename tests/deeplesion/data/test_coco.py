"""Annotation files are refused for what is wrong with them; run lengths against pycocotools."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from deeplesion.data.coco import encode_mask, image_folders, lesion_of, read_annotations
from deeplesion.data.run_lengths import mask_areas
from deeplesion.errors import DataError, MissingDataError


@pytest.fixture(scope="module")
def whole(phantom):
    return json.loads((phantom / "annotations/train.json").read_text())


@pytest.fixture
def content(whole):
    return copy.deepcopy(whole)


def read(folder, content, **options):
    path = folder / "train.json"
    path.write_text(json.dumps(content))
    return read_annotations(path, **options)


def mask_of(image, value=0, height=0):
    mask = np.full((image["height"] + height, image["width"]), value, np.uint8)
    return encode_mask(mask)


def test_what_was_prepared_is_read(phantom, whole):
    for split in ("train", "val", "test"):
        read_annotations(phantom / f"annotations/{split}.json", need_lesions=True)
    assert read_annotations(phantom / "annotations/train.json") == whole


def test_missing_file(tmp_path):
    with pytest.raises(MissingDataError, match=r"train\.json does not exist"):
        read_annotations(tmp_path / "train.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"images": 3}', "\0", '{"images": [1]}'])
def test_what_is_no_annotation_file(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError, match=r"train\.json"):
        read_annotations(tmp_path / "train.json")


@pytest.mark.parametrize("folder", ["\ud800/Images_png", "\0", "a\nb"])
def test_folders_that_cannot_be_are_refused_or_left_out(tmp_path, content, folder):
    content["info"] = dict(content.get("info", {}), images=[folder, "Images_png_01"])
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    if folder.isascii():
        folders = image_folders(read_annotations(path), tmp_path)
        assert folders == [tmp_path / "Images_png", tmp_path / "Images_png_01"]
    else:
        with pytest.raises(DataError, match="surrogates not allowed"):
            read_annotations(path)


def test_files_without_images_or_lessons(tmp_path, content):
    content["annotations"] = []
    assert read(tmp_path, content) == content
    with pytest.raises(DataError, match=r"train\.json holds no lesions: there is nothing to learn"):
        read(tmp_path, content, need_lesions=True)
    content["images"] = []
    with pytest.raises(DataError, match=r"train\.json holds no key slices"):
        read(tmp_path, content)


# What is changed in the first annotation, and what is said about it.
BAD_ANNOTATIONS = {
    "zero width": (dict(bbox=[10, 10, 0, 5]), "bbox: .*above 0, got .10, 10, 0, 5."),
    "negative height": (dict(bbox=[10, 10, 5, -1]), "bbox: .*above 0"),
    "NaN box": (dict(bbox=[10, math.nan, 5, 5]), "bbox: .*finite numbers, got .10, nan"),
    "infinite box": (dict(bbox=[10, 10, math.inf, 5]), "bbox: .*finite"),
    "huge box": (dict(bbox=[10, 10, 10**400, 5]), "bbox: .*finite"),
    "three numbers": (dict(bbox=[10, 10, 5]), "bbox: .*finite"),
    "text": (dict(bbox="10 10 5 5"), "bbox: .*finite"),
    "left of the image": (dict(bbox=[-3, 10, 5, 5]), "bbox: .*within the image, .128, 128."),
    "below the image": (dict(bbox=[10, 125, 5, 5]), "bbox: .*within the image"),
    "another category": (dict(category_id=2), "category_id: expected 1, got 2"),
    "a crowd": (dict(iscrowd=1), "iscrowd: expected 0: the benchmark knows no regions to ignore"),
    "a row": (dict(lesion_idx=-1), "lesion_idx: expected the number of a row"),
    "no diameter": (dict(diameters_mm=[0, 0]), "diameters_mm: expected 2 numbers above 0"),
    "a mask of all pixels": (
        dict(bbox=[10, 10, 5, 5], segmentation=encode_mask(np.ones((128, 128)))),
        "segmentation: the mask, 16384 pixels, is not of its box",
    ),
    "another image": (dict(image_id=999), "image_id: expected the id of one of the images"),
    "image of no kind": (dict(image_id=[]), "image_id: expected"),
    "no number": (dict(id="a"), "id: expected a whole number, each but once, got 'a'"),
    "recist of four": (dict(recist=[1, 2, 3, 4]), "recist: expected 8 numbers or null"),
    "diameters": (dict(diameters_mm=[1, None]), "diameters_mm: expected 2 numbers"),
    "type": (dict(lesion_type=9), "lesion_type: expected one of"),
    "polygon": (dict(segmentation=[[1, 1, 5, 1, 5]]), "segmentation: expected polygons"),
    "list of runs": (dict(segmentation=dict(size=[128, 128], counts=[1, 2])), "or run lengths"),
    "no runs": (dict(segmentation=dict(size=[128, 128], counts="")), "run lengths"),
}


@pytest.mark.parametrize("changes, said", BAD_ANNOTATIONS.values(), ids=BAD_ANNOTATIONS)
def test_bad_annotations_are_named(tmp_path, content, changes, said):
    content["annotations"][0].update(changes)
    with pytest.raises(DataError, match=rf"1 problem\n  annotation 1 \(id .*{said}"):
        read(tmp_path, content)


def test_masks_that_do_not_fit_or_are_empty(tmp_path, content):
    image, annotation = content["images"][0], content["annotations"][0]
    assert annotation["image_id"] == image["id"]
    annotation["segmentation"] = mask_of(image, value=1, height=1)
    with pytest.raises(DataError, match=r"segmentation: .*image's size, \[128, 128\]"):
        read(tmp_path, content)
    # Runs of a higher image, under the size of this one: pycocotools would write beyond its end.
    annotation["segmentation"]["size"] = [128, 128]
    with pytest.raises(DataError, match="run lengths are not those of such an image"):
        read(tmp_path, content)
    annotation["segmentation"] = mask_of(image)
    with pytest.raises(DataError, match="segmentation: the mask is empty"):
        read(tmp_path, content)


BAD_IMAGES = {
    "name": (dict(file_name="103.png"), "file_name: expected a name like"),
    "unprintable name": (dict(file_name="a\0/103.png"), "file_name: expected"),
    "another name's": (dict(file_name="{1}"), "file_name: expected one that no other image has"),
    "height": (dict(height=0), "height: expected a number of pixels, got 0"),
    "width": (dict(width=128.5), "width: expected a number of pixels"),
    "spacing": (dict(spacing_mm=0), "spacing_mm: expected a size of a pixel in mm"),
    "metres": (dict(thickness_mm=0.005), "thickness_mm: expected a number of mm, 0.05 to 50"),
    "path": (dict(file_name="../a/103.png"), "file_name: expected a name below Images_png"),
    "thickness": (dict(thickness_mm="1"), "thickness_mm: expected a number of mm"),
    "range": (dict(slice_range=[1, 2]), "slice_range: .*key slice in between"),
    "one end": (dict(slice_range=[1]), "slice_range: "),
    "patient": (dict(patient=[1]), "patient: expected a number"),
    "id": (dict(id=True), "id: expected a whole number"),
}


@pytest.mark.parametrize("changes, said", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_named(tmp_path, content, changes, said):
    if changes.get("file_name") == "{1}":
        changes = dict(file_name=content["images"][1]["file_name"], slice_range=[0, 9999])
    content["images"][0].update(changes)
    with pytest.raises(DataError, match=rf"train\.json: \d+ problems?\n(.*\n)*  image \d .*{said}"):
        read(tmp_path, content)


def test_missing_fields_and_doubled_ids(tmp_path, content):
    height = content["images"][0].pop("height")
    with pytest.raises(DataError, match="height: expected a number of pixels, got nothing"):
        read(tmp_path, content)
    content["images"][0]["height"] = height
    content["annotations"].append(dict(content["annotations"][0]))
    with pytest.raises(DataError, match="id: expected a whole number, each but once, got 1"):
        read(tmp_path, content)


def test_a_lesion_twice_would_count_twice(tmp_path, content):
    content["annotations"].append({**content["annotations"][0], "id": 999_999})
    said = r"bbox: expected each lesion once, this is the box of annotation 1"
    with pytest.raises(DataError, match=said):
        read(tmp_path, content)


def test_boxes_in_fractions_of_the_image(tmp_path, content):
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation.update(bbox=[x / 128, y / 128, width / 128, height / 128], segmentation=None)
    with pytest.raises(DataError, match="expected pixels, got fractions of the image"):
        read(tmp_path, content)


# Files of others


def foreign(content):
    """What COCO asks for and no more."""
    return dict(
        images=[
            dict(id=image["id"], file_name=f"{i}.png", height=image["height"], width=image["width"])
            for i, image in enumerate(content["images"])
        ],
        annotations=[
            {key: a[key] for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")}
            for a in content["annotations"]
        ],
        categories=[dict(id=1, name="nodule")],
    )


def test_boxes_alone_will_do(tmp_path, content):
    read(tmp_path, foreign(content), need_lesions=True)
    lesion = lesion_of(foreign(content)["annotations"][0], content["images"][0])
    x, y, width, height = content["annotations"][0]["bbox"]
    assert lesion["bbox"] == [x, y, x + width, y + height]
    assert lesion["mask"] is lesion["recist"] is lesion["diameters_mm"] is None


def test_polygons_and_plain_runs_are_masks_too(tmp_path, content):
    mask = np.zeros((128, 128), np.uint8)
    mask[10:20, 10:30] = 1
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=2, append=2)), prepend=0).tolist()
    for segmentation in (
        [[10, 10, 30, 10, 30, 20, 10, 20]],
        dict(size=[128, 128], counts=runs[1:]),
    ):
        content["annotations"][0].update(bbox=[10, 10, 19, 9], segmentation=segmentation)
        read(tmp_path, content)
        lesion = lesion_of(content["annotations"][0], content["images"][0])
        np.testing.assert_array_equal(coco_mask.decode(lesion["mask"]), mask)


def test_another_category_is_refused(tmp_path, content):
    content["categories"].append(dict(id=2, name="vessel"))
    with pytest.raises(DataError, match=r"expected one category, such as 'lesion', got .*vessel"):
        read(tmp_path, content)


def test_the_first_twenty_problems_are_listed(tmp_path, content):
    content["annotations"] = [
        {**content["annotations"][0], "id": i + 1, "category_id": 7} for i in range(50)
    ]
    with pytest.raises(DataError, match=r"50 problems\n(  annotation.*\n){20}  and 30 more") as at:
        read(tmp_path, content)
    assert "Run tools/prepare_data.py again" in str(at.value)


# Run lengths


@given(st.lists(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 9))), max_size=6))
@settings(deadline=None)
def test_areas_are_those_of_the_masks(masks):
    counts = [encode_mask(mask)["counts"] for mask in masks]
    pixels = [mask.size for mask in masks]
    assert mask_areas(counts, pixels).tolist() == [mask.sum() for mask in masks]
    assert (mask_areas(counts, [size + 1 for size in pixels]) == -1).all()


def test_long_runs_and_many_masks():
    mask = np.zeros((65_000, 3), np.uint8)
    mask[5:7] = mask[-2:] = 1
    counts = encode_mask(mask)["counts"]
    assert (mask_areas([counts] * 5000, [mask.size] * 5000) == mask.sum()).all()


@given(st.lists(st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=12)))
@settings(deadline=None)
def test_what_is_accepted_pycocotools_decodes_to_the_same(texts):
    areas = mask_areas(texts, [6] * len(texts))
    for text, area in zip(texts, areas):
        if area >= 0:
            rle = dict(size=[2, 3], counts=text)
            assert coco_mask.decode(rle).sum() == coco_mask.area(rle) == area


@pytest.mark.parametrize(
    "bad",
    # Among them: no end; runs 0, 8 and -2; 6 in more groups than any number needs.
    ["", None, 5, b"06", "é", "\0", "0o", "o", "p", "ooooooooo0", "7/", "08N", "VPPPPPPP0"],
)
def test_what_no_mask_has_is_refused_and_alone(bad):
    good = encode_mask(np.ones((2, 3), np.uint8))["counts"]
    assert mask_areas([good, bad, good], [6, 6, 6]).tolist() == [6, -1, 6]
