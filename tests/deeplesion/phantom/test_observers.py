"""Readers who know the phantom: their likelihoods against dense Gaussian ones, and what must follow
of them: nothing from one slice, all from all slices without noise, more from more slices."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import multivariate_normal

from deeplesion.data.slices import SliceFolder, load_slices, slice_name
from deeplesion.errors import DataError
from deeplesion.phantom import observers
from deeplesion.phantom.make import draw_series
from deeplesion.phantom.observers import (
    Observer,
    observe_series,
    precision,
    series_of,
    stack_matrix,
    whitening,
)
from deeplesion.phantom.render import NOISE_KERNEL, add_noise, render_slice

READERS = [Observer(d, noise=n) for n in (0.0, 1.5) for d in (1, 3, 7)]


@pytest.fixture(scope="module")
def series(phantom):
    """A thin and a thick series of the phantom."""
    found = series_of(phantom)
    return [next(s for s in found if s.thickness == mm) for mm in (1.0, 5.0)]


@pytest.fixture(scope="module")
def read(phantom, series):
    return [r for one in series for r in observe_series(phantom, READERS, one)]


def noise_covariance(shape):
    """Of CT noise of standard deviation 1 over a rectangle, pair of pixels by pair."""
    kernel = np.outer(NOISE_KERNEL, NOISE_KERNEL).astype(float)
    y, x = (axis.ravel() for axis in np.mgrid[: shape[0], : shape[1]])
    covariance = np.zeros((y.size, y.size))
    for i in range(y.size):
        dy, dx = y - y[i], x - x[i]
        for j in np.flatnonzero((np.abs(dy) < 7) & (np.abs(dx) < 7)):
            a, b = dy[j], dx[j]
            one = kernel[max(a, 0) : 7 + min(a, 0), max(b, 0) : 7 + min(b, 0)]
            other = kernel[max(-a, 0) : 7 + min(-a, 0), max(-b, 0) : 7 + min(-b, 0)]
            covariance[i, j] = (one * other).sum()
    return covariance / covariance[0, 0]


def test_whitening_is_that_of_the_dense_covariance():
    (rows, down), (columns, across) = whitening(9), whitening(11)
    covariance = noise_covariance((9, 11))
    both = np.kron(rows, columns)
    np.testing.assert_allclose(
        both @ covariance @ both.T, np.diag(np.kron(down, across)), atol=1e-6
    )


def test_whitening_holds_for_the_noise_that_is_added():
    rng, rows, down = np.random.default_rng(0), *whitening(24)
    crops = [
        add_noise(rng, np.zeros((64, 64)), np.full((64, 64), 20.0))[20:44, 20:44] / 20
        for _ in range(300)
    ]
    spread = np.var([rows @ crop @ rows.T for crop in crops], axis=0)
    expected = np.outer(down, down) + 1 / 12 / 400
    np.testing.assert_allclose(spread.mean(), expected.mean(), rtol=0.02)
    np.testing.assert_allclose(np.median(spread / expected), 1, atol=0.02)


@pytest.mark.parametrize(("thickness", "key"), [(1.0, 30), (2.0, 14), (5.0, 6), (5.0, 2)])
def test_a_stack_is_its_matrix_of_the_slices(thickness, key):
    """Against the pixels that a network gets, rounded to whole HU; also at the end of a range."""
    rng = np.random.default_rng(1)
    hu = {k: rng.integers(-1000, 1000, (4, 5)).astype(np.int16) for k in range(1, 60)}

    class Folder(SliceFolder):
        def read(self, name):
            return hu[int(name[-7:-4])]

    for policy in ("normalize", "keep_thick"):
        for num_slices, target_mm in ((1, 2.0), (3, 2.0), (7, 2.0), (3, 6.0)):
            observer = Observer(num_slices, policy, target_mm)
            slices, matrix = stack_matrix(key, thickness, (1, 40), observer)
            stack, _ = load_slices(
                Folder("."), slice_name("s", key), thickness, (1, 40), *observer[:3]
            )
            expected = np.einsum("dn,nyx->yxd", matrix, np.stack([hu[k] for k in slices]))
            assert np.abs(stack - expected).max() <= 0.5 + 1e-3


def test_resampled_thick_slices_hold_what_the_slices_themselves_do():
    """Three slices at 2 mm are mixtures of three slices of 5 mm: no more is lost than rounding."""
    for num_slices in (3, 5, 7):
        slices, matrix = stack_matrix(20, 5.0, (1, 40), Observer(num_slices))
        kept = matrix.T @ precision(matrix, 0.0) @ matrix
        np.testing.assert_allclose(kept, np.eye(len(slices)), atol=1e-9)
    # But three positions at +-6 mm do not hold the five slices that they are mixed of.
    slices, matrix = stack_matrix(20, 5.0, (1, 40), Observer(3, target_mm=6.0))
    assert len(slices) == 5
    assert np.linalg.matrix_rank(matrix.T @ precision(matrix, 0.0) @ matrix) == 3


def test_reach_slices_and_policy_are_set_apart():
    """What docs/study_design.md says of stacks: how many mm they look up and down."""

    def reach(thickness, *stack):
        slices, _ = stack_matrix(100, thickness, (1, 200), Observer(*stack))
        return (max(slices) - 100) * thickness

    assert reach(1.0, 3, "normalize", 2.0) == reach(1.0, 3, "keep_thick", 2.0) == 2
    assert reach(1.0, 7, "normalize", 2.0) == reach(1.0, 3, "normalize", 6.0) == 6
    assert reach(1.0, 7, "normalize", 2 / 3) == 2
    assert reach(1.0, 3, "normalize", 5.0) == reach(5.0, 3, "normalize", 5.0) == 5
    for stack in ((3, "normalize", 2.0), (5, "normalize", 2.0), (3, "keep_thick", 2.0)):
        assert reach(5.0, *stack) == 5
    kept, own = (Observer(3, *rest) for rest in (("keep_thick", 2.0), ("normalize", 5.0)))
    np.testing.assert_array_equal(
        stack_matrix(9, 5.0, (1, 20), kept)[1], stack_matrix(9, 5.0, (1, 20), own)[1]
    )
    assert (stack_matrix(9, 5.0, (1, 20), kept)[1] == np.eye(3)).all()


def test_precision_with_noise_of_the_readers_own_is_the_inverse():
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((4, 3))
    covariance = matrix @ matrix.T + 0.3 * np.eye(4)
    np.testing.assert_allclose(precision(matrix, 0.3) @ covariance, np.eye(4), atol=1e-9)


def test_log_likelihoods_are_those_of_the_dense_normal_distribution(phantom, series):
    """Of one slice: rendered whole, with a full covariance, in place of the separable shortcuts."""
    thick = series[1]
    drawn = draw_series(thick)
    key = drawn.keys[0]
    finding = min((f for f, _, _ in key.findings), key=lambda f: f.reach)
    reader = observers._KeySliceReader(
        SliceFolder(phantom / "Images_png"), [Observer(1)], thick, key, drawn
    )
    crop = observers._Crop(reader, finding)
    others = [f for k in drawn.keys for f, _, _ in k.findings if f is not finding]
    level = drawn.noise_level[crop.box]
    covariance = noise_covariance(level.shape) * np.outer(level, level) + np.eye(level.size) / 12
    factor = cho_factor(covariance)

    def dense(hypothesis):
        hu, _ = render_slice(
            drawn.body, finding.z, thick.thickness, [*others, replace(hypothesis, is_lesion=True)]
        )
        rest = (reader.hu[0] - hu)[crop.box].ravel()
        return -rest @ cho_solve(factor, rest) / 2

    hypotheses = [
        finding,
        replace(finding, half_depth=1.2 * finding.half_depth),
        replace(finding, centre=finding.centre + 0.3),
        replace(finding, hu=finding.hu + 5),
    ]
    ours = np.array([crop.log_likelihoods(h, True)[0, 0] for h in hypotheses])
    theirs = np.array([dense(h) for h in hypotheses])
    assert np.ptp(theirs) > 5
    np.testing.assert_allclose(ours - ours[0], theirs - theirs[0], rtol=0.03, atol=0.3)


def test_noise_of_the_readers_own_against_the_joint_normal_distribution():
    """The sums over slices and positions are a normal density of the stack's positions."""
    rng = np.random.default_rng(3)
    matrix, own = rng.standard_normal((3, 2)), 0.7
    slices, mean, extra = (rng.standard_normal((k, 5)) for k in (2, 2, 3))
    positions = matrix @ slices + np.sqrt(own) * extra
    density = multivariate_normal(np.zeros(3), matrix @ matrix.T + own * np.eye(3))
    expected = density.logpdf((positions - matrix @ mean).T).sum()
    expected -= density.logpdf(positions.T).sum()  # up to a constant of the stack
    inverse = precision(matrix, own)
    among, noise = matrix.T @ inverse @ matrix, np.sqrt(own) * inverse @ matrix
    ours = (among * (mean @ slices.T)).sum() + (noise * (extra @ mean.T)).sum()
    ours -= (among * (mean @ mean.T)).sum() / 2
    assert ours == pytest.approx(expected)


def test_one_slice_tells_nothing(read):
    for key in read:
        for which in (0, 3):
            np.testing.assert_allclose(key.scores[:, which], 0, atol=1e-6)


def test_three_slices_without_noise_of_ones_own_tell_all(read):
    assert {key.thickness for key in read} == {1.0, 5.0}
    for key in read:
        for which in (1, 2):
            assert ((key.scores[:, which] > 0) == key.is_lesion[:, None]).all()


def test_more_slices_tell_more(read):
    """By the mean logarithm of the probability of the truth, which knowledge cannot lower."""
    sign = np.concatenate([np.where(key.is_lesion, 1, -1) for key in read])
    scores = np.concatenate([key.scores for key in read])
    log_probability = -np.logaddexp(0, -sign[:, None, None] * scores).mean(axis=(0, 2))
    ideal, noisy = log_probability[:3], log_probability[3:]
    assert ideal[0] == pytest.approx(np.log(0.5)) and noisy[0] == pytest.approx(np.log(0.5))
    assert noisy[0] < noisy[1] < noisy[2] < 0
    assert ideal[1] > noisy[1]


def test_boxes_and_kinds_are_those_of_the_truth(phantom, read):
    truth = json.loads((phantom / "phantom_truth" / "truth.json").read_text())
    for key in read:
        entry = truth[key.file_name]
        for kind, chosen in (("lesions", key.is_lesion), ("distractors", ~key.is_lesion)):
            np.testing.assert_allclose(key.boxes[chosen], [f["bbox"] for f in entry[kind]])


def test_lesions_without_a_label_are_read_too(phantom, tmp_path):
    noted = json.loads((phantom / "phantom_truth" / "arguments.json").read_text())
    (tmp_path / "phantom_truth").mkdir()
    (tmp_path / "DL_info.csv").touch()
    (tmp_path / "phantom_truth" / "arguments.json").write_text(
        json.dumps({**noted, "unlabelled": 0.5})
    )
    assert series_of(tmp_path) == series_of(phantom)


def test_only_a_finished_phantom_is_read(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        series_of(tmp_path)
    (tmp_path / "phantom_truth").mkdir()
    noted = dict(phantom_version=2, patients=3, size=128, seed=0)
    (tmp_path / "phantom_truth" / "arguments.json").write_text(json.dumps(noted))
    with pytest.raises(DataError, match="no finished phantom"):
        series_of(tmp_path)
