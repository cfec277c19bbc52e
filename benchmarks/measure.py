"""Measuring side by side: two ways to the same result, alternately in one process."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmdet_ext.engine.run_record import git_state

PACKAGES = (
    "numpy",
    "torch",
    "onedl-mmcv",
    "onedl-mmdetection",
    "onnxruntime",
    "opencv-python-headless",
    "kornia-rs",
    "blosc2",
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Case:
    """Ours against a baseline that does the same.

    Attributes:
        name: of the case, with its size.
        ours, baseline: without arguments; return what they computed.
        check: of both results, raises AssertionError where they differ.
        memory: also measure the memory each needs.
        parts: returns the seconds of parts, called after both ran.
        clock: seconds; `time.process_time` where others use the machine and one thread works.
    """

    name: str
    ours: Callable[[], Any]
    baseline: Callable[[], Any]
    check: Callable[[Any, Any], None]
    memory: bool = False
    parts: Callable[[], dict[str, float]] | None = None
    clock: Callable[[], float] = time.perf_counter


def measure(case: Case, rounds: int) -> dict:
    """Seconds of both, `rounds` times after one warm-up; their medians and how many times faster;
    of cases that ask for it the memory each needs at most, in bytes.

    Each round runs both, the second of them first in the next, and compares their results: a time
    counts only where they agree. Garbage is collected before and not while the clock runs.

    Raises:
        AssertionError: the two disagree.
    """
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    for number in range(rounds + 1):
        results = {}
        for side in ("ours", "baseline") if number % 2 else ("baseline", "ours"):
            results[side], taken = _timed(getattr(case, side), case.clock)
            if number > 0:
                seconds[side].append(taken)
        case.check(results["ours"], results["baseline"])
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    result = dict(
        name=case.name,
        seconds=seconds,
        median=medians,
        ratio=medians["baseline"] / medians["ours"],
    )
    if case.memory:
        del results
        result["peak_bytes"] = {side: peak_memory(getattr(case, side)) for side in seconds}
    if case.parts:
        found = [case.parts() for _ in range(rounds)]
        result["parts"] = {name: statistics.median(p[name] for p in found) for name in found[0]}
    return result


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes of PyTorch's tensors that a call holds at most, its result included, beyond what is
    held before it. As the allocator counts them: what malloc keeps back is not in it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = function()
    del result
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def _timed(function: Callable[[], Any], clock: Callable[[], float]) -> tuple[Any, float]:
    gc.collect()
    gc.disable()
    try:
        start = clock()
        result = function()
        return result, clock() - start
    finally:
        gc.enable()


def format_results(results: Sequence[dict]) -> str:
    """A table of `measure`'s results: medians, the range of the rounds, and the ratio; memory and
    ours as a part of the baseline's where it was measured."""
    with_memory = any("peak_bytes" in result for result in results)
    lines = [f"{'case':<40}{'ours':>22}{'baseline':>22}{'faster':>10}"]
    if with_memory:
        lines[0] += f"{'ours MiB':>10}{'baseline':>10}{'part':>7}"
    lines.append("-" * len(lines[0]))
    for result in results:
        cells = [
            f"{_unit(result['median'][side])} ({_unit(min(times))}..{_unit(max(times))})"
            for side, times in result["seconds"].items()
        ]
        line = f"{result['name']:<40}{cells[0]:>22}{cells[1]:>22}{result['ratio']:>9.2f}x"
        ours, baseline = result.get("peak_bytes", {}).values() or (None, None)
        if ours is not None:
            line += f"{ours / 2**20:>10.0f}{baseline / 2**20:>10.0f}{ours / baseline:>7.2f}"
        lines.append(line)
        for name, seconds in result.get("parts", {}).items():
            share = seconds / sum(result["parts"].values())
            lines.append(f"  {name:<38}{_unit(seconds):>9} {share:>6.1%}")
    lines.append(
        "median (fastest..slowest round), in ms"
        + ("; memory a call holds at most, beyond what it was given" if with_memory else "")
    )
    return "\n".join(lines)


def _unit(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def environment() -> dict:
    """What a time depends on: processor, threads, versions, the state of the code."""
    git = git_state(Path(__file__).resolve().parent)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:
            versions[package] = None
    return dict(
        processor=_processor(),
        cores=os.cpu_count(),
        threads={name: os.environ.get(name) for name in THREADS},
        system=platform.platform(),
        python=platform.python_version(),
        packages=versions,
        commit=git["commit"],
        changed_files=git["changed"] or [],
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo")
    if lines.exists():
        for line in lines.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
