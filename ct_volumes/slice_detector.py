"""SliceDetector: a detector of slices run over a whole CT volume, and what it found linked to
lesions in 3D. What is common to every kind of network: which slices, results kept on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ct_volumes.hounsfield import AIR_HU
from ct_volumes.lesions import Algorithm, Lesion, SliceDetections
from ct_volumes.linking import MIN_SLICE_SCORE, link
from ct_volumes.slice_results import SliceResults
from ct_volumes.stacks import has_body, key_slices, slice_of
from ct_volumes.volume import CTVolume
from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.errors import UserError

# Of a lesion's best slice. No operating point is published for whole scans; this is where a
# detector calls it more likely than not.
MIN_LESION_SCORE = 0.5
SAME_ASPECT = 0.01  # pixels whose sides differ by less are square

Look = Callable[[Sequence[int]], list[SliceDetections]]


def check_min_score(score: float, name: str = "min_score") -> None:
    """Raises UserError for a least score of lesions that cannot be, under the option's name."""
    if not MIN_SLICE_SCORE <= score <= 1:
        raise UserError(
            f"{name} must be between {MIN_SLICE_SCORE} and 1, got {score}: what scores less on a"
            " slice takes part in no lesion"
        )


class SliceDetector(ABC):
    """What a class of detectors sets and defines.

    Attributes:
        name: of the experiment.
        checkpoint_sha256: hash of the weights' file.
        network_sha256: hash of what the config says of the network, its thresholds, and its input.
        software: version of this software.
        with_masks: whether it finds masks.
        batch_size: slices at a time unless the caller says otherwise.
        stack: options of `plan_volume_stack`.
        size: (height, width) that a slice gets, or None of the network that takes it as it is.
    """

    name: str
    checkpoint_sha256: str
    network_sha256: str
    software: str
    with_masks: bool
    batch_size: int
    stack: dict
    size: tuple[int, int] | None
    not_square: type[UserError] = UserError  # raised for pixels that are not, where size is None

    @abstractmethod
    def looking(self, volume: CTVolume, amp: bool, least_score: float) -> AbstractContextManager:
        """A context that yields a function (`Look`): slices by their numbers -> what is found on
        each. Of what scores less than `least_score` it may leave out any part."""

    def detect(
        self,
        volume: CTVolume,
        interval_mm: float | None = 2.0,
        min_score: float = MIN_LESION_SCORE,
        *,
        batch_size: int | None = None,
        amp: bool = False,
        progress: bool = True,
        store: Path | None = None,
        **linking,
    ) -> list[Lesion]:
        """The lesions of a volume, by falling score.

        `detect_slices`, then `ct_volumes.linking.link` with `linking`; `min_score` is of a lesion's
        best slice (`lesion_score` there), at least `ct_volumes.linking.MIN_SLICE_SCORE`.

        Raises what these and `check_min_score` raise.
        """
        check_min_score(min_score)
        found = self.detect_slices(
            volume, interval_mm, batch_size, amp, progress, store, MIN_SLICE_SCORE
        )
        return link(found, volume, lesion_score=min_score, **linking)

    def detect_slices(
        self,
        volume: CTVolume,
        interval_mm: float | None = 2.0,
        batch_size: int | None = None,
        amp: bool = False,
        progress: bool = True,
        store: Path | None = None,
        least_score: float = 0.0,
    ) -> list[SliceDetections]:
        """What the detector finds on every slice that it looks at, by default whatever its score.

        Each is looked at with the stack around it (`plan_volume_stack`) as the experiment's test
        data are. Where the network's input has another shape than the slice, air is added on the
        right or below so that nothing is distorted; pixels that are not square become so there.

        Args:
            volume: the scan.
            interval_mm: distance of the slices looked at (`key_slices`); None is every slice.
            batch_size: slices at a time; default `batch_size` of the detector. Changes no result.
            amp: half precision, on a GPU.
            progress: show a bar with the time that is left.
            store: file in which results are kept as they come; from one of an interrupted call of
                the same scan, network and options it goes on (`SliceResults`).
            least_score: what scores less is left out, before it gets a mask; the others are the
                same. `link` leaves out what scores less than `ct_volumes.linking.MIN_SLICE_SCORE`.

        Returns one entry a slice looked at, head to feet. Slices without a body (`has_body`) are
        not given to the network: nothing is found there. Coordinates are pixel centres.

        Raises:
            UserError: half precision where there is none, a lack of memory; a network that cannot
                take pixels that are not square.
            ValueError: an interval, a batch size or a score that cannot be.
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= least_score <= 1:
            raise ValueError(f"least_score must be between 0 and 1, got {least_score}")
        self.check_amp(amp)
        self.field(volume)  # refuses what the network cannot take, before the work
        keys = key_slices(volume, interval_mm)
        key = self.key(volume, interval_mm, amp, least_score) if store else {}
        results = SliceResults(store, key)
        waiting: list[int] = []
        bar = tqdm(
            total=len(keys), initial=len(results.found), unit="slice", desc="detecting",
            disable=not progress, leave=False,
        )  # fmt: skip
        with bar, self.looking(volume, amp, least_score) as look:
            for number, key in enumerate(keys, 1):
                new = []
                if key not in results.found:
                    if has_body(volume.hu[key], volume.spacing_mm):
                        waiting.append(key)
                    else:
                        new = [nothing_on(key, self.with_masks)]
                if waiting and (len(waiting) == batch_size or number == len(keys)):
                    new += [at_least(each, least_score) for each in look(waiting)]
                    waiting = []
                results.add(new)
                bar.update(len(new))
        return [results.found[key] for key in keys]

    def check_amp(self, amp: bool) -> None:
        """Raises UserError for half precision where there is none."""
        if amp:
            raise UserError("half precision (--amp) is for a GPU: leave it out on a CPU")

    def key(
        self, volume: CTVolume, interval_mm: float | None, amp: bool, least_score: float = 0.0
    ) -> dict:
        """What decides the detections of slices, as JSON can hold it."""
        return dict(
            network=self.network_sha256,
            checkpoint=self.checkpoint_sha256,
            software=self.software,
            volume=volume.sha256,
            interval_mm=interval_mm,
            amp=amp,
            least_score=least_score,
        )

    def algorithm(self, options: dict) -> Algorithm:
        """What is written of this detector into every file; `options` are the caller's."""
        return Algorithm(self.name, self.software, self.checkpoint_sha256, options)

    def field(self, volume: CTVolume) -> tuple[int, int]:
        """(rows, columns) of a slice with the air that gives it the shape of the network's input.

        Raises `not_square` if that would have pixels that are not square.
        """
        rows, columns = volume.hu.shape[1:]
        row_mm, column_mm = volume.spacing_mm
        if self.size is None:
            if abs(row_mm / column_mm - 1) > SAME_ASPECT:
                raise self.not_square(
                    f"the scan's pixels are {row_mm:g} x {column_mm:g} mm and the config's test"
                    " pipeline has no RandomAffineResize(augment=False), which makes them square:"
                    " add one"
                )
            return rows, columns
        aspect = self.size[0] / self.size[1]  # height over width
        height_mm = max(rows * row_mm, columns * column_mm * aspect)
        width_mm = height_mm / aspect
        return max(rows, round(height_mm / row_mm)), max(columns, round(width_mm / column_mm))

    def with_air(self, volume: CTVolume, places: Sequence[tuple[int, int, float]]) -> np.ndarray:
        """(*field, S) int16: the slices that stand at places of a plan."""
        rows, columns = volume.hu.shape[1:]
        image = np.full((*self.field(volume), len(places)), AIR_HU, np.int16)
        for number, place in enumerate(places):
            image[:rows, :columns, number] = slice_of(volume.hu, place)
        return image


def nothing_on(index: int, with_mask: bool) -> SliceDetections:
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    return SliceDetections(index, *empty, () if with_mask else None)


def at_least(found: SliceDetections, score: float) -> SliceDetections:
    """Without what scores less."""
    kept = np.flatnonzero(found.scores.astype(float) >= score)
    masks = None if found.masks is None else tuple(found.masks[i] for i in kept)
    return SliceDetections(found.index, found.boxes[kept], found.scores[kept], masks)


def threshold_for(score_thr: float, least_score: float) -> float:
    """The score that the box head's results must exceed, a float32, so that what scores
    `least_score` stays; not less than the detector's own `score_thr`."""
    if least_score == 0:
        return score_thr
    return max(score_thr, float(np.nextafter(np.float32(least_score), np.float32(-1))))


def on_slice(boxes: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) float32 boxes by pixel edges, on a slice of `shape` with air on the right or below ->
    the numbers of those that do not lie in that air, and these clipped, by pixel centres."""
    rows, columns = shape
    boxes = boxes.reshape(-1, 2, 2).clip(0, np.float32([columns, rows])).reshape(-1, 4)
    there = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
    return there, boxes[there] - np.float32(PIXEL_CENTRE)
