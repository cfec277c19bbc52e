"""What was found on slices is kept: whole, in any state of the file, and of the same work alone."""

import json

import numpy as np
import pytest

from ct_volumes.lesions import Patch, SliceDetections
from ct_volumes.slice_results import SliceResults, decoded, encoded
from mmdet_ext.engine.predict import LesionDetector

from ..small_detector import body_of, config_of, volume_of, write_checkpoint
from .test_predict import same

KEY = dict(network="a", interval_mm=2.0)


def some_detections(index, rng, masks=True, count=3):
    boxes = rng.uniform(-0.5, 500, (count, 4)).astype(np.float32)
    patches = tuple(
        Patch(int(x), int(y), rng.random((int(h), int(w))) < 0.5)
        for x, y, h, w in rng.integers(0, 20, (count, 4))
    )
    scores = rng.random(count).astype(np.float32)
    return SliceDetections(index, boxes, scores, patches if masks else None)


@pytest.fixture
def several():
    rng = np.random.default_rng(0)
    found = [some_detections(n, rng, masks=n != 3) for n in range(1, 6)]
    return [*found, some_detections(9, rng, count=0)]


def test_a_line_holds_a_slice_exactly(several):
    assert same([decoded(encoded(each)) for each in several], several)


def test_a_file_is_continued(several, tmp_path):
    path = tmp_path / "slices.jsonl"
    for each in several:
        SliceResults(path, KEY).add([each])
    assert same(list(SliceResults(path, KEY).found.values()), several)
    assert [file.name for file in tmp_path.iterdir()] == ["slices.jsonl"]


def test_a_file_cut_off_anywhere_holds_the_slices_before(several, tmp_path):
    path, whole = tmp_path / "slices.jsonl", tmp_path / "whole.jsonl"
    SliceResults(whole, KEY).add(several)
    content = whole.read_bytes()
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    for end in [*range(0, len(content), 97), *ends, *(e - 1 for e in ends)]:
        path.write_bytes(content[:end])
        results = SliceResults(path, KEY)
        number = max(sum(e <= end for e in ends) - 1, 0)
        assert len(results.found) == number
        results.add(several[number:])
        assert path.read_bytes() == content


def test_a_damaged_line_and_what_follows_are_found_again(several, tmp_path):
    path = tmp_path / "slices.jsonl"
    SliceResults(path, KEY).add(several)
    lines = path.read_bytes().splitlines(keepends=True)
    first = json.loads(lines[1])
    for bad in (
        b"\n", b"7\n", b"{}\n", b"\xff\xfe\n", b'{"index": 1}\n', b"[" * 100_000 + b"\n",
        json.dumps(first | dict(boxes=first["boxes"][:2])).encode() + b"\n",
        json.dumps(first | dict(masks=first["masks"][:2])).encode() + b"\n",
        json.dumps(first | dict(masks=[[0, 0, 99, 99, "AAAA"]] * 3)).encode() + b"\n",
        json.dumps(first | dict(masks=[[0, 0, -1, 2, "AAAA"]] * 3)).encode() + b"\n",
        json.dumps(first | dict(index="one")).encode() + b"\n",
    ):  # fmt: skip
        path.write_bytes(b"".join([*lines[:2], bad, *lines[2:]]))
        results = SliceResults(path, KEY)
        assert same(list(results.found.values()), several[:1])
        results.add(several[1:])
        assert path.read_bytes() == b"".join(lines)


def test_other_work_is_begun_anew(several, tmp_path):
    path = tmp_path / "slices.jsonl"
    SliceResults(path, KEY).add(several)
    other = SliceResults(path, KEY | dict(interval_mm=3.0))
    assert not other.found
    other.add(several[:1])
    assert not SliceResults(path, KEY).found


def test_without_a_file_results_are_kept_in_memory(several, tmp_path):
    results = SliceResults(None, KEY)
    results.add(several)
    assert list(results.found) == [1, 2, 3, 4, 5, 9]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "epoch_1.pth"
    return LesionDetector(config_of(), write_checkpoint(config_of(), path), "cpu")


def test_interrupted_at_any_batch_it_goes_on(detector, tmp_path, monkeypatch):
    hu = body_of(7)
    hu[2] = -1000  # no body
    volume = volume_of(hu, 1.0, (3.0, 3.0))
    expected = detector.detect_slices(volume, None, 2, progress=False)
    batch = LesionDetector._detect_batch
    for interrupted_at in range(3):
        calls = []

        def interrupted(self, volume, keys, images, calls=calls, at=interrupted_at):
            calls.append(keys)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
            return batch(self, volume, keys, images)

        store = tmp_path / f"{interrupted_at}.jsonl"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LesionDetector, "_detect_batch", interrupted)
            detector.detect_slices(volume, None, 2, progress=False, store=store)
        done = 2 * interrupted_at
        with monkeypatch.context() as patch:
            calls = []
            patch.setattr(
                LesionDetector, "_detect_batch", lambda *a, c=calls: c.extend(a[2]) or batch(*a)
            )
            found = detector.detect_slices(volume, None, 2, progress=False, store=store)
        assert calls == [0, 1, 3, 4, 5, 6][done:]
        assert same(found, expected)


def test_another_scan_network_or_interval_is_other_work(detector, tmp_path):
    volume = volume_of(body_of(3), 1.0, (3.0, 3.0))
    key = detector.key(volume, 2.0, False)
    assert key == detector.key(volume_of(body_of(3), 1.0, (3.0, 3.0)), 2.0, False)
    assert json.loads(json.dumps(key)) == key
    hu = body_of(3)
    hu[1, 5, 5] += 1
    config = config_of(**{"model.test_cfg.rcnn.max_per_img": 9})
    others = [
        detector.key(volume_of(hu, 1.0, (3.0, 3.0)), 2.0, False),
        detector.key(volume_of(body_of(3), 1.1, (3.0, 3.0)), 2.0, False),
        detector.key(volume_of(body_of(3), 1.0, (3.0, 3.1)), 2.0, False),
        detector.key(volume, 3.0, False),
        detector.key(volume, None, False),
        detector.key(volume, 2.0, True),
        detector.key(volume, 2.0, False, 0.1),
        LesionDetector(config, detector.checkpoint, "cpu").key(volume, 2.0, False),
        LesionDetector(
            config_of(), write_checkpoint(config_of(), tmp_path / "epoch_2.pth", 5), "cpu"
        ).key(volume, 2.0, False),
    ]
    assert all(other != key for other in others)
