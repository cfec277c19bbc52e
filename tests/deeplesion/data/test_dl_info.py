"""read_dl_info on rows in NIH's format, good and bad; to_coco read back by pycocotools."""

import csv
import io
import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from deeplesion.data.coco import to_coco
from deeplesion.data.dl_info import read_dl_info


def row(
    patient=1, study=1, series=1, key_slice=109, center=(233.5, 100.0), axes=(12.0, 5.0), **own
):
    """One row of DL_info.csv: an upright lesion around `center` (1-based), its box 5 px wider."""
    (x, y), (long, short) = center, axes
    ends = [x, y - long / 2, x, y + long / 2, x - short / 2, y, x + short / 2, y]
    box = [x - short / 2 - 5, y - long / 2 - 5, x + short / 2 + 5, y + long / 2 + 5]
    return {
        "File_name": f"{patient:06d}_{study:02d}_{series:02d}_{key_slice:03d}.png",
        "Patient_index": patient,
        "Study_index": study,
        "Series_ID": series,
        "Key_slice_index": key_slice,
        "Measurement_coordinates": ", ".join(map(str, ends)),
        "Bounding_boxes": ", ".join(map(str, box)),
        "Lesion_diameters_Pixel_": f"{long}, {short}",
        "Normalized_lesion_location": "0.4, 0.3, 0.5",
        "Coarse_lesion_type": 3,
        "Possibly_noisy": 0,
        "Slice_range": f"{key_slice - 6}, {key_slice + 6}",
        "Spacing_mm_px_": "0.488281, 0.488281, 5",
        "Image_size": "512, 512",
        "DICOM_windows": "-175, 275",
        "Patient_gender": "F",
        "Patient_age": 62,
        "Train_Val_Test": 3,
        **own,
    }


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(tmp_path, *rows):
    return read_dl_info(write(tmp_path / "DL_info.csv", rows))


# Reading


def test_every_column_of_a_row_as_nih_writes_it(tmp_path):
    # Typed by hand, with its 0-based values beside it.
    path = tmp_path / "DL_info.csv"
    path.write_text(
        "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,"
        "Bounding_boxes,Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,"
        "Possibly_noisy,Slice_range,Spacing_mm_px_,Image_size,DICOM_windows,Patient_gender,"
        "Patient_age,Train_Val_Test\n"
        '000012_03_04_056.png,12,3,4,56,"11, 21, 31, 21, 20, 16, 20, 28","6, 11, 36, 33","20, 12",'
        '"0.1, 0.2, 0.3",-1,1,"50, 60","0.5, 0.5, 1.25","768, 1024","-1500, 500.5",M,NaN,1\n'
    )
    table = read_dl_info(path)
    assert len(table) == 1
    lesion = table.iloc[0]
    assert lesion.file_name == "000012_03_04/056.png"
    assert (lesion.patient, lesion.study, lesion.series, lesion.key_slice) == (12, 3, 4, 56)
    assert lesion.bbox.dtype == lesion.recist.dtype == np.float64
    assert lesion.bbox.tolist() == [5, 10, 35, 32]
    assert lesion.recist.tolist() == [[10, 20], [30, 20], [19, 15], [19, 27]]
    assert lesion.diameters_px.tolist() == [20, 12]
    assert lesion.diameters_mm.tolist() == [10, 6]
    assert lesion.location.tolist() == [0.1, 0.2, 0.3]
    assert lesion.lesion_type == -1
    assert lesion.noisy
    assert lesion.slice_range.tolist() == [50, 60]
    assert (lesion.spacing_mm, lesion.thickness_mm) == (0.5, 1.25)
    assert (lesion.height, lesion.width) == (768, 1024)
    assert lesion.display_window.tolist() == [-1500, 500.5]
    assert lesion.gender == "M"
    assert math.isnan(lesion.age)
    assert lesion.split == "train"
    assert not lesion.clipped


def test_file_order_splits_and_noisy_rows_are_kept(tmp_path):
    table = read(
        tmp_path,
        row(3, Train_Val_Test=3),
        row(1, Train_Val_Test=1, Possibly_noisy=1),
        row(2, Train_Val_Test=2),
        row(1, Train_Val_Test=1, center=(50, 60)),
    )
    assert table.split.tolist() == ["test", "train", "val", "train"]
    assert table.noisy.tolist() == [False, True, False, False]
    assert table.patient.tolist() == [3, 1, 2, 1]
    assert table.noisy.dtype == bool


@pytest.mark.parametrize("thickness", [", 0", ", -1", ", NaN", ", inf", ", ", ""])
def test_missing_thickness_is_nan(tmp_path, thickness):
    table = read(tmp_path, row(Spacing_mm_px_="0.5, 0.5" + thickness))
    assert math.isnan(table.thickness_mm[0])
    assert table.spacing_mm[0] == 0.5


@pytest.mark.parametrize("column", ["Patient_age", "Normalized_lesion_location"])
@pytest.mark.parametrize("value", ["", "NaN"])
def test_what_may_be_missing(tmp_path, column, value):
    table = read(tmp_path, row(**{column: value}))
    assert np.isnan(table["age" if column == "Patient_age" else "location"][0]).all()


def test_four_digit_slices(tmp_path):
    table = read(tmp_path, row(key_slice=1234))
    assert table.file_name[0] == "000001_01_01/1234.png"


def test_extra_columns_bom_and_crlf_do_no_harm(tmp_path):
    path = write(tmp_path / "DL_info.csv", [row(Remark="x")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_dl_info(path).file_name.tolist() == ["000001_01_01/109.png"]


def test_a_table_without_rows_is_refused(tmp_path):
    path = write(tmp_path / "DL_info.csv", [row()])
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"DL_info\.csv holds no lesions"):
        read_dl_info(path)


def test_lesions_are_numbered_as_the_rows_of_the_file(tmp_path):
    """By this number, from 0, public label sets name a lesion; noisy rows count."""
    table = read(tmp_path, row(3), row(1, Possibly_noisy=1), row(2))
    assert table.lesion_idx.tolist() == [0, 1, 2]
    coco = to_coco(table[~table.noisy], [np.ones((512, 512), bool)] * 2)
    assert [a["lesion_idx"] for a in coco["annotations"]] == [0, 2]


def test_a_lesion_twice_is_refused(tmp_path):
    """It would be counted twice, as found and as missed."""
    with pytest.raises(ValueError, match=r"line 4, File_name .* the one of line 2"):
        read(tmp_path, row(1), row(2), row(1))
    assert len(read(tmp_path, row(1), row(1, Possibly_noisy=1))) == 2
    # Measured in another way it is the same box, once more.
    for again in (
        row(1, axes=(10, 5), Bounding_boxes=row(1)["Bounding_boxes"]),
        row(1, Bounding_boxes=row(1)["Bounding_boxes"].replace(".0", "")),
    ):
        with pytest.raises(ValueError, match=r"1 bad.*\n.*line 3, File_name .* the one of line 2"):
            read(tmp_path, row(1), again)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("0.0008, 0.0008, 0.005", "in-plane spacings from 0.05 to 10 mm"),
        ("0.8, 0.8, 0.005", "thickness, its last number, from 0.05 to 50 mm"),
        ("0.8, 0.8, 5000", "thickness, its last number, from 0.05 to 50 mm"),
    ],
)
def test_other_units_than_millimetres(cell, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        read(tmp_path, row(1, Spacing_mm_px_=cell))


def test_box_outside_its_image_is_clipped_with_a_warning(tmp_path):
    sticking_out = row(center=(508.0, 5.0), axes=(12.0, 10.0))
    with pytest.warns(UserWarning, match=r"1 boxes.*000001_01_01_109\.png"):
        table = read(tmp_path, sticking_out, row(2))
    assert table.bbox[0].tolist() == [497, 0, 511, 15]
    assert table.recist[0][0].tolist() == [507, -2]  # the measurement stays
    assert table.clipped.tolist() == [True, False]


def test_box_is_clipped_to_the_width_and_height_of_its_own_image(tmp_path):
    with pytest.warns(UserWarning, match="clipped"):
        table = read(
            tmp_path,
            row(1, center=(300, 200), Image_size="203, 1024"),
            row(2, center=(200, 300), Image_size="1024, 202"),
        )
    assert table.bbox[0].tolist() == [291.5, 188, 306.5, 202]
    assert table.bbox[1].tolist() == [191.5, 288, 201, 310]


def test_nothing_is_said_about_good_rows(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path, row(), row(2))


def test_oddities_of_the_official_table_pass(tmp_path):
    table = read(
        tmp_path,
        row(1, axes=(5.0, 5.001)),  # rounded: the short axis a hair longer
        row(2, Lesion_diameters_Pixel_="12.0014, 5"),
        row(3, Slice_range="109, 109"),
        row(4, Slice_range="109, 115"),
        row(5, Bounding_boxes="232, 98, 236, 102"),  # RECIST outside its box
        row(6, DICOM_windows="-1537.5, -25"),
        row(7, study=0, series=12, Patient_age=62.0),
        row(7, study=0, series=12, Patient_age=62.0, key_slice=110, Slice_range="90, 130"),
    )
    assert len(table) == 8


def test_noisy_rows_may_be_nonsense_but_must_be_readable(tmp_path):
    noisy = {"Possibly_noisy": 1, "Lesion_diameters_Pixel_": "1, 99"}
    table = read(tmp_path, row(1, Bounding_boxes="20, 20, 10, 10", **noisy), row(2))
    assert table.noisy.tolist() == [True, False]
    with pytest.raises(ValueError, match="line 2, Bounding_boxes"):
        read(tmp_path, row(1, Bounding_boxes="20, 20", **noisy))


# Bad rows


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("File_name", "000001_01_01_110.png"),
        ("File_name", "1_1_1_109.png"),
        ("File_name", ""),
        ("Patient_index", "one"),
        ("Patient_index", "1.5"),
        ("Study_index", ""),
        ("Key_slice_index", "-1"),
        ("Measurement_coordinates", "1, 2, 3, 4, 5, 6, 7"),
        ("Measurement_coordinates", "1, 2, 3, 4, 5, 6, 7, NaN"),
        ("Bounding_boxes", "1, 2, 3"),
        ("Bounding_boxes", "1, 2, 3, inf"),
        ("Bounding_boxes", "20, 20, 10, 30"),
        ("Bounding_boxes", "20, 20, 30, 20"),
        ("Bounding_boxes", "600, 20, 630, 40"),
        ("Bounding_boxes", "512, 20, 530, 40"),
        ("Lesion_diameters_Pixel_", "5.0, 12.0"),
        ("Lesion_diameters_Pixel_", "12.0"),
        ("Normalized_lesion_location", "x"),
        ("Coarse_lesion_type", "9"),
        ("Coarse_lesion_type", "0"),
        ("Possibly_noisy", "2"),
        ("Possibly_noisy", ""),
        ("Slice_range", "110, 120"),
        ("Slice_range", "100, 108"),
        ("Slice_range", "120, 100"),
        ("Slice_range", "100.5, 120"),
        ("Spacing_mm_px_", "0, 0, 5"),
        ("Spacing_mm_px_", "0.5, 0.7, 5"),
        ("Spacing_mm_px_", "0.5"),
        ("Spacing_mm_px_", ""),
        ("Image_size", "0, 512"),
        ("Image_size", "512"),
        ("DICOM_windows", "NaN, 275"),
        ("Train_Val_Test", "4"),
        ("Train_Val_Test", "0"),
    ],
)
def test_bad_value_is_named_with_file_line_and_column(tmp_path, column, value):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, row(1), row(1, center=(50, 60), **{column: value}), row(2))
    message = str(caught.value)
    assert "DL_info.csv" in message
    assert f"line 3, {column} = {value!r}: expected" in message
    assert "line 2," not in message
    assert "line 4," not in message


@pytest.mark.parametrize("axes", [(12.0, 0), (0, 0), (-0.1, 5)])
def test_an_axis_without_length_is_named_once(tmp_path, axes):
    """Its measurement agrees; training refuses such diameters."""
    with pytest.raises(ValueError, match=r"1 bad values.*\n.*line 3, Lesion_diameters_Pixel_ ="):
        read(tmp_path, row(1), row(1, center=(50, 60), axes=axes))
    assert len(read(tmp_path, row(1), row(1, axes=axes, Possibly_noisy=1))) == 2


def test_all_bad_rows_in_one_error_first_twenty_listed(tmp_path):
    rows = [row(1 + i, Coarse_lesion_type=99 if i % 2 else 1) for i in range(60)]
    with pytest.raises(ValueError) as caught:
        read(tmp_path, *rows)
    message = str(caught.value)
    assert "30 bad values in 30 lines" in message
    assert message.count("Coarse_lesion_type = '99'") == 20
    assert "line 3," in message
    assert "and 10 more" in message


def test_bad_values_are_listed_by_line(tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, row(1, Train_Val_Test=7), row(2, Study_index="x"), row(3, Possibly_noisy=9))
    listed = [line.split(",")[0].strip() for line in str(caught.value).splitlines()[1:4]]
    assert listed == ["line 2", "line 3", "line 4"]


def test_patient_in_two_splits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 3, Train_Val_Test = '2'"):
        read(tmp_path, row(1, Train_Val_Test=1), row(1, Train_Val_Test=2))


CONTRADICTIONS = {
    "Spacing_mm_px_": ["0.6, 0.6, 5", "0.488281, 0.488281, 1", "0.488281, 0.488281, NaN"],
    "Image_size": ["512, 500", "500, 512"],
}


@pytest.mark.parametrize(
    ("column", "value"),
    [(name, value) for name in CONTRADICTIONS for value in CONTRADICTIONS[name]],
)
def test_rows_of_one_key_slice_that_contradict_each_other_are_refused(tmp_path, column, value):
    first, other = row(1), row(1, center=(50, 60), **{column: value})
    with pytest.raises(ValueError) as caught:
        read(tmp_path, first, row(2), other)
    assert "1 bad values" in str(caught.value)
    assert f"line 4, {column} = {value!r}: expected that of line 2" in str(caught.value)
    # A noisy row is not used, and another key slice of the series may differ.
    noisy = row(1, center=(90, 90), Possibly_noisy=1, **{column: value})
    series = row(1, key_slice=108, center=(50, 60), **{column: value})
    assert len(read(tmp_path, noisy, first, series, row(1, center=(50, 60)))) == 4


@pytest.mark.parametrize("column", CONTRADICTIONS)
def test_a_bad_cell_is_no_contradiction_too(tmp_path, column):
    for rows in ([row(1, **{column: "x"}), row(1, center=(50, 60))],
                 [row(1), row(1, center=(50, 60), **{column: "x"})]):  # fmt: skip
        with pytest.raises(ValueError, match="1 bad values in 1 lines"):
            read(tmp_path, *rows)


def test_another_slice_range_of_one_key_slice_is_warned_of(tmp_path):
    rows = row(1), row(1, center=(50, 60), Slice_range="102, 115"), row(1, center=(90, 60))
    with pytest.warns(UserWarning, match="1 rows have another Slice_range.*line 3: 102, 115$"):
        table = read(tmp_path, *rows)
    assert table.slice_range.map(tuple).nunique() == 2


def test_one_key_slice_may_have_its_thickness_missing_in_several_ways(tmp_path):
    rows = [
        row(1, center=(50 * (i + 1), 60), Spacing_mm_px_=f"0.488281, 0.488281{thickness}")
        for i, thickness in enumerate([", NaN", ", 0", ", ", ""])
    ]
    assert read(tmp_path, *rows).thickness_mm.isna().all()


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = write(tmp_path / "DL_info.csv", [row(1), row(2, Possibly_noisy=7)])
    header, first, second = path.read_text().splitlines()
    path.write_text("\n".join([header, "", first, "", second, ""]))
    with pytest.raises(ValueError, match="line 5, Possibly_noisy"):
        read_dl_info(path)


def test_rows_of_another_width_are_named(tmp_path):
    path = write(tmp_path / "DL_info.csv", [row(1)])
    path.write_text(path.read_text() + "000001_01_01_109.png,1,1\n" + ",".join("a" * 20) + "\n")
    with pytest.raises(ValueError) as caught:
        read_dl_info(path)
    assert "line 3, all = '3 cells': expected 18" in str(caught.value)
    assert "line 4, all = '20 cells': expected 18" in str(caught.value)


CELLS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
    st.lists(st.floats(), max_size=9).map(lambda values: ", ".join(map(str, values))),
    st.lists(st.integers(), max_size=9).map(lambda values: ",".join(map(str, values))),
)


@given(st.sampled_from(list(row())), CELLS)
@example("Measurement_coordinates", "0, 0, 0, 0, 0, 0, 0, 1e200")
@example("Bounding_boxes", "-1e308, -1e308, 1e308, 1e308")
@settings(deadline=None, max_examples=150)
@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:.*clipped:UserWarning")
def test_whatever_a_cell_holds_it_is_read_or_refused(tmp_path_factory, column, cell):
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    try:
        table = read_dl_info(write(path, [row(1), row(1, **{column: cell}), row(2)]))
    except ValueError as error:
        assert "line" in str(error)
        assert "expected" in str(error)
    else:
        assert len(table) == 3
        assert all(np.isfinite(table.bbox[1]))
        assert np.isnan(table.thickness_mm[1]) or 0 < table.thickness_mm[1] < math.inf


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "DL_info.csv"
    path.write_text("File_name,Patient_index\n")
    with pytest.raises(ValueError, match=r"DL_info\.csv lacks the columns.*'Study_index'"):
        read_dl_info(path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\xff\xfe\x00"])
def test_not_a_table(tmp_path, content):
    path = tmp_path / "DL_info.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"DL_info\.csv"):
        read_dl_info(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read_dl_info(tmp_path / "nowhere.csv")


# COCO


def box_mask(bbox, shape=(512, 512)):
    x1, y1, x2, y2 = np.round(bbox).astype(int)
    mask = np.zeros(shape, bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


def coco_of(coco, tmp_path):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco, allow_nan=False))
    return COCO(str(path))


def test_coco_opens_in_pycocotools_with_the_same_content(tmp_path, capsys):
    lesions = read(
        tmp_path,
        row(1, center=(100, 100)),
        row(2, center=(200, 90), Spacing_mm_px_="0.7, 0.7, NaN"),
        row(1, center=(300, 300), axes=(20.0, 11.0), Coarse_lesion_type=5),
    )
    masks = [box_mask(bbox) for bbox in lesions.bbox]
    coco = coco_of(to_coco(lesions, masks), tmp_path)
    assert [image["file_name"] for image in coco.dataset["images"]] == [
        "000001_01_01/109.png",
        "000002_01_01/109.png",
    ]
    assert coco.loadCats(coco.getCatIds()) == [{"id": 1, "name": "lesion"}]
    first, second = coco.loadImgs([1, 2])
    assert first == {
        "id": 1,
        "file_name": "000001_01_01/109.png",
        "width": 512,
        "height": 512,
        "thickness_mm": 5.0,
        "spacing_mm": 0.488281,
        "slice_range": [103, 115],
        "patient": 1,
        "study": 1,
        "series": 1,
        "key_slice": 109,
        "display_window": [-175.0, 275.0],
    }
    assert second["thickness_mm"] is None
    assert [a["image_id"] for a in coco.dataset["annotations"]] == [1, 2, 1]
    for annotation, lesion, mask in zip(
        coco.dataset["annotations"], lesions.itertuples(), masks, strict=True
    ):
        assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
        assert annotation["area"] == mask.sum()
        x, y, w, h = annotation["bbox"]
        assert [x, y, x + w, y + h] == pytest.approx(lesion.bbox.tolist(), abs=1e-4)
        assert annotation["recist"] == pytest.approx(lesion.recist.ravel().tolist(), abs=1e-4)
        assert annotation["diameters_mm"] == pytest.approx(lesion.diameters_mm.tolist(), abs=1e-4)
        assert annotation["lesion_type"] == lesion.lesion_type
        assert (annotation["iscrowd"], annotation["category_id"]) == (0, 1)
        assert isinstance(annotation["segmentation"]["counts"], str)


def test_encoded_masks_are_taken_as_they_are(tmp_path):
    lesions = read(tmp_path, row(1), row(2))
    masks = [box_mask(bbox) for bbox in lesions.bbox]
    once = to_coco(lesions, masks)
    again = to_coco(lesions, [a["segmentation"] for a in once["annotations"]])
    assert once == again


def test_part_of_the_table(tmp_path):
    lesions = read(tmp_path, row(1), row(2, Possibly_noisy=1), row(3))
    clean = lesions[~lesions.noisy]
    coco = to_coco(clean, [box_mask(bbox) for bbox in clean.bbox])
    assert [image["patient"] for image in coco["images"]] == [1, 3]
    assert [image["id"] for image in coco["images"]] == [1, 2]


def test_images_need_not_be_square(tmp_path):
    lesions = read(tmp_path, row(1, Image_size="300, 400"))
    coco = to_coco(lesions, [box_mask(lesions.bbox[0], (300, 400))])
    assert (coco["images"][0]["height"], coco["images"][0]["width"]) == (300, 400)
    assert coco["annotations"][0]["segmentation"]["size"] == [300, 400]


def test_empty_coco_is_valid(tmp_path, capsys):
    lesions = read(tmp_path, row())
    coco = coco_of(to_coco(lesions[:0], []), tmp_path)
    assert coco.getImgIds() == coco.getAnnIds() == []
    assert coco.getCatIds() == [1]


def test_masks_must_fit(tmp_path):
    lesions = read(tmp_path, row())
    with pytest.raises(ValueError, match="one mask a lesion"):
        to_coco(lesions, [])
    with pytest.raises(ValueError, match=r"000001_01_01/109\.png.*\[4, 5\]"):
        to_coco(lesions, [np.zeros((4, 5), bool)])


@given(
    st.floats(30, 480),
    st.floats(30, 480),
    st.floats(2, 40),
    st.floats(0.2, 1.0),
)
@settings(deadline=None, max_examples=40)
def test_boxes_round_trip_through_csv_and_json(tmp_path_factory, x, y, long, ratio):
    tmp_path = tmp_path_factory.mktemp("round_trip")
    given_row = row(center=(x, y), axes=(long, long * ratio))
    lesions = read(tmp_path, given_row)
    coco = json.loads(json.dumps(to_coco(lesions, [np.ones((512, 512), bool)])))
    x1, y1, w, h = coco["annotations"][0]["bbox"]
    one_based = [float(value) for value in given_row["Bounding_boxes"].split(",")]
    clipped = np.clip(np.array(one_based) - 1, 0, 511)
    np.testing.assert_allclose([x1, y1, x1 + w, y1 + h], clipped, atol=1e-4)


def test_own_rows_are_what_csv_reads():
    # Guards the helper: a quoted cell with commas must come back as one cell.
    buffer = io.StringIO()
    csv.writer(buffer).writerow(row().values())
    assert next(csv.reader([buffer.getvalue()]))[5].count(",") == 7
