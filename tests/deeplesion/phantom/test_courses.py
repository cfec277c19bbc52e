"""How distractors run through the slices, and that they look like lesions on their key slice."""

import json
import sys

import numpy as np
import pytest

from deeplesion.errors import UserError
from deeplesion.phantom import make
from deeplesion.phantom.body import Body
from deeplesion.phantom.courses import DISTRACTORS, FADE, PERSIST, SLOW, STUB_ENDS, draw_course
from deeplesion.phantom.findings import Scan
from deeplesion.phantom.make import (
    _draw_key_slices,
    draw_findings,
    draw_series,
    make_phantom,
    plan_series,
)
from tools.make_phantom import main as make_phantom_command


def courses(name, count=400, diameter=8.0):
    rng = np.random.default_rng(3)
    return [draw_course(rng, name, diameter) for _ in range(count)]


def test_varied_distractors_are_noted(tmp_path, monkeypatch):
    series = plan_series(3, 128, 5, "varied")[0]
    record = make.make_series(tmp_path / "series", series)
    found = [f for entry in record["truth"].values() for f in entry["distractors"]]
    assert found and {f["course"] for f in found} <= DISTRACTORS["varied"].keys()
    assert all(len(f["ends_mm"]) == 2 for f in found)

    monkeypatch.setattr(make, "in_processes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path / "root", 3, 128, 5, progress=False, distractors="varied")
    noted = json.loads((tmp_path / "root" / "phantom_truth" / "arguments.json").read_text())
    assert noted["distractors"] == "varied"
    with pytest.raises(FileExistsError, match="varied"):
        make_phantom(tmp_path / "root", 3, 128, 5, progress=False)
    with pytest.raises(UserError, match="oblique, varied"):
        make_phantom(tmp_path / "other", 3, 128, distractors="curly")


def test_whole_scans_have_oblique_ones_only(tmp_path, monkeypatch):
    options = ["--scans", str(tmp_path), "--distractors", "varied"]
    monkeypatch.setattr(sys, "argv", ["make_phantom.py", *options])
    with pytest.raises(SystemExit, match="not with --scans"):
        make_phantom_command()


def test_shares_are_shares():
    for shares in DISTRACTORS.values():
        assert sum(shares.values()) == pytest.approx(1)
    names = [course.name for course in courses("varied", 4000)]
    for name, share in DISTRACTORS["varied"].items():
        assert names.count(name) / 4000 == pytest.approx(share, abs=0.03)


def test_speeds_and_ends_of_each_course():
    for diameter in (4.0, 40.0):
        fast = max(1.1, 0.06 * diameter)
        for course in courses("oblique", diameter=diameter) + courses("varied", diameter=diameter):
            speed = np.hypot(*course.velocity)
            low, high = {
                "oblique": (1, 1.4),
                "slow": (SLOW[0], 1.4 * SLOW[1]),
                "stub": (SLOW[0], 1.4 * SLOW[1]),
                "straight": (0, 0),
            }[course.name]
            assert low * fast - 1e-9 <= speed <= high * fast + 1e-9
            if course.name == "stub":
                assert all(STUB_ENDS[0] <= end <= STUB_ENDS[1] for end in course.ends)
            else:
                assert course.ends == (PERSIST, PERSIST)


def test_directions_are_all_equally_likely():
    angles = [np.arctan2(*c.velocity) for c in courses("varied", 4000) if c.name != "straight"]
    assert abs(np.mean(np.exp(1j * np.array(angles)))) < 0.05


@pytest.mark.parametrize("thickness", [1.0, 5.0])
def test_varied_ones_too_look_like_lesions_on_their_key_slice(thickness):
    rng = np.random.default_rng(8)
    body, scan = Body(rng, 128, 1.5), Scan(128, 1.5, thickness)
    found = [
        finding
        for z in range(60, 560, 50)
        for finding, _, _ in draw_findings(rng, body, scan, float(z), [], "varied")
    ]
    assert len({finding.course.name for finding in found}) > 1
    for finding in found:
        lesion, tube = (finding.section(finding.z, kind) for kind in (True, False))
        assert lesion[0] == tube[0]
        np.testing.assert_array_equal(lesion[1], tube[1])
        np.testing.assert_array_equal(lesion[2], tube[2])
    assert sum(finding.is_lesion for finding in found) == len(found) / 2


def test_a_distractor_ends_where_its_course_does():
    rng = np.random.default_rng(9)
    body, scan = Body(rng, 128, 1.5), Scan(128, 1.5, 1.0)
    names = set()
    for z in range(60, 560, 50):
        for finding, _, _ in draw_findings(rng, body, scan, float(z), [], "varied"):
            course, full = finding.course, finding.section(float(z), False)[1].sum()
            names.add(course.name)
            rest = 0 if course.name == "stub" else FADE
            for sign, end in zip((-1, 1), course.ends, strict=True):
                assert finding.section(z + sign * (end + rest + 0.1), False) is None
                section = finding.section(z + sign * 0.8 * end, False)
                x, y = finding.centre + sign * 0.8 * end * course.velocity
                if 20 < x < 108 and 20 < y < 108:
                    # An ellipse's section at 0.8 of the way has 0.6 of its width.
                    share = 0.36 if course.name == "stub" else 1
                    assert section[1].sum() / full == pytest.approx(share, rel=0.1)
    assert len(names) > 1


def test_no_varied_distractor_shows_in_another_key_slice():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        scan = Scan(128, 1.5, (1.0, 2.0, 5.0)[seed % 3])
        keys = _draw_key_slices(rng, Body(rng, 128, 1.5), scan, "varied")
        for key in keys:
            for other in keys:
                for finding, _, _ in other.findings if other is not key else []:
                    assert finding.section(key.index * scan.thickness, finding.is_lesion) is None


def test_a_series_is_drawn_the_same_again():
    first, second = (draw_series(plan_series(4, 128, 2, "varied")[0]) for _ in range(2))
    one, two = ([f.course for key in d.keys for f, _, _ in key.findings] for d in (first, second))
    assert [c.name for c in one] == [c.name for c in two] and one
    np.testing.assert_array_equal([c.velocity for c in one], [c.velocity for c in two])
