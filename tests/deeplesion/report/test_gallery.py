"""What a gallery shows, on records worked out by hand."""

import base64
import json

import cv2
import numpy as np
import pytest

from deeplesion.data.coco import encode_mask
from deeplesion.data.dl_info import read_dl_info
from deeplesion.data.slices import SliceFolder
from deeplesion.evaluation.results import Result
from deeplesion.report.gallery import MAX_SIDE, collect

SIZE = 200
HERE, THERE = [20.0, 20.0, 50.0, 50.0], [120.0, 120.0, 140.0, 150.0]
NOWHERE, ELSEWHERE = [20.0, 120.0, 40.0, 140.0], [120.0, 20.0, 150.0, 50.0]


def mask_of(box):
    mask = np.zeros((SIZE, SIZE), bool)
    x1, y1, x2, y2 = (int(v) for v in box)
    mask[y1 + 5 : y2 - 4, x1 + 5 : x2 - 4] = True
    return encode_mask(mask)


def lesion(box, kind=5, diameters=(22.0, 11.0)):
    diameters = list(diameters) if diameters else None
    return dict(bbox=box, mask=mask_of(box), recist=None, diameters_mm=diameters, lesion_type=kind)


def record(lesions, found, name="a/001.png", thickness=1.0, masks=True):
    fields = dict(
        file_name=name,
        patient=7,
        height=SIZE,
        width=SIZE,
        spacing_mm=0.5,
        thickness_mm=thickness,
        lesions=lesions,
        boxes=[box for box, _ in found],
        scores=[score for _, score in found],
    )
    return fields | ({"masks": [mask_of(box) for box, _ in found]} if masks else {})


def gallery(*records, examples=100, **fields):
    return collect(Result("result", list(records)), examples, **fields)


def kinds(found):
    return [finding["kind"] for finding in found["findings"]]


def test_findings_by_hand():
    """One false positive an image is reached at 0.5: what scores less is not shown."""
    found = gallery(
        record(
            [lesion(HERE), lesion(THERE, 2)],
            [(HERE, 0.9), (NOWHERE, 0.5), (ELSEWHERE, 0.4), (THERE, 0.3)],
        )
    )
    assert found["threshold"] == 0.5
    assert found["counts"] == {"false positive": 1, "missed": 1, "hit": 1}
    false, missed, hit = found["findings"]
    assert [f["kind"] for f in (false, missed, hit)] == ["false positive", "missed", "hit"]
    assert (false["score"], missed["score"], hit["score"]) == (0.5, 0.3, 0.9)
    assert false["types"] == ["abdomen", "lung"] and missed["types"] == ["abdomen"]
    assert hit["types"] == ["lung"] and hit["annotated"] == [22.0, 11.0]
    assert false["annotated"] is None and false["size"] == "< 10 mm"
    # 11 pixels of 0.5 mm from the mask's edge to its other one, and the diagonal of that square.
    assert hit["predicted"] == pytest.approx([21 * 2**0.5 / 2, 21 * 2**0.5 / 2], abs=1)
    assert missed["found"]["box"] == [v + 0.5 for v in THERE]
    assert [o["verdict"] for o in false["others"]] == ["hit"]
    assert [o["verdict"] for o in hit["others"]] == ["false positive"]
    assert [len(f["truth"]) for f in found["findings"]] == [2, 2, 2]
    assert missed["truth"][1]["recist"] is None and "pictures" not in missed


def test_lesions_with_boxes_alone_are_shown():
    found = gallery(record([dict(bbox=HERE), dict(bbox=THERE)], [(HERE, 0.9)]))
    assert sorted(kinds(found)) == ["hit", "missed"]
    assert all(f["annotated"] is None and f["types"] == ["unknown"] for f in found["findings"])


def test_lesions_without_a_detection_are_missed_without_a_score():
    found = gallery(record([lesion(HERE)], []))
    assert found["threshold"] is None
    assert found["counts"] == {"false positive": 0, "missed": 1, "hit": 0}
    (missed,) = found["findings"]
    assert missed["score"] is missed["found"] is missed["predicted"] is None


def test_most_confident_and_largest_come_first_and_are_kept():
    records = [
        record([lesion(HERE, diameters=(5.0 + i, 3.0)), lesion(THERE)],
               [(THERE, 0.5 + i / 100), (NOWHERE, 0.8 - i / 100)])
        for i in range(10)
    ]  # fmt: skip
    found = gallery(*records, examples=3)
    assert found["counts"] == {"false positive": 10, "missed": 10, "hit": 10}
    assert kinds(found) == ["false positive"] * 3 + ["missed"] * 3 + ["hit"] * 3
    scores = [f["score"] for f in found["findings"]]
    assert scores[:3] == pytest.approx([0.8, 0.79, 0.78])
    assert scores[6:] == pytest.approx([0.59, 0.58, 0.57])
    assert [f["annotated"][0] for f in found["findings"][3:6]] == [14, 13, 12]
    assert gallery(*records, examples=0)["findings"] == []


def test_repeats_are_neither():
    near = [21.0, 20.0, 51.0, 50.0]
    found = gallery(record([lesion(HERE)], [(HERE, 0.9), (near, 0.8)]))
    assert kinds(found) == ["hit"]
    assert found["findings"][0]["others"] == [dict(box=[v + 0.5 for v in near], verdict="repeat")]


def test_unknown_things_are_named_so_and_json_holds_all():
    bare = lesion(HERE, diameters=None) | dict(mask=None)
    del bare["lesion_type"]
    found = gallery(record([bare], [(NOWHERE, 0.5)], thickness=np.nan, masks=False), record([], []))
    for finding in found["findings"]:
        assert finding["thickness_mm"] is None and finding["thickness"] == "unknown"
        assert finding["types"] == ["unknown"] and finding["size"] == "unknown"
        assert finding["truth"][0]["outline"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "box",
    [
        HERE,
        [0.0, 0.0, 3.0, 3.0],
        [190.0, 5.0, 199.0, 9.0],
        [10.0, 10.0, 190.0, 180.0],
        [90.0, 60.0, 100.0, 110.0],
    ],
)
def test_view_is_a_square_in_the_slice_around_the_box(box):
    (hit,) = gallery(record([lesion(box)], [(box, 0.9)]))["findings"]
    x, y, side = hit["view"]
    assert min(x, y) >= 0 and max(x, y) + side <= SIZE
    assert x <= box[0] and box[2] < x + side and y <= box[1] and box[3] < y + side
    assert side == min(max(3 * (box[2] - box[0]), 3 * (box[3] - box[1]), 64), SIZE)


def decoded(uri):
    kind, content = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_UNCHANGED)


def test_pictures_are_the_view_of_the_key_slice_and_its_neighbours(phantom):
    table = read_dl_info(phantom / "DL_info.csv")
    inner = [row.slice_range[0] + 4 < row.key_slice < row.slice_range[1] - 4
             for row in table.itertuples()]  # fmt: skip
    row = table[inner].iloc[0]
    x = record([lesion(row.bbox.tolist())], [], row.file_name, 5.0)
    x |= dict(height=int(row.height), width=int(row.width), slice_range=list(row.slice_range))
    x["lesions"][0]["mask"] = None
    (missed,) = gallery(x, folder=SliceFolder(phantom / "Images_png"))["findings"]
    assert missed["distances"] == [0, -5, 5]
    left, top, side = missed["view"]
    path = phantom / "Images_png" / row.file_name
    hu = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(float) - 32768
    key = decoded(missed["pictures"][0])
    assert key.shape == (side, side) and side <= MAX_SIDE
    hu = hu[top : top + side, left : left + side]
    # Brighter where the slice is: JPEG is lossy, and the window clips.
    for low, high in ((-160, 240), (-1350, 150)):
        grey = np.clip((hu - low) / (high - low), 0, 1) * 255
        if np.abs(grey - key).mean() < 6:
            break
    else:
        raise AssertionError("the picture is not the view of the slice")
    pictures = [decoded(uri) for uri in missed["pictures"]]
    assert len(pictures) == 3 and not np.array_equal(pictures[1], pictures[2])


def test_missing_slices_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a/001\.png"):
        gallery(record([lesion(HERE)], []), folder=SliceFolder(tmp_path))
