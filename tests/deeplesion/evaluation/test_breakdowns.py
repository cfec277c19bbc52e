"""Groups of images and lesions by a key of the records or a column of a CSV file."""

import numpy as np
import pytest

from deeplesion.evaluation.breakdowns import add_columns, by_column, column_groups
from deeplesion.evaluation.evaluate import evaluate
from deeplesion.evaluation.results import Result

NAMES = ["000001_01_01/109.png", "000001_02_01/014.png", "000002_01_01/162.png"]


def records(**columns):
    number = len(next(iter(columns.values())))
    return [
        {
            "file_name": f"{i}/1.png",
            "boxes": [],
            "lesions": [],
            **{k: v[i] for k, v in columns.items()},
        }
        for i in range(number)
    ]


def members(groups):
    return {name: np.flatnonzero(chosen).tolist() for name, chosen in groups.items()}


def test_texts_are_groups_in_alphabetical_order_unknown_last():
    groups = column_groups(records(sex=["M", "F", "", None, "M"]), "sex")
    assert list(groups) == ["F", "M", "unknown"]
    assert members(groups) == {"F": [1], "M": [0, 4], "unknown": [2, 3]}


def test_few_numbers_are_groups_in_the_order_of_numbers():
    groups = column_groups(records(site=["10", "9", 10, float("nan"), "1.5"]), "site")
    assert members(groups) == {"1.5": [4], "9": [1], "10": [0, 2], "unknown": [3]}
    assert list(groups) == ["1.5", "9", "10", "unknown"]


def test_many_numbers_are_cut_at_their_quartiles():
    ages = [str(age) for age in range(20, 60)] + ["", "NaN"]
    groups = column_groups(records(age=ages), "age")
    assert list(groups) == ["<= 30", "> 30 to 40", "> 40 to 49", "> 49", "unknown"]
    sizes = [len(m) for m in members(groups).values()]
    assert sum(sizes) == 42 and sizes[-1] == 2 and max(sizes[:4]) <= 11
    assert members(groups)["> 30 to 40"] == list(range(11, 21))


def test_different_numbers_are_never_one_group():
    """Dates and other long numbers, which a few digits do not tell apart."""
    few = ["20200101", "20200102", "20210301", "0.1234567", "0.1234568"]
    assert members(column_groups(records(day=few), "day")) == {
        "0.1234567": [3], "0.1234568": [4], "20200101": [0], "20200102": [1], "20210301": [2],
        "unknown": [],
    }  # fmt: skip
    days = [str(20200101 + day) for day in range(28)]
    groups = column_groups(records(day=days), "day")
    assert list(groups) == [
        "<= 20200108", "> 20200108 to 20200115", "> 20200115 to 20200121", "> 20200121", "unknown",
    ]  # fmt: skip
    assert [len(m) for m in members(groups).values()] == [8, 7, 6, 7, 0]


def test_groups_are_a_partition_also_where_quartiles_coincide():
    values = [1.0] * 30 + list(range(2, 12))
    groups = column_groups(records(x=values), "x")
    np.testing.assert_array_equal(np.sum(list(groups.values()), axis=0), np.ones(40))
    assert members(groups)["<= 1"] == list(range(30))


def test_texts_and_numbers_mixed_are_texts():
    assert list(column_groups(records(x=["10", "b", "9"]), "x")) == ["10", "9", "b", "unknown"]


@pytest.mark.parametrize(
    "column, message",
    [
        ("Sex", "no column 'Sex'; did you mean 'sex'"),
        ("sexx", "did you mean 'sex'"),
        ("zzz", r"no column 'zzz'\. There are file_name, sex"),
        ("gender", r"no column 'gender'\. There are"),  # file_name is not near
        ("boxes", "'boxes' holds lists"),
        ("file_name", "240 different values; at most 200"),
    ],
)
def test_what_is_no_grouping_is_refused(column, message):
    with pytest.raises(ValueError, match=message):
        by_column(Result("", records(sex=["M", "F"] * 120)), column)


def table(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "rows",
    [
        # As DL_info.csv spells it: a row a lesion, the series and slice in one word.
        "File_name,Patient_gender\n000001_01_01_109.png,F\n000002_01_01_162.png,M\n"
        "000001_01_01_109.png,F\n000009_01_01_001.png,M\n",
        "Patient_gender,file_name\nF,000001_01_01/109.png\nM,000002_01_01/162.png\n",
    ],
)
def test_columns_of_a_file_are_known_by_the_file_name(tmp_path, rows):
    images = [{"file_name": name, "patient": 1, "lesions": []} for name in NAMES]
    joined = add_columns(images, table(tmp_path, rows), ["Patient_gender", "patient"])
    assert [r["Patient_gender"] for r in joined] == ["F", None, "M"]
    assert all(r["patient"] == 1 for r in joined) and "Patient_gender" not in images[0]
    groups = members(column_groups(joined, "Patient_gender"))
    assert groups == {"F": [0], "M": [2], "unknown": [1]}


@pytest.mark.parametrize(
    "rows, message",
    [
        ("name,age\na,1\n", "no column lesion_idx .* file_name or File_name .* name, age"),
        ("", r"table\.csv holds no rows"),
        ("file_name,age\n", r"table\.csv holds no rows"),
        ("file_name,Age\n000001_01_01/109.png,1\n", "no column 'age'; did you mean 'Age'"),
        (
            "file_name,age\n000001_01_01/109.png,1\n000001_01_01/109.png,2\n",
            "rows of 000001_01_01/109.png differ in 'age'",
        ),
        ("file_name,age\nx/1.png,1\n", "none of the images of the result, such as 000001_01_01"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        add_columns(
            [{"file_name": name, "lesions": []} for name in NAMES], table(tmp_path, rows), ["age"]
        )


@pytest.mark.parametrize(
    "columns, message",
    [
        (["lesion_type"], r"'lesion_type' is in .*table\.csv and in the result as well"),
        (["tag", "patient"], r"'patient' is in .*table\.csv and in the result as well"),
        (["thickness_mm"], r"table\.csv is not needed for thickness_mm, which the result has"),
    ],
)
def test_a_file_of_which_nothing_would_be_taken_is_refused(tmp_path, columns, message):
    csv = table(tmp_path, "lesion_idx,lesion_type,patient,tag\n7,1,3,a\n8,2,3,b\n20,2,3,b\n")
    with pytest.raises(ValueError, match=message):
        add_columns(two_images(), csv, columns)
    assert add_columns(two_images(), csv, ["tag", "thickness_mm", "lesion_idx"])


def test_a_column_cannot_take_the_place_of_a_table_that_is_always_made(tmp_path):
    csv = table(tmp_path, "lesion_idx,lesion type\n7,a\n8,b\n20,b\n")
    result = Result("", add_columns(two_images(), csv, ["lesion type"]))
    with pytest.raises(ValueError, match="'lesion type' is always made"):
        evaluate(result, ["lesion type"], resamples=100)


@pytest.mark.parametrize(
    "name",
    [
        *("model", "slices", "images", "lesions", "axis"),
        *("table", "measure", "value", "low", "high", "p", "source", "note"),
    ],
)
def test_a_column_cannot_have_a_name_that_the_tables_use(tmp_path, name):
    csv = table(tmp_path, f"lesion_idx,{name}\n7,a\n8,b\n20,b\n")
    records = two_images() if name == "lesions" else add_columns(two_images(), csv, [name])
    with pytest.raises(ValueError, match=f"'{name}' cannot be made"):
        evaluate(Result("", records), [name], resamples=100)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"file_name\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"x\.csv is not a comma-separated text file"):
        add_columns([{"file_name": NAMES[0], "lesions": []}], tmp_path / "x.csv", ["age"])


# Lesions


def two_images():
    """Three lesions, rows 7, 8 and 20 of DL_info.csv; the first two are hit."""
    boxes = [[10.0, 10, 30, 30], [50.0, 10, 70, 30], [10.0, 10, 30, 30]]
    lesions = [
        dict(bbox=box, lesion_idx=row, lesion_type=kind)
        for box, row, kind in zip(boxes, (7, 8, 20), (5, 4, 5))
    ]
    common = dict(height=96, width=96, spacing_mm=0.8, thickness_mm=1.0)
    return [
        dict(file_name=NAMES[0], patient=1, lesions=lesions[:2], boxes=boxes[:2],
             scores=[0.9, 0.8], **common),
        dict(file_name=NAMES[2], patient=2, lesions=lesions[2:], boxes=[[60.0, 60, 80, 80]],
             scores=[0.7], **common),
    ]  # fmt: skip


def test_lesions_are_grouped_by_the_labels_of_their_rows(tmp_path):
    """A lesion with several labels, a row each, is in the group of each of them."""
    csv = table(tmp_path, "lesion_idx,tag\n7,nodule\n7,left lung\n20,nodule\n8,cyst\n99,cyst\n")
    joined = add_columns(two_images(), csv, ["tag"])
    curves = by_column(Result("", joined), "tag")
    found = {
        tag: (curve.num_lesions, curve.num_images, curve.sensitivity_at(0.5).tolist())
        for tag, curve in curves.items()
    }
    # 0.5 false positives an image, of the set of both images: the third detection.
    assert found == {
        "cyst": (1, 2, 1.0),
        "left lung": (1, 2, 1.0),
        "nodule": (2, 2, 0.5),
        "unknown": (0, 2, pytest.approx(np.nan, nan_ok=True)),
    }
    assert "tag" not in two_images()[0]["lesions"][0]


def test_lesions_without_a_row_are_unknown_and_their_own_columns_serve_too(tmp_path):
    joined = add_columns(two_images(), table(tmp_path, "tag,lesion_idx\nx,7\n"), ["tag"])
    curves = by_column(Result("", joined), "tag")
    assert {tag: curve.num_lesions for tag, curve in curves.items()} == {"x": 1, "unknown": 2}
    curves = by_column(Result("", two_images()), "lesion_type")
    assert [curves[kind].num_lesions for kind in ("4", "5")] == [1, 2]


@pytest.mark.parametrize(
    "rows, message",
    [
        ("lesion_idx,tag\n1,x\n", "none of the lesions of the result, such as 7"),
        ("lesion_idx,tag\na,x\n", "lesion_idx must be the number of a row, got 'a'"),
        ("lesion_idx,Tag\n7,x\n", "no column 'tag'; did you mean 'Tag'"),
    ],
)
def test_a_table_of_lesions_that_does_not_fit(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        add_columns(two_images(), table(tmp_path, rows), ["tag"])


def test_result_files_of_old_have_no_rows_of_lesions(tmp_path):
    records = two_images()
    for lesion in (x for r in records for x in r["lesions"]):
        del lesion["lesion_idx"]
    with pytest.raises(ValueError, match="have no lesion_idx, which result files of old lack"):
        add_columns(records, table(tmp_path, "lesion_idx,tag\n7,x\n"), ["tag"])
