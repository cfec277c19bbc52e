"""Files of 3D boxes: pickles without their code, JSON, what is refused."""

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplesion.errors import DataError, MissingDataError
from deeplesion.evaluation.volume_boxes import read_volume_boxes

BOXES = {
    "val": {"000001_01_01_103-115": np.array([[1, 2, 103, 4, 5, 110], [0, 0, 104, 9, 9, 104]])},
    "test": {"000002_01_01_008-023": np.zeros((0, 6)), "c": np.array([[1.5, 2, 3, 4, 5, 6]])},
}


def assert_equal(read, expected=BOXES):
    assert read.keys() == expected.keys()
    for split, volumes in expected.items():
        assert read[split].keys() == volumes.keys()
        for name, boxes in volumes.items():
            assert read[split][name].dtype == np.float64
            np.testing.assert_array_equal(read[split][name], boxes)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "boxes.pkl"
    path.write_bytes(pickle.dumps(BOXES, protocol))
    assert_equal(read_volume_boxes(path))


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u2", "i1", "f4", ">f8", "f2"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_all_types_of_numbers_and_both_orders(tmp_path, dtype, protocol, order):
    boxes = np.arange(18).reshape(3, 6).astype(dtype, order=order)
    path = tmp_path / "boxes.pkl"
    path.write_bytes(pickle.dumps({"test": {"a": boxes, "b": boxes[1:]}}, protocol))
    assert_equal(read_volume_boxes(path), {"test": {"a": boxes, "b": boxes[1:]}})


def test_the_names_that_older_numpy_wrote(tmp_path):
    content = pickle.dumps(BOXES, 2)
    assert b"numpy._core.multiarray" in content
    path = tmp_path / "boxes.pkl"
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_equal(read_volume_boxes(path))


def test_a_pickle_of_python_2(tmp_path):
    """Its bytes are texts: as Python 2.7 wrote {'test': {'a': array([[1, .., 6]], '<u1')}}."""
    content = (
        b"\x80\x02}U\x04test}U\x01acnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01K\x06\x86cnumpy\ndtype\n"
        b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06\x01\x02\x03\xf0\xf1\xf2tbss."
    )
    assert pickle.loads(content, encoding="latin1")["test"]["a"].tolist() == [
        [1, 2, 3, *range(240, 243)]
    ]
    path = tmp_path / "boxes.pkl"
    path.write_bytes(content)
    assert_equal(read_volume_boxes(path), {"test": {"a": [[1, 2, 3, 240, 241, 242]]}})


def test_json(tmp_path):
    path = tmp_path / "boxes.json"
    content = {s: {n: b.tolist() for n, b in v.items()} for s, v in BOXES.items()}
    path.write_text(" \n" + json.dumps(content, indent=1))
    assert_equal(read_volume_boxes(path))


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"test": {"a": e}}])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, protocol, wrap):
    victim = tmp_path / "victim"
    path = tmp_path / "boxes.pkl"
    for function, *arguments in (
        (os.mkdir, str(victim)),
        (eval, f"__import__('os').mkdir({str(victim)!r})"),
        (getattr, "a", "upper"),
        (np.load, str(path)),
        (np.fromfile, str(path)),
    ):
        path.write_bytes(pickle.dumps(wrap(Evil(function, *arguments)), protocol))
        with pytest.raises(DataError, match=r"boxes.pkl is neither.*wants to call"):
            read_volume_boxes(path)
    assert not victim.exists()


def test_a_dotted_name_does_not_lead_out(tmp_path):
    path = tmp_path / "boxes.pkl"
    name = b"ndarray.__init__.__globals__"
    path.write_bytes(b"\x80\x04\x8c\x05numpy" + b"\x8c" + bytes([len(name)]) + name + b"\x93)R.")
    with pytest.raises(DataError, match="wants to call"):
        read_volume_boxes(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"test": {"a": np.array([[1, {}, 3, 4, 5, 6]], object)}}, "no numbers"),
        ({"test": {"a": np.array(["a"])}}, "no numbers"),
        ({"test": {"a": np.zeros((2, 5))}}, r"test, a: an array of shape \(2, 5\)"),
        ({"test": {"a": np.full((1, 6), np.nan)}}, "test, a"),
        ({"test": {"a": np.array([[4, 0, 0, 3, 1, 1]])}}, "ends before it starts"),
        ({"test": {"a": "abc"}}, "test, a"),
        ({"test": {1: np.zeros((0, 6))}}, "split"),
        ({"a": np.zeros((0, 6))}, "split"),
        ({}, "split"),
        ([1], "split"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, content, message):
    path = tmp_path / "boxes.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        read_volume_boxes(path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"test": [1]}', b"{}", b'{"t": {"a": [[1]]}}'])
def test_bad_json_is_refused(tmp_path, content):
    path = tmp_path / "boxes.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"boxes.json"):
        read_volume_boxes(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MissingDataError, match=r"nothing.pkl"):
        read_volume_boxes(tmp_path / "nothing.pkl")


@settings(max_examples=120, deadline=None)
@given(data=st.data(), protocol=st.sampled_from([0, 2, 5]))
def test_broken_files_raise_nothing_else(tmp_path_factory, data, protocol):
    content = bytearray(pickle.dumps(BOXES, protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    path = tmp_path_factory.mktemp("broken") / "boxes.pkl"
    path.write_bytes(content)
    try:
        read_volume_boxes(path)
    except DataError as error:
        assert "boxes.pkl" in str(error)
