"""From the images of many DICOM files to volumes of slices that fit together, and what is unusual
about their geometry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from ct_volumes.dicom_headers import DERIVED, NEVER, ON_REQUEST, ORIGINAL, TIMES, Frame

FEWEST_SLICES = 5  # fewer are a bolus track or a test image, where there is anything else
SAME_DIRECTION = 2e-3  # of unit vectors; headers of one series differ in their last digits
SAME_PLACE = 0.05  # mm; no scanner puts slices closer
GAP = 1.5  # times the usual step from slice to slice


@dataclass(eq=False)
class Series:
    """Images that make up one volume, or that are left out for one reason.

    Attributes:
        frames: of a volume from head to feet; never empty.
        quality, reason: as of `Frame`; a reason to leave it out may remain with any quality.
        notes: what is unusual about it, a sentence each.
        id: by which it is chosen: the series number where that is enough.
    """

    frames: list[Frame]
    quality: int = ORIGINAL
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    id: str = ""

    @property
    def first(self) -> Frame:
        return self.frames[0]

    @property
    def positions(self) -> np.ndarray:
        """(S,) mm along the normal, increasing from head to feet."""
        return _positions(self.frames)

    @property
    def steps(self) -> np.ndarray:
        return np.diff(self.positions)

    @property
    def interval(self) -> float | None:
        """The usual distance from slice to slice in mm."""
        return float(np.median(self.steps)) if len(self.frames) > 1 else None

    @property
    def is_volume(self) -> bool:
        return self.quality < NEVER


def group(frames: Iterable[Frame], digest: Callable[[Frame], bytes]) -> list[Series]:
    """All images -> series, those with one number or UID next to each other.

    Images of one SeriesInstanceUID (of one folder and number, where that is empty) that differ in
    size, spacing, orientation or kind are series of their own. Images at one place are told apart
    by one of `TIMES`; or they are the same, by `digest` of their HU, and one is kept; or the series
    is left out, since its slices cannot be put in order.
    """
    by_series: dict[tuple, list[Frame]] = {}
    for frame in frames:
        folder = None if frame.series else (frame.study, frame.number, frame.place.path.parent)
        by_series.setdefault((frame.series, folder), []).append(frame)
    found: list[Series] = []
    for members in by_series.values():
        clusters: list[list[Frame]] = []
        for frame in members:
            for cluster in clusters:
                if _fit(cluster[0], frame):
                    cluster.append(frame)
                    break
            else:
                clusters.append([frame])
        parts = []
        for cluster in clusters:
            quality, reason = cluster[0].quality, cluster[0].reason
            if quality == NEVER:
                parts.append(Series(cluster, quality, reason))
            else:
                parts += [replace(p, quality=max(quality, p.quality), reason=p.reason or reason)
                          for p in _volumes(cluster, digest)]  # fmt: skip
        lacking = sum(len(p.frames) for p in parts if (p.reason or "").startswith("no ImagePos"))
        for part in parts:
            if part.is_volume and lacking:
                part.notes.append(count_of(lacking, "image") + " of the series without"
                                  " ImagePositionPatient left out.")  # fmt: skip
        found += parts
    _fall_back(found)
    _name(found)
    return sorted(found, key=lambda s: (s.first.study, s.first.number is None, s.first.number or 0,
                                        s.first.series, s.id))  # fmt: skip


def _fit(one: Frame, other: Frame) -> bool:
    """Whether two images of a series can be slices of one volume."""
    if (one.quality, one.reason) != (other.quality, other.reason):
        return False
    if one.quality == NEVER:
        return True
    return (
        (one.rows, one.columns) == (other.rows, other.columns)
        and np.allclose(one.spacing, other.spacing, rtol=1e-3, atol=1e-4)
        and np.allclose(one.row, other.row, atol=SAME_DIRECTION)
        and np.allclose(one.column, other.column, atol=SAME_DIRECTION)
    )


def head_to_feet(frame: Frame) -> np.ndarray:
    """(3,) unit vector at right angles to an axial image, towards the feet."""
    normal = np.cross(frame.row, frame.column)
    return normal if normal[2] < 0 else -normal


def _positions(frames: list[Frame]) -> np.ndarray:
    return np.stack([f.position for f in frames]) @ head_to_feet(frames[0])


def _sorted(frames: list[Frame]) -> list[Frame]:
    positions = _positions(frames)
    return [frames[i] for i in np.argsort(positions, kind="stable")]


def _repeats(frames: list[Frame]) -> list[list[Frame]]:
    """Sorted images -> those at each place."""
    places = [[frames[0]]]
    positions = _positions(frames)
    for frame, step in zip(frames[1:], np.diff(positions)):
        if step < SAME_PLACE:
            places[-1].append(frame)
        else:
            places.append([frame])
    return places


def _volumes(frames: list[Frame], digest: Callable[[Frame], bytes]) -> list[Series]:
    """Images that fit together -> volumes without repeated positions."""
    frames = _sorted(sorted(frames, key=lambda f: f.instance_number or 0))
    places = _repeats(frames)
    if len(places) == len(frames):
        return [Series(frames)]
    # A file that was copied twice keeps its UID; most series with repeats are phases, which are
    # told apart below without a look at their pixels.
    uids = Counter((f.uid, f.frame) for f in frames if f.uid)
    twice = any(count > 1 for count in uids.values())
    dropped = 0
    if twice:
        places, dropped = _without_copies(places, digest)
        frames = [f for place in places for f in place]
    most = max(map(len, places))
    if most > 1:
        for keyword in TIMES:
            parts: dict[str, list[Frame]] = {}
            for frame in frames:
                parts.setdefault(frame.times.get(keyword, ""), []).append(frame)
            if len(parts) > 1 and _clean(parts.values(), most):
                apart = sorted(parts, key=_natural)
                return [
                    Series(parts[key], notes=[
                        f"The series holds {len(apart)} volumes at the same places, told apart by"
                        f" {keyword}; this one is number {i}."
                    ] + _copies(dropped))
                    for i, key in enumerate(apart, 1)
                ]  # fmt: skip
        if not twice:
            places, dropped = _without_copies(places, digest)
            frames = [f for place in places for f in place]
            most = max(map(len, places))
    if most > 1:
        return [Series(frames, NEVER, f"up to {most} different images at one place, and no tag that"
                       " tells their volumes apart")]  # fmt: skip
    return [Series(frames, notes=_copies(dropped))]


def _clean(parts: Iterable[list[Frame]], most: int) -> bool:
    """Whether a tag that tells images apart leaves volumes, each with one image at each place."""
    parts = list(parts)
    few = len(parts) > most and min(map(len, parts)) < FEWEST_SLICES
    return not few and all(len(_repeats(part)) == len(part) for part in parts)


def _without_copies(
    places: list[list[Frame]], digest: Callable[[Frame], bytes]
) -> tuple[list[list[Frame]], int]:
    kept = []
    for place in places:
        if len(place) > 1:
            place = list({(digest(f), tuple(np.round(f.position, 2))): f
                          for f in reversed(place)}.values())[::-1]  # fmt: skip
        kept.append(place)
    return kept, sum(map(len, places)) - sum(map(len, kept))


def _copies(count: int) -> list[str]:
    return [count_of(count, "image") + " that the scan holds twice left out."] if count else []


def count_of(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _natural(text: str) -> tuple:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)


def _name(found: list[Series]) -> None:
    """Gives each an id: its number; to all but the one candidate of a number a letter after it."""
    numbers: dict[int | None, list[Series]] = {}
    for series in found:
        numbers.setdefault(series.first.number, []).append(series)
    for number, members in numbers.items():
        plain = [s for s in members if s.reason is None] if len(members) > 1 else members
        if number is not None and len(plain) == 1:
            plain[0].id = f"{number}"
            members = [s for s in members if s is not plain[0]]
        for i, series in enumerate(members):
            series.id = f"{'' if number is None else number}{_letters(i)}"


def _letters(count: int) -> str:
    """a, b ... z, aa, ab ..."""
    text = ""
    while count >= 0:
        text = chr(97 + count % 26) + text
        count = count // 26 - 1
    return text


def _fall_back(found: list[Series]) -> None:
    """Says which volumes are candidates: where no better ones are there, derived and short ones."""
    for series in found:
        if series.quality == ORIGINAL and len(series.frames) < FEWEST_SLICES:
            series.quality, series.reason = DERIVED, f"only {count_of(len(series.frames), 'slice')}"
    volumes = [s for s in found if s.quality < ON_REQUEST]
    if not volumes or min(s.quality for s in volumes) == ORIGINAL:
        return
    # A derived volume says more than a single original slice does.
    better = [s for s in volumes if len(s.frames) >= FEWEST_SLICES]
    better = better or [s for s in volumes if s.first.quality == ORIGINAL] or volumes
    for series in better:
        series.notes.append(f"Beside a better series this would be left out: {series.reason}.")
        series.quality, series.reason = ORIGINAL, None


def geometry_notes(series: Series) -> list[str]:
    """Sentences on gaps, uneven spacing, tilt and thickness; slices are counted from 0."""
    frames, steps = series.frames, series.steps
    notes = []
    if len(frames) > 1:
        usual = series.interval
        gaps = np.flatnonzero(steps > GAP * usual)
        if len(gaps):
            places = ", ".join(f"{steps[g]:.4g} mm after slice {g}" for g in gaps[:3])
            more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
            notes.append(f"{count_of(len(gaps), 'gap')} between slices {usual:.4g} mm apart:"
                         f" {places}{more}. Nothing is filled in.")  # fmt: skip
        even = np.delete(steps, gaps)
        if len(even) and np.ptp(even) > max(0.02 * usual, 0.02):
            notes.append(f"Slices are unevenly spaced, from {even.min():.4g} to {even.max():.4g} mm"
                         " apart; each keeps its position.")  # fmt: skip
        line = frames[-1].position - frames[0].position
        down = head_to_feet(frames[0])
        tilt = np.degrees(np.arccos(np.clip(line @ down / np.linalg.norm(line), -1, 1)))
        if tilt > 0.5:
            notes.append(f"The gantry was tilted by {tilt:.1f} degrees: slices are shifted against"
                         " each other, and stay as they are.")  # fmt: skip
        straight = frames[0].position + np.outer(series.positions - series.positions[0], line) / (
            line @ down
        )
        off = np.linalg.norm(np.stack([f.position for f in frames]) - straight, axis=1).max()
        if off > 1:
            notes.append(f"Slices lie up to {off:.1f} mm beside the line through the first and the"
                         " last; each keeps its position.")  # fmt: skip
        thickness = frames[0].thickness
        if thickness and abs(thickness - usual) > 0.05 * usual:
            notes.append(f"Slices are {thickness:.4g} mm thick and {usual:.4g} mm apart; the"
                         " distance counts.")  # fmt: skip
    if len({f.thickness for f in frames}) > 1:
        notes.append("Slices differ in thickness.")
    if len({f.frame_of_reference for f in frames}) > 1:
        notes.append("Slices name different frames of reference; they are taken as one.")
    return notes
