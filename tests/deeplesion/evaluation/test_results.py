"""Result files are refused for what is wrong with them; what fuzzing found among it."""

import copy
import gzip
import json
import math
from dataclasses import replace

import pytest

from deeplesion.evaluation.evaluate import froc_table
from deeplesion.evaluation.results import (
    other_weights,
    read_results,
    table_file,
    write_results,
    write_table,
)


@pytest.fixture(scope="module")
def whole(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "results.json"
    write_results(path, results[0].records[:2])
    return json.loads(path.read_text())


@pytest.fixture
def first(whole):
    """A file's content, to be changed, and its first image."""
    content = copy.deepcopy(whole)
    return content, content["images"][0]


def said_of(content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"results\.json") as refused:
        read_results(path)
    return str(refused.value)


BOX = [1, 2, 3, 4]
LESION = dict(bbox=BOX)
BAD = {
    "name": (dict(file_name=3), "file_name must be a text"),
    "patient": (dict(patient=[]), "patient must be"),
    "height": (dict(height=0), "height and width must be numbers of pixels"),
    "spacing": (dict(spacing_mm=-1), "spacing_mm must be a size of a pixel in mm"),
    "thickness": (dict(thickness_mm=math.nan), "thickness_mm must be a number of mm"),
    "thickness in metres": (dict(thickness_mm=0.005), "thickness_mm must be a number of mm"),
    "spacing in metres": (dict(spacing_mm=0.0008), "spacing_mm must be a size of a pixel in mm"),
    "boxes of a larger image": (
        dict(boxes=[[400, 2, 430, 9]], scores=[1]),
        "boxes must lie in the image",
    ),
    "lesion elsewhere": (
        dict(lesions=[dict(bbox=[1, 400, 3, 430])]),
        "bbox of a lesion must lie in the image",
    ),
    "a lesion twice": (dict(lesions=[LESION, LESION]), "two lesions have the same bbox"),
    "row": (dict(lesions=[{**LESION, "lesion_idx": "1"}]), "lesion_idx must be a whole number"),
    "range": (dict(slice_range=[1]), "slice_range must be two numbers"),
    "no boxes": (dict(boxes=None), "boxes must be lists"),
    "ragged boxes": (dict(boxes=[BOX, [1]]), "boxes must be lists"),
    "text in boxes": (dict(boxes=[["1", 2, 3, 4]]), "boxes must be lists"),
    "NaN score": (dict(boxes=[BOX], scores=[math.nan]), "boxes must be lists"),
    "turned over": (dict(boxes=[[3, 2, 1, 4]], scores=[1]), "boxes must have x1 <= x2"),
    "too few scores": (dict(boxes=[BOX], scores=[]), "1 boxes, but 0 scores"),
    "too few masks": (dict(boxes=[BOX], scores=[1], masks=[]), "1 boxes, but 0 masks"),
    "no list of masks": (dict(masks={}), "masks must be a list"),
    "no mask": (dict(boxes=[BOX], scores=[1], masks=[None]), "masks must be run lengths"),
    "no lesions": (dict(lesions=None), "lesions must be a list"),
    "no lesion": (dict(lesions=[3]), "lesions must be a list"),
    "lesion without box": (dict(lesions=[{}]), "bbox of a lesion must be"),
    "lesion turned over": (dict(lesions=[dict(bbox=[1, 4, 3, 2])]), "bbox of a lesion must be"),
    "recist": (dict(lesions=[{**LESION, "recist": [1]}]), "recist of a lesion must be 8 numbers"),
    "type": (dict(lesions=[{**LESION, "lesion_type": []}]), "lesion_type must be"),
    "no type": (dict(lesions=[{**LESION, "lesion_type": 0}]), "lesion_type must be one of 1, 2"),
    "mask": (dict(lesions=[{**LESION, "mask": "0"}]), "masks must be run lengths"),
}


@pytest.mark.parametrize("changes, expected", BAD.values(), ids=BAD)
def test_bad_records_are_named(first, tmp_path, changes, expected):
    content, image = first
    image.update(changes)
    said = said_of(content, tmp_path)
    assert expected in said and f"image 1 ({image['file_name']})" in said


def test_run_lengths_of_another_image(first, tmp_path):
    content, image = first
    image["masks"][-1]["counts"] = image["masks"][-1]["counts"][:-3]
    assert "run lengths of a mask are not those of its image" in said_of(content, tmp_path)
    image["masks"][-1]["size"] = [8, 8]
    assert "masks must be run lengths of the image's size" in said_of(content, tmp_path)


def test_an_image_twice_would_count_twice(first, tmp_path):
    content, image = first
    content["images"].append(image)
    assert "image 3" in (said := said_of(content, tmp_path)) and "in the file twice" in said


def test_fractions_are_no_boxes(first, tmp_path):
    content, _ = first
    for image in content["images"]:
        image.update(boxes=[[0.1, 0.2, 0.3, 0.9]], scores=[1.0], masks=image["masks"][:1])
    assert "boxes must be in pixels" in said_of(content, tmp_path)


def test_one_score_for_all_is_warned_of(first, tmp_path):
    content, _ = first
    path = tmp_path / "results.json"
    for image in content["images"]:
        boxes = [[float(i), 1.0, i + 5.0, 9.0] for i in range(10)]
        image.update(boxes=boxes, scores=[1.0] * 10, masks=image["masks"][:1] * 10)
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="all of its 20 detections have the score 1"):
        read_results(path)


def test_how_many_key_slices_there_should_be(results, whole, tmp_path):
    path = tmp_path / "results.json"
    write_results(path, results[0].records[:2], 4817)
    assert read_results(path).table_key_slices == 4817
    of_old = {key: value for key, value in whole.items() if key != "table_key_slices"}
    path.write_text(json.dumps(of_old))
    assert read_results(path).table_key_slices is None
    assert "table_key_slices must be" in said_of({**whole, "table_key_slices": "all"}, tmp_path)


def test_what_test_time_augmentation_made_is_marked(results, whole, tmp_path):
    path = tmp_path / "results.json"
    assert "views" not in whole and read_results_of(whole, path, "mine").name == "mine"
    write_results(path, results[0].records[:2], views=["horizontal", "depth"])
    assert json.loads(path.read_text())["views"] == ["horizontal", "depth"]
    back = read_results(path, "mine")
    assert back.name == "mine (TTA: horizontal, depth)" and back.views == ("horizontal", "depth")
    assert read_results(path).name == "(TTA: horizontal, depth)"
    assert "views must be a list of names" in said_of({**whole, "views": [1]}, tmp_path)


MODEL = dict(config="demo/a3d", checkpoint="best_8.pth", checkpoint_sha256="0" * 64)


def test_what_was_tested_is_told_and_may_be_unknown(results, whole, tmp_path):
    path = tmp_path / "results.json"
    assert "model" not in whole and read_results_of(whole, path, "").model is None
    write_results(path, results[0].records[:2], model=MODEL)
    assert json.loads(path.read_text())["model"] == MODEL == read_results(path).model
    for wrong in ("best_8.pth", {**MODEL, "checkpoint": 8}, {"config": "a3d"}):
        assert "model must be null, or the texts config" in said_of(
            {**whole, "model": wrong}, tmp_path
        )


def test_other_weights_are_those_of_another_file(results, tmp_path):
    path = tmp_path / "results.json"
    other = {**MODEL, "checkpoint_sha256": "1" * 64}
    assert other_weights(path, MODEL) == ""  # there is no result
    for model, before in ((None, ""), (MODEL, "best_8.pth")):
        result = replace(results[0], model=model)
        write_table(table_file(path), froc_table(result.records), result)
        assert other_weights(path, other) == before
        assert other_weights(path, {**MODEL, "checkpoint": "a_copy.pth"}) == ""
    table_file(path).write_text("[]")
    assert other_weights(path, other) == ""


def read_results_of(content, path, name):
    path.write_text(json.dumps(content))
    return read_results(path, name)


def test_lesions_may_be_without_mask(first, tmp_path):
    content, image = first
    image["lesions"][0]["mask"] = None
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    assert len(read_results(path).records) == 2


@pytest.mark.parametrize("images", [None, 3, [3], {}])
def test_no_list_of_images(whole, tmp_path, images):
    assert "'images' is not a list of images" in said_of({**whole, "images": images}, tmp_path)


def test_damage_within_a_compressed_file(whole, tmp_path):
    data = bytearray(gzip.compress(json.dumps(whole).encode()))
    path = tmp_path / "results.json.gz"
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 0x55
        path.write_bytes(changed)
        try:
            assert len(read_results(path).records) == 2  # the time in the header, say
        except ValueError as refused:
            assert "results.json.gz" in str(refused)
