"""The readers, given files that were valid before something happened to them: they read what is
there, or say which file is wrong, and nothing else.

A few examples here; for minutes:
FUZZ_EXAMPLES=100000 pytest tests/deeplesion/data/test_fuzz.py -k slice
"""

import copy
import gzip
import json
import math
import os
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from deeplesion.data.coco import read_annotations
from deeplesion.data.dl_info import read_dl_info
from deeplesion.data.run_lengths import mask_areas
from deeplesion.data.slices import SliceFolder
from deeplesion.errors import DataError
from deeplesion.evaluation.average_precision import ap50
from deeplesion.evaluation.diameters import diameter_errors
from deeplesion.evaluation.evaluate import froc_table
from deeplesion.evaluation.results import read_results, write_results

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 150)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

NUMBERS = st.one_of(
    st.integers(-3, 700), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**400, -0.0])
)
VALUES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.lists(NUMBERS, max_size=9),
    st.sampled_from([[], {}, [[]], [{}], "a/1.png", "../x/1.png", "\ud800/1.png", "a\0/1.png"]),
)  # fmt: skip


@st.composite
def with_bytes_changed(draw, content):
    """Some bytes replaced, taken out, put in or doubled; or the end cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        until = at + draw(st.one_of(st.integers(0, 4), st.just(len(content))))
        new = draw(st.one_of(st.binary(max_size=4), st.just(bytes(content[at : at + 40]) * 2)))
        content[at:until] = new
    return bytes(content)


@st.composite
def with_values_changed(draw, content):
    """JSON in which some values are replaced, taken out or doubled, anywhere in the tree."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 5)):
                node = node[key]
                continue
            change = draw(st.integers(0, 5))
            if change == 0:
                del node[key]
            elif change == 1 and isinstance(node, list):
                node.append(copy.deepcopy(node[key]))
            elif change == 2 and isinstance(node[key], str):
                text = node[key].encode("utf-8", "surrogatepass")
                node[key] = draw(with_bytes_changed(text)).decode("latin-1")
            else:
                node[key] = copy.deepcopy(draw(VALUES))
            break
    return content


def refused(read, path, error=ValueError):
    """What `read` makes of a file; None, if it says that the file is wrong."""
    try:
        return read(path)
    except error as refusal:
        assert path.name in str(refusal)
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# DL_info.csv


@pytest.fixture(scope="module")
def table(phantom):
    lines = (phantom / "DL_info.csv").read_bytes().splitlines(keepends=True)
    return b"".join(lines[:5])


@st.composite
def with_cells_changed(draw, table):
    """Some cells replaced by other numbers and texts, some lines doubled or taken out."""
    lines = [line.split(b",") for line in table.splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        line = draw(st.sampled_from(lines))
        if draw(st.integers(0, 5)) == 0:
            lines.append(list(line)) if draw(st.booleans()) else lines.remove(line)
        elif line:
            text = draw(
                st.one_of(
                    NUMBERS.map(lambda n: "1" + "0" * 400 if abs(n) == 10**400 else repr(n)),
                    st.text(max_size=4),
                    st.sampled_from(["", '"', "nan", "1e999", "1_0", "0x1", "\u0661", "1;2", "-"]),
                )
            )
            line[draw(st.integers(0, len(line) - 1))] = text.encode("utf-8", "replace")
        if not lines:
            break
    return b"\n".join(b",".join(line) for line in lines)


@fuzzed
@given(data=st.data())
def test_dl_info(data, table, folder):
    changed = data.draw(st.one_of(with_cells_changed(table), with_bytes_changed(table)))
    check_dl_info(changed, folder)


def check_dl_info(content, folder):
    path = folder / "DL_info.csv"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lesions = refused(read_dl_info, path)
    if lesions is None:
        return
    for lesion in lesions.itertuples():
        assert lesion.split in ("train", "val", "test")
        assert lesion.slice_range[0] <= lesion.key_slice <= lesion.slice_range[1]
        assert math.isnan(lesion.thickness_mm) or 0 < lesion.thickness_mm < math.inf
        assert 0 < lesion.spacing_mm < math.inf and lesion.height > 0 and lesion.width > 0
        if not lesion.noisy:
            x1, y1, x2, y2 = lesion.bbox
            assert 0 <= x1 < x2 <= lesion.width - 1 and 0 <= y1 < y2 <= lesion.height - 1
            assert np.isfinite(lesion.recist).all()


# Slices


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)
    )  # fmt: skip


@pytest.fixture(scope="module")
def slice_and_png():
    hu = np.random.default_rng(0).integers(-1024, 2000, (12, 10)).astype(np.int16)
    return hu, cv2.imencode(".png", (hu.astype(np.int32) + 32768).astype(np.uint16))[1].tobytes()


@fuzzed
@given(data=st.data())
def test_slice_with_bytes_changed_is_refused_or_the_same(data, slice_and_png, folder):
    hu, png = slice_and_png
    (folder / "1.png").write_bytes(data.draw(with_bytes_changed(png)))
    read = refused(lambda path: SliceFolder(folder).read(path.name), folder / "1.png", DataError)
    if read is not None:
        np.testing.assert_array_equal(read, hu)


CRASH = b"\xf8\x83\xe7\x10e\xe9q\xaa"
SIDES = st.one_of(st.integers(0, 20), st.sampled_from([30000, 2**16, 2**31 - 1, 2**32 - 1]))


@fuzzed
@given(
    sides=st.tuples(SIDES, SIDES),
    depth=st.sampled_from([16, 16, 16, 1, 8, 0, 32]),
    kind=st.sampled_from([0, 0, 0, 2, 3, 4, 6, 9]),
    rest=st.tuples(*[st.sampled_from([0, 0, 0, 1, 255])] * 3),
    pixels=st.binary(max_size=300),
    others=st.lists(
        st.tuples(
            st.sampled_from(
                [b"tRNS", b"gAMA", b"PLTE", b"acTL", b"fcTL", b"eXIf", b"IHDR", b"IEND"]
            ),
            st.binary(max_size=30),
        ),
        max_size=2,
    ),
)
@example((4, 4), 16, 0, (0, 0, 0), bytes(36), [])
# OpenCV 4.12 was ended by a segmentation fault: animated, with a filter that there is not.
@example((1, 1), 1, 0, (0, 0, 0), CRASH, [(b"acTL", CRASH)] * 2)
@example((1, 1), 16, 0, (0, 0, 0), CRASH, [(b"acTL", CRASH)] * 2)
def test_slice_that_promises_anything(folder, sides, depth, kind, rest, pixels, others):
    header = struct.pack(">IIBBBBB", *sides, depth, kind, *rest)
    parts = [chunk(b"IHDR", header), *(chunk(*other) for other in others)]
    parts += [chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    path = folder / "2.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    read = refused(lambda path: SliceFolder(folder).read(path.name), path, DataError)
    if read is not None:
        assert read.dtype == np.int16 and read.ndim == 2 and depth == 16
        if not others:
            assert read.shape == sides[::-1]


# Annotations


@pytest.fixture(scope="module")
def annotations(phantom):
    content = json.loads((phantom / "annotations/train.json").read_text())
    content["images"] = content["images"][:2]
    ids = [image["id"] for image in content["images"]]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    return content


@fuzzed
@given(data=st.data())
def test_annotations(data, annotations, folder):
    changed = data.draw(with_values_changed(annotations))
    content = json.dumps(changed).encode()
    if not data.draw(st.integers(0, 4)):
        content = data.draw(with_bytes_changed(content))
    check_annotations(content, folder)


def check_annotations(content, folder):
    from mmdet_ext.datasets.deeplesion import DeepLesionDataset

    path = folder / "train.json"
    path.write_bytes(content)
    content = refused(read_annotations, path, DataError)
    if content is None:
        return
    prefix = dict(img="Images_png")
    data = DeepLesionDataset(
        ann_file=str(path),
        data_prefix=prefix,
        pipeline=[],
        test_mode=True,
        serialize_data=False,
        stack=dict(num_slices=3),
    )
    assert len(data) == len(content["images"])
    lesions = [lesion for i in range(len(data)) for lesion in data.get_data_info(i)["lesions"]]
    assert len(lesions) == len(content["annotations"])
    # Without a mask boxes alone can be learnt; the data set refuses the rest.
    drawn = [lesion for lesion in lesions if lesion["mask"] is not None]
    assert len(drawn) == sum(bool(a.get("segmentation")) for a in content["annotations"])
    for lesion in drawn:
        mask = coco_mask.decode(lesion["mask"])
        assert mask.any()
        assert mask_areas([lesion["mask"]["counts"]], [mask.size]) == [mask.sum()]


# Result files


@pytest.fixture(scope="module")
def written(results, folder):
    write_results(folder / "whole.json", results[0].records[:3])
    return json.loads((folder / "whole.json").read_text())


@fuzzed
@given(data=st.data())
def test_results(data, written, folder):
    changed = data.draw(with_values_changed(written))
    content = json.dumps(changed).encode()
    zipped = data.draw(st.booleans())
    if zipped:
        content = gzip.compress(content, 1)
    if not data.draw(st.integers(0, 4)):
        content = data.draw(with_bytes_changed(content))
    check_results(content, folder / ("results.json.gz" if zipped else "results.json"))


def check_results(content, path):
    path.write_bytes(content)
    result = refused(read_results, path)
    if not result or not result.records:
        return
    records = result.records
    froc_table(records)
    ap50(records)
    diameter_errors(records, resamples=2)
    assert len(result.patients) == len(records)


DEEP = b"[" * 100_000


@pytest.mark.parametrize("content", [b"", DEEP, b"9" * 5000, b"\xff\xfe", b"null", b"{}", b"[1]"])
def test_what_is_not_even_such_a_file(content, folder):
    check_annotations(content, folder)
    check_results(content, folder / "results.json")
    check_results(content, folder / "results.json.gz")
    check_dl_info(content, folder)
