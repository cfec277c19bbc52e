"""Groups of images by a key of the records or a column of a CSV file."""

import numpy as np
import pytest

from deeplesion.evaluation.breakdowns import add_columns, column_groups

NAMES = ["000001_01_01/109.png", "000001_02_01/014.png", "000002_01_01/162.png"]


def records(**columns):
    number = len(next(iter(columns.values())))
    return [
        {"file_name": f"{i}/1.png", "boxes": [], **{k: v[i] for k, v in columns.items()}}
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
        ("boxes", "'boxes' holds lists"),
        ("file_name", "60 different values; at most 50"),
    ],
)
def test_what_is_no_grouping_is_refused(column, message):
    with pytest.raises(ValueError, match=message):
        column_groups(records(sex=["M", "F"] * 30), column)


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
    images = [{"file_name": name, "patient": 1} for name in NAMES]
    joined = add_columns(images, table(tmp_path, rows), ["Patient_gender", "patient"])
    assert [r["Patient_gender"] for r in joined] == ["F", None, "M"]
    assert all(r["patient"] == 1 for r in joined) and "Patient_gender" not in images[0]
    groups = members(column_groups(joined, "Patient_gender"))
    assert groups == {"F": [0], "M": [2], "unknown": [1]}


@pytest.mark.parametrize(
    "rows, message",
    [
        ("name,age\na,1\n", "no column file_name or File_name .* name, age"),
        ("", "no column file_name"),
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
        add_columns([{"file_name": name} for name in NAMES], table(tmp_path, rows), ["age"])


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"file_name\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"x\.csv is not a comma-separated text file"):
        add_columns([{"file_name": NAMES[0]}], tmp_path / "x.csv", ["age"])
