"""Which of several DICOM series is read: the one that is named, or the one that serves best for
soft tissue."""

from __future__ import annotations

import re

import numpy as np

from ct_volumes.dicom_series import Series, count_of
from deeplesion.errors import DataError

MUCH = 0.8  # of the longest scan: what covers less is a detail of it
SHARP = re.compile(
    r"LUNG|BONE|EDGE|SHARP|HIRES|HIGH.?RES|ULTRA"  # GE and others, by name
    r"|^[A-Z]{1,2}[5-9]\d"  # Siemens: B60f, Br59d, I70f\3
    r"|^FC ?(3\d|5\d|8\d)"  # Canon: 30 to 39 bone, 50 to 59 lung, 80 to 89 detail
    r"|^(D|E|L|YA|YB|YC|YD)$"  # Philips
)


def choose(found: list[Series], wanted: str | None, name: str) -> Series:
    """The series that is read; what decided stands in its notes.

    Without `wanted` it is among the candidates, in this order: those that cover at least `MUCH` of
    the length of the longest; not of a sharp kernel (lung, bone), which detectors of soft tissue
    were not trained on; of the least interval; of most slices; of the lowest number. Raises
    DataError, which lists what is there, if there is none or `wanted` names none or several, and if
    the candidates are of several studies.
    """
    if wanted is not None:
        return _wanted(found, str(wanted).strip(), name)
    candidates = [s for s in found if s.reason is None]
    if not candidates:
        raise DataError(f"{name} holds no axial CT series that can be read.{listing(found)}")
    if len({s.first.study for s in candidates}) > 1:
        raise DataError(
            f"{name} holds candidates of several studies: choose one with --series, or put each"
            f" study into a folder of its own.{listing(found)}"
        )
    if len(candidates) == 1:
        return candidates[0]
    lengths = [np.ptp(s.positions) for s in candidates]
    ranked = sorted(
        zip(candidates, lengths),
        key=lambda pair: (
            pair[1] < MUCH * max(lengths),
            is_sharp(pair[0].first.kernel),
            round(pair[0].interval or np.inf, 2),
            -len(pair[0].frames),
        ),
    )
    chosen = ranked[0][0]
    interval = f" every {chosen.interval:.4g} mm" if chosen.interval else ""
    kernel = f", kernel {chosen.first.kernel}" if chosen.first.kernel else ""
    chosen.notes.insert(
        0,
        f"Series {chosen.id} ({count_of(len(chosen.frames), 'slice')}{interval}{kernel}) was chosen"
        f" of {len(candidates)} candidates; the others are"
        f" {', '.join(s.id for s, _ in ranked[1:])}.",
    )
    return chosen


def is_sharp(kernel: str) -> bool:
    """Whether a ConvolutionKernel is known as one for lung or bone."""
    return bool(SHARP.search(kernel.upper().strip()))


def _wanted(found: list[Series], wanted: str, name: str) -> Series:
    named = [s for s in found if s.id == wanted] or [
        s for s in found if wanted in (s.first.series, str(s.first.number))
    ]
    if len(named) > 1:
        named = [s for s in named if s.reason is None] or named
    if not named:
        raise DataError(f"{name} has no series {wanted!r}.{listing(found)}")
    if len(named) > 1:
        raise DataError(
            f"{name} has several series {wanted!r}: name one by its first column.{listing(found)}"
        )
    series = named[0]
    if not series.is_volume:
        raise DataError(f"series {wanted!r} of {name} cannot be read: {series.reason}")
    if series.reason:
        series.notes.append(f"The series was asked for; by itself it is left out: {series.reason}.")
    return series


def listing(found: list[Series], most: int = 20) -> str:
    """The series, one a line after a line break, for a message."""
    lines = [
        f"  {s.id}: {count_of(len(s.frames), 'image')}, {s.first.description or 'no description'}"
        + (f" - {s.reason}" if s.reason else "")
        for s in found[:most]
    ]
    more = [f"  and {len(found) - most} more"] if len(found) > most else []
    return "".join("\n" + line for line in (lines + more))
