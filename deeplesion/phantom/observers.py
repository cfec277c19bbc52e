"""Observers who know how the phantom is drawn: how well lesions and distractors can be told apart
from the slices of a stack, before any network is trained.

Such an observer scores each object by the likelihood ratio of its slices, lesion against
distractor, which no other score beats (Barrett and Myers, Foundations of Image Science, 2004,
chapter 13).
docs/study_design.md lists what it is told, and what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.linalg import toeplitz
from scipy.special import logsumexp

from deeplesion.conventions import RECIST_MARGIN
from deeplesion.data.coco import read_json
from deeplesion.data.slices import SliceFolder, plan_stack, slice_name
from deeplesion.errors import DataError
from deeplesion.phantom.courses import Course, draw_course
from deeplesion.phantom.findings import Finding, draw_half_depth, draw_offset, stays_in_tissue
from deeplesion.phantom.make import DrawnSeries, KeySlice, Series, draw_series, plan_series
from deeplesion.phantom.render import BLUR, NOISE_KERNEL, blurred, compose

DEPTHS = 16  # hypotheses of how deep a lesion is, the true one among them
COURSES = 2, 64  # of how a distractor runs: at least so many a depth, and so many more in all
# Key slices are weighed as if their log likelihoods were so many times smaller, only to decide
# with which depths courses are tried.
TEMPERATURE = 25.0
READINGS = 8  # of each stack, with other noise of the observer's own


class Observer(NamedTuple):
    """A stack of slices (see `deeplesion.data.slices.load_slices`), and who reads it.

    `noise` is the standard deviation of noise that the observer adds to each slice of the stack, of
    the same grain as the scanner's, in units of the object's contrast in the key slice: 0 for the
    ideal observer. It stands for all that makes an observer less than ideal. Noise that grows with
    contrast is the usual model of human observers (Burgess and Colborne, Journal of the Optical
    Society of America A 1988), and whether an object is bright or faint then matters little.
    """

    num_slices: int
    policy: str = "normalize"
    target_mm: float = 2.0
    noise: float = 0.0


@dataclass(frozen=True, eq=False)
class Observed:
    """A key slice as the observers read it.

    Attributes:
        file_name, patient, split, thickness: of the key slice; split 1 train, 2 val, 3 test, mm.
        boxes: (n, 4) x1, y1, x2, y2 of its objects, as DeepLesion draws the boxes of lesions.
        is_lesion: (n,) bool.
        courses: (n,) name of each one's course, which of lesions is not in use.
        scores: (n, observers, READINGS) log likelihood ratio, lesion against distractor.
    """

    file_name: str
    patient: int
    split: int
    thickness: float
    boxes: np.ndarray
    is_lesion: np.ndarray
    courses: np.ndarray
    scores: np.ndarray


def series_of(root: Path) -> list[Series]:
    """The series of the phantom in a folder. Raises DataError if none of this version is there."""
    arguments = read_json(root / "phantom_truth" / "arguments.json", "what make_phantom noted")
    if arguments.pop("phantom_version", None) != 2 or not (root / "DL_info.csv").exists():
        raise DataError(f"{root} holds no finished phantom of this version: make one anew")
    arguments.pop("unlabelled", None)  # of the table alone: nothing is drawn otherwise
    return plan_series(**arguments)


def observe_series(root: Path, observers: Sequence[Observer], series: Series) -> list[Observed]:
    """Have the observers read all key slices of a series of the phantom in `root`."""
    drawn = draw_series(series)
    folder = SliceFolder(root / "Images_png")
    return [
        Observed(
            slice_name(series.name, key.index),
            series.patient,
            series.split,
            series.thickness,
            np.array([_box(recist) for _, _, recist in key.findings]),
            np.array([finding.is_lesion for finding, _, _ in key.findings]),
            np.array([finding.course.name for finding, _, _ in key.findings]),
            _KeySliceReader(folder, observers, series, key, drawn).scores(),
        )
        for key in drawn.keys
    ]


def _box(recist: np.ndarray) -> np.ndarray:
    return np.concatenate([recist.min(0) - RECIST_MARGIN, recist.max(0) + RECIST_MARGIN])


def stack_matrix(
    key: int, thickness: float, slice_range: tuple[int, int], observer: Observer
) -> tuple[list[int], np.ndarray]:
    """The slices with a say in a stack, and (D, slices) how much of each is in each position."""
    positions, _ = plan_stack(
        key, thickness, slice_range, observer.num_slices, observer.policy, observer.target_mm
    )
    slices = sorted({index for near, far, _ in positions for index in (near, far)})
    matrix = np.zeros((len(positions), len(slices)))
    for row, (near, far, weight) in zip(matrix, positions, strict=True):
        row[slices.index(near)] += 1 - weight
        row[slices.index(far)] += weight
    used = matrix.any(axis=0)
    return [s for s, there in zip(slices, used, strict=True) if there], matrix[:, used]


def precision(matrix: np.ndarray, own_noise: float) -> np.ndarray:
    """(D, D) inverse covariance of the noise of a stack's positions.

    The slices' noise has variance 1, the observer's `own_noise`. Without the latter the inverse is
    the pseudo-inverse: what the positions have in excess of the slices they are made of, such as
    repeated ends, tells nothing new.
    """
    covariance = matrix @ matrix.T + own_noise * np.eye(len(matrix))
    return np.linalg.pinv(covariance, rcond=1e-9, hermitian=True)


@lru_cache(maxsize=256)
def whitening(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: (length, length) matrix that decorrelates noise, and variances (length,).

    The noise is stationary and its kernel separable, so its covariance over a rectangle is the
    Kronecker product of those of the axes, and the matrix holds for each axis by itself.
    """
    kernel = NOISE_KERNEL.ravel().astype(float)
    correlation = np.convolve(kernel, kernel) / (kernel**2).sum()
    column = np.zeros(length)
    part = correlation[len(kernel) - 1 :][:length]
    column[: len(part)] = part
    variances, vectors = np.linalg.eigh(toeplitz(column))
    return vectors.T, np.maximum(variances, 0)


@lru_cache(maxsize=256)
def blurring(length: int) -> np.ndarray:
    """(length, length) the scanner's blur along one axis of what is zero outside."""
    kernel = BLUR.ravel().astype(float)
    column = np.zeros(length)
    part = kernel[len(kernel) // 2 :][:length]
    column[: len(part)] = part
    return toeplitz(column)


class _KeySliceReader:
    """A key slice with all slices that any observer's stack touches."""

    def __init__(
        self,
        folder: SliceFolder,
        observers: Sequence[Observer],
        series: Series,
        key: KeySlice,
        drawn: DrawnSeries,
    ):
        self.observers, self.key, self.drawn = observers, key, drawn
        self.thickness = series.thickness
        stacks = [
            stack_matrix(key.index, series.thickness, (key.first, key.last), o) for o in observers
        ]
        self.slices = sorted({s for slices, _ in stacks for s in slices})
        self.stacks = []
        for slices, matrix in stacks:
            wide = np.zeros((len(matrix), len(self.slices)))
            wide[:, [self.slices.index(s) for s in slices]] = matrix
            self.stacks.append(wide)
        self.hu = [folder.read(slice_name(series.name, index)) for index in self.slices]
        self.slabs = [
            drawn.body.slab(index * self.thickness, self.thickness) for index in self.slices
        ]
        self.tissue = drawn.body.plane(key.index * self.thickness)[1]
        # Draws of the observers, not of the phantom: which hypotheses, and their own noise.
        self.rng = np.random.default_rng([series.seed, series.patient, series.study, key.index])
        self.distractors = series.distractors

    def scores(self) -> np.ndarray:
        """(objects, observers, readings) log likelihood ratios."""
        findings = [finding for finding, _, _ in self.key.findings]
        return np.array([self._score(finding) for finding in findings])

    def _score(self, finding: Finding) -> np.ndarray:
        crop = _Crop(self, finding)
        depths = [finding] + [self._draw_depth(finding) for _ in range(DEPTHS - 1)]
        as_lesion = np.stack([crop.log_likelihoods(f, True) for f in depths])
        # Where the key slice tells how deep a lesion is, most courses go with the likely depths:
        # each depth keeps its weight, and only the accuracy of its sum differs.
        seen = np.array([crop.key_log_likelihood(f) for f in depths]) / TEMPERATURE
        least, more = COURSES
        counts = least + np.round(more * np.exp(seen - logsumexp(seen))).astype(int)
        as_distractor = []
        for which, (depth, count) in enumerate(zip(depths, counts, strict=True)):
            courses = [self._draw_course(finding) for _ in range(count - (which == 0))]
            if which == 0:
                courses.append(finding.course)
            each = [crop.log_likelihoods(replace(depth, course=c), False) for c in courses]
            as_distractor.append(logsumexp(each, axis=0) - np.log(len(each)))
        return logsumexp(as_lesion, axis=0) - logsumexp(as_distractor, axis=0)

    def _draw_depth(self, finding: Finding) -> Finding:
        half_depth = draw_half_depth(self.rng, finding.outline)
        return replace(finding, half_depth=half_depth, offset=draw_offset(self.rng, half_depth))

    def _draw_course(self, finding: Finding) -> Course:
        for _ in range(200):
            course = draw_course(
                self.rng, self.distractors, finding.outline.diameter / finding.scan.spacing
            )
            if stays_in_tissue(finding.centre, course, self.tissue, finding.tissue):
                return course
        return finding.course


class _Crop:
    """The surroundings of one object in all slices: what is left of them after the background, and
    what a hypothesis adds to that, both decorrelated."""

    def __init__(self, reader: _KeySliceReader, finding: Finding):
        self.reader = reader
        heights = np.array(reader.slices) * reader.thickness
        self.heights = heights
        far = np.abs(heights - finding.z).max()
        speed = 1.4 * max(1.1, 0.06 * finding.outline.diameter / finding.scan.spacing)
        margin = finding.reach + finding.edge + 3 + speed * far
        x0, y0 = np.maximum(np.floor(finding.centre - margin), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(finding.centre + margin) + 1, finding.scan.size).astype(int)
        self.corner, self.box = (y0, x0), np.s_[y0:y1, x0:x1]
        self.level = reader.drawn.noise_level
        (rows, across_rows), (columns, across_columns) = whitening(y1 - y0), whitening(x1 - x0)
        self.rows, self.columns = rows @ blurring(y1 - y0), columns @ blurring(x1 - x0)
        # Whole HU: rounding is white noise of variance 1/12.
        mean_level = self.level[self.box].mean()
        rounding = 1 / 12 / mean_level**2
        self.scale = 1 / np.sqrt(np.outer(across_rows, across_columns) + rounding)
        others = [f for key in reader.drawn.keys for f, _, _ in key.findings if f is not finding]
        self.background, data = [], []
        for height, slab, hu in zip(heights, reader.slabs, reader.hu, strict=True):
            background, _ = compose(slab, height, others)
            self.background.append((background, slab[1]))
            rest = (hu - blurred(background))[self.box] / self.level[self.box]
            data.append(self.scale * (rows @ rest @ columns.T))
        self.data = np.array(data).reshape(len(heights), -1)
        positions = max(o.num_slices for o in reader.observers)
        self.own = reader.rng.standard_normal((READINGS, positions, self.data.shape[1]))
        # Of each observer what the slices weigh pair by pair, and its own noise with each slice.
        self.among = np.zeros((len(reader.observers), len(heights), len(heights)))
        self.noise = np.zeros((len(reader.observers), positions, len(heights)))
        for k, (observer, matrix) in enumerate(zip(reader.observers, reader.stacks, strict=True)):
            own = (observer.noise * self._contrast(finding) / mean_level) ** 2
            inverse = precision(matrix, own)
            self.among[k] = matrix.T @ inverse @ matrix
            self.noise[k, : len(matrix)] = np.sqrt(own) * inverse @ matrix

    def _contrast(self, finding: Finding) -> float:
        """HU between an object in its key slice and what is behind it."""
        box, opacity, value = finding.section(finding.z, True)
        background, passable = self.background[int(np.abs(self.heights - finding.z).argmin())]
        weight = opacity * passable[box]
        return float((weight * np.abs(value - background[box])).sum() / weight.sum())

    def log_likelihoods(self, finding: Finding, as_lesion: bool) -> np.ndarray:
        """(observers, readings) log likelihood of each stack, up to a constant of the stack."""
        mean = np.zeros_like(self.data)
        for k in range(len(mean)):
            added = self._whitened(finding, k, as_lesion)
            if added is not None:
                mean[k] = added.ravel()
        of_slices = mean @ (self.data - mean / 2).T
        of_noise = self.own @ mean.T
        return (
            self.among.reshape(len(self.among), -1) @ of_slices.reshape(-1, 1)
            + self.noise.reshape(len(self.noise), -1) @ of_noise.reshape(len(of_noise), -1).T
        )

    def key_log_likelihood(self, finding: Finding) -> float:
        """Of the key slice alone, which is the same for a lesion and a distractor."""
        k = int(np.abs(self.heights - finding.z).argmin())
        mean = self._whitened(finding, k, True)
        return float(mean.ravel() @ self.data[k] - (mean**2).sum() / 2)

    def _whitened(self, finding: Finding, k: int, as_lesion: bool) -> np.ndarray | None:
        """What the object adds to slice k, decorrelated, or None."""
        section = finding.section(self.heights[k], as_lesion)
        if section is None:
            return None
        box, opacity, value = section
        background, passable = self.background[k]
        # The noise level changes so slowly that it may be divided by before the blur.
        added = opacity * passable[box] * (value - background[box]) / self.level[box]
        y, x = box[0].start - self.corner[0], box[1].start - self.corner[1]
        rows = self.rows[:, y : y + added.shape[0]]
        columns = self.columns[:, x : x + added.shape[1]]
        return self.scale * (rows @ added @ columns.T)
