"""Pictures of a result: what is drawn where, and which neighbours are shown."""

import cv2
import numpy as np
import pytest

from deeplesion.data.coco import encode_mask
from deeplesion.data.dl_info import read_dl_info
from deeplesion.data.slices import SliceFolder
from deeplesion.evaluation.results import Result
from deeplesion.report.pictures import (
    BAR,
    COLOURS,
    LUNG,
    PANEL,
    SIDE,
    SOFT_TISSUE,
    TRUTH,
    draw_record,
    draw_results,
    overlap,
    read_neighbours,
    score_at_one_false_positive,
    window_for,
)

SIZE = 128
BOX, ELSEWHERE = [20.0, 20.0, 50.0, 50.0], [80.0, 80.0, 100.0, 100.0]


def filled(box):
    mask = np.zeros((SIZE, SIZE), bool)
    x1, y1, x2, y2 = (int(v) for v in box)
    mask[y1 + 5 : y2 - 4, x1 + 5 : x2 - 4] = True
    return encode_mask(mask)


def record(name="a/001.png", boxes=(BOX, ELSEWHERE), scores=(0.9, 0.8), **fields):
    return dict(
        file_name=name,
        patient=1,
        height=SIZE,
        width=SIZE,
        spacing_mm=0.8,
        thickness_mm=5.0,
        lesions=[
            dict(
                bbox=BOX,
                mask=filled(BOX),
                recist=[25, 25, 45, 45, 25, 45, 45, 25],
                diameters_mm=[22.6, 22.6],
                lesion_type=1,
            )
        ],
        boxes=[list(box) for box in boxes],
        scores=list(scores),
        masks=[filled(box) for box in boxes],
    ) | dict(fields)


@pytest.fixture(scope="module")
def key_slice(phantom):
    """A row of the phantom's table whose volume goes on to both sides."""
    table = read_dl_info(phantom / "DL_info.csv")
    inner = [row.slice_range[0] + 4 < row.key_slice < row.slice_range[1] - 4
             for row in table.itertuples()]  # fmt: skip
    return table[inner].iloc[0]


def picture_of(record, threshold=0.0, shape=(SIZE, SIZE), neighbours=()):
    grey = np.full(shape, 40, np.int16)
    return draw_record(record, [(grey, 0.0), *neighbours], threshold).astype(int)


def drawn(picture, box, colour, panel, size=SIZE):
    """Whether the left edge of the box has the colour somewhere, in the panel of that number."""
    scale = PANEL / size
    x = round((box[0] + 0.5) * scale - 0.5) + panel * PANEL
    y = [round((v + 0.5) * scale - 0.5) + BAR for v in (box[1], box[3])]
    return (picture[y[0] : y[1], x] == colour).all(axis=1).mean() > 0.5


def test_truth_is_left_detections_are_right():
    picture = picture_of(record())
    assert picture.shape == (BAR + PANEL, 2 * PANEL + SIDE, 3)
    hit, miss = COLOURS["hit"], COLOURS["false positive"]
    assert drawn(picture, BOX, TRUTH, 0) and not drawn(picture, ELSEWHERE, TRUTH, 0)
    assert drawn(picture, BOX, hit, 1) and drawn(picture, ELSEWHERE, miss, 1)
    assert not drawn(picture, BOX, miss, 1) and not drawn(picture, ELSEWHERE, hit, 1)


def test_a_second_box_on_a_lesion_is_a_repeat():
    again = [21.0, 19.0, 51.0, 50.0]
    picture = picture_of(record(boxes=(BOX, again), scores=(0.4, 0.9)))
    assert drawn(picture, again, COLOURS["hit"], 1)
    assert drawn(picture, BOX, COLOURS["repeat"], 1)


def test_what_scores_below_the_threshold_is_left_out():
    picture = picture_of(record(scores=(0.4, 0.8)), threshold=0.5)
    assert not drawn(picture, BOX, COLOURS["hit"], 1)
    assert drawn(picture, ELSEWHERE, COLOURS["false positive"], 1)


def test_contour_and_axes_lie_on_the_lesion():
    """Down the middle of the box: the mask's outline like the box, where the axes cross white."""

    def middle(record, panel=0, colour=TRUTH):
        scale = PANEL / SIZE
        top, bottom = BAR + round(22 * scale), BAR + round(48 * scale)
        column = picture_of(record)[top:bottom, panel * PANEL + round(35.5 * scale)]
        coloured, white = (np.abs(column - c).max(axis=1) < 70 for c in (colour, (255,) * 3))
        return np.flatnonzero(coloured) / scale + 22, np.flatnonzero(white) / scale + 22

    for panel, colour in ((0, TRUTH), (1, COLOURS["hit"])):
        outline, axes = middle(record(), panel, colour)
        assert outline.min() == pytest.approx(25, abs=0.5)
        assert outline.max() == pytest.approx(46, abs=0.5)
        assert axes.mean() == pytest.approx(35.5, abs=0.5)
    nothing = record()
    nothing["lesions"][0] |= dict(mask=None, recist=None, diameters_mm=None)
    del nothing["masks"]
    assert [len(found) for found in middle(nothing)] == [0, 0]
    picture = picture_of(nothing)
    assert drawn(picture, BOX, TRUTH, 0) and drawn(picture, BOX, COLOURS["hit"], 1)


def test_diameters_are_written_beside_the_boxes():
    """The text is longer with a mask than without, and says missed where no detection hits."""

    def written(record, panel):
        y = BAR + round(20.5 * PANEL / SIZE) - 17
        strip = picture_of(record)[y : y + 14, panel * PANEL : (panel + 1) * PANEL]
        return (np.abs(strip - 128).max(axis=(0, 2)) > 60).sum()

    found = record()
    bare = {key: value for key, value in found.items() if key != "masks"}
    assert written(found, 1) > written(bare, 1) + 20 > 20
    missed = found | dict(boxes=[], scores=[], masks=[])
    assert written(missed, 0) > written(found, 0) + 20 > 20


@pytest.mark.parametrize("shape", [(100, 128), (128, 100), (512, 512), (768, 1024)])
def test_any_size_of_slice_gives_the_same_size_of_picture(shape):
    fields = dict(height=shape[0], width=shape[1], thickness_mm=np.nan)
    empty = record(boxes=(), scores=(), **fields) | dict(lesions=[], masks=[])
    neighbour = np.zeros(shape, np.int16)
    picture = picture_of(empty, np.inf, shape, [(neighbour, -2.0), (neighbour, 2.0)])
    assert picture.shape == (BAR + PANEL, 2 * PANEL + SIDE, 3)


def test_neighbours_are_those_that_a_network_looks_at(phantom, key_slice):
    folder = SliceFolder(phantom / "Images_png")
    series, number = key_slice.file_name.split("/")[0], int(key_slice.key_slice)
    fields = dict(slice_range=list(key_slice.slice_range))
    key, before, after = read_neighbours(folder, record(key_slice.file_name, **fields))
    assert (key[1], before[1], after[1]) == (0, -5, 5)
    for hu, index in ((key[0], number), (before[0], number - 1), (after[0], number + 1)):
        np.testing.assert_array_equal(hu, folder.read(f"{series}/{index:03d}.png"))
    # Thin slices are looked at 2 mm apart.
    thin = record(key_slice.file_name, **fields, thickness_mm=1.0)
    key, before, after = read_neighbours(folder, thin)
    assert (before[1], after[1]) == (-2, 2)
    np.testing.assert_array_equal(before[0], folder.read(f"{series}/{number - 2:03d}.png"))


def test_no_neighbours_beyond_the_volume_or_where_it_is_not_known(phantom, key_slice):
    folder = SliceFolder(phantom / "Images_png")
    name, number = key_slice.file_name, int(key_slice.key_slice)
    alone = record(name, slice_range=[number, number])
    first = record(name, slice_range=[number, number + 9])
    # One slice of 1.2 mm is left, where 2 mm are looked for.
    nearly = record(name, slice_range=[number - 1, number + 9], thickness_mm=1.2)
    unknown = record(name, slice_range=[number - 5, number + 5], thickness_mm=np.nan)
    old = record(name)
    for fields, expected in (
        (alone, []), (first, [5.0]), (nearly, [-1.2, 2.0]), (unknown, []), (old, []),
    ):  # fmt: skip
        assert [mm for _, mm in read_neighbours(folder, fields)] == pytest.approx([0, *expected])


def test_results_are_drawn_whole_and_named_by_slice(phantom, key_slice, tmp_path):
    fields = record(key_slice.file_name, slice_range=list(key_slice.slice_range))
    result = Result("result", [fields])
    assert score_at_one_false_positive(result) == pytest.approx(0.8)
    (path,) = draw_results(result, SliceFolder(phantom / "Images_png"), tmp_path / "new" / "show")
    assert path.name == key_slice.file_name.replace("/", "_")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    picture = cv2.imread(str(path)).astype(int)
    assert drawn(picture, BOX, TRUTH, 0) and drawn(picture, BOX, COLOURS["hit"], 1)
    # Neighbours: neither panel is black.
    assert (picture[BAR : BAR + SIDE, -SIDE:] > 0).mean() > 0.2
    assert (picture[BAR + SIDE :, -SIDE:] > 0).mean() > 0.2


def test_lesions_with_boxes_alone_are_drawn(phantom, key_slice):
    fields = record(key_slice.file_name, lesions=[dict(bbox=BOX)])
    slices = read_neighbours(SliceFolder(phantom / "Images_png"), fields)
    picture = draw_record(fields, slices, threshold=0).astype(int)
    assert drawn(picture, BOX, TRUTH, 0)


def test_no_threshold_allows_one_false_positive_where_the_first_are_more():
    elsewhere = [ELSEWHERE, [60.0, 90.0, 70.0, 99.0]]
    assert score_at_one_false_positive(Result("", [record(boxes=elsewhere)])) == 0.9
    nothing = record(boxes=(), scores=())
    assert score_at_one_false_positive(Result("", [nothing])) == np.inf


def test_a_score_is_allowed_only_with_all_false_positives_that_have_it():
    """Three false positives at 0.5 are more than one an image, whichever comes first."""
    around = [[x, 90.0, x + 9.0, 99.0] for x in (0.0, 20.0, 40.0)]
    tied = record(boxes=[BOX, *around], scores=[0.7, 0.5, 0.5, 0.5])
    assert score_at_one_false_positive(Result("", [tied])) == 0.7
    assert score_at_one_false_positive(Result("", [record(scores=(0.5, 0.5))])) == 0.5


def test_window_is_that_of_the_lung_where_the_boxes_are_in_air():
    hu = np.full((64, 64), 40, np.int16)
    hu[:, 32:] = -850
    assert window_for(hu, [[4, 4, 20, 20]]) == SOFT_TISSUE
    assert window_for(hu, [[36, 4, 60, 20]]) == LUNG
    assert window_for(hu, [[25, 4, 60, 20]]) == LUNG
    assert window_for(hu, []) == SOFT_TISSUE


def test_texts_meet_only_where_rectangles_do():
    assert overlap((0, 0, 10, 10), (9, 9, 5, 5))
    assert not overlap((0, 0, 10, 10), (10, 0, 5, 5))
    assert not overlap((0, 0, 10, 10), (0, 12, 5, 5))
