"""What a study shows while it runs: a line for each run that ends, and how long all takes yet."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from statistics import mean

from tqdm import tqdm

from mmdet_ext.engine.study_run import (
    Job,
    Outcome,
    epochs_of,
    last_lines,
    notes_of,
    read_note,
    tested,
)

SHOWN_EVERY = 600  # seconds between two lines that tell what runs, where no terminal is


class Progress:
    """A line for each run that ends, and at a terminal one that tells what runs and how long all
    takes yet."""

    def __init__(
        self, jobs: Sequence[Job], at_once: int, done: int, known: Mapping[str, float]
    ) -> None:
        self.left, self.at_once, self.number = list(jobs), at_once, done
        self.total = done + sum(len(job.methods) for job in jobs)
        self.known = {name: [seconds] for name, seconds in known.items()}
        self.running: list[Job] = []
        self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        self.bar = tqdm(bar_format="{desc}", disable=not sys.stderr.isatty(), leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def begin(self, job: Job) -> None:
        self.running.append(job)  # by any thread

    def end(self, outcome: Outcome) -> None:
        job = outcome.job
        self.left.remove(job)
        if job in self.running:
            self.running.remove(job)
        self.number += len(job.methods)
        if outcome.failed:
            log = f"; {outcome.log}" if outcome.log else ""
            lines = [f"FAILED ({outcome.failed}: {outcome.reason}){log}"]
            lines += [f"    {line}" for line in last_lines(outcome.log)]
        else:
            note = read_note(job.folder)
            seconds = _seconds(note)
            self.known.setdefault(job.methods[0].name, []).append(seconds)
            lines = [f"{scores_of(job)}, took {tqdm.format_interval(seconds)}"]
        if self.left:
            lines[0] += f"; left {self.time_left()}"
        width = len(str(self.total))
        self.bar.write(f"[{self.number:>{width}}/{self.total}] {job.name}: " + "\n".join(lines))
        sys.stdout.flush()

    def show(self) -> None:
        """At a terminal always, else now and then."""
        if self.bar.disable and time.monotonic() - self.shown < SHOWN_EVERY:
            return
        self.shown = time.monotonic()
        parts = [f"{job.name} {_share(job):.0%}" for job in list(self.running)]
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        left = f"{self.number} of {self.total} runs, left {self.time_left()}"
        line = f"{left}: {'; '.join(parts[:3])}{more}"
        if self.bar.disable:
            print(line, flush=True)
        else:  # a longer line would be wrapped, and stay
            self.bar.set_description_str(line[: get_terminal_size().columns - 1])

    def time_left(self) -> str:
        """By the runs that are done, the same method's if there are, and by what the epochs of
        those that run take."""
        running = list(self.running)
        estimates = dict(self.known)
        for job in running:
            _, whole = epochs_of(job.folder / "train.txt")
            if whole:
                estimates.setdefault(job.methods[0].name, [whole])
        if not estimates:
            return "not known yet"
        usual = mean(mean(values) for values in estimates.values())
        seconds = [  # of what waits a part may have been done before an interruption
            mean(estimates.get(job.methods[0].name, [usual])) * (1 - _share(job))
            for job in self.left
        ]
        spread = min(self.at_once, len(seconds)) or 1
        return tqdm.format_interval(max(sum(seconds) / spread, max(seconds, default=0)))


def _share(job: Job) -> float:
    return epochs_of(job.folder / "train.txt")[0]


def _seconds(note: Mapping) -> float:
    tests = note.get("tests", {}).values()
    return note.get("training", {}).get("seconds", 0) + sum(t.get("seconds", 0) for t in tests)


def known_seconds(out: Path) -> dict[str, float]:
    """Method -> seconds that its runs took which are done, by the notes of a study."""
    found: dict[str, list[float]] = {}
    for _, note in notes_of(out):
        if note["training"].get("ended"):
            for name in note.get("methods", []):
                found.setdefault(name, []).append(_seconds(note))
    return {name: mean(seconds) for name, seconds in found.items()}


def scores_of(job: Job) -> str:
    """'average 76.54', of each method that the job tests."""
    scores = []
    for method in job.methods:
        test = tested(job.folder, method, job.accept_code)
        table = job.folder / test[0] / "results.froc.json" if test else None
        if table and table.is_file():
            average = json.loads(table.read_text())["froc"][0]["average"]
            scores.append("no lesions" if average is None else f"{average:.2f}")
    return f"average {', '.join(scores)}" if scores else "done"
