"""Whether a training runs as sound ones did: medians of its losses, its gradient norm and its
validation against the ranges of a reference. Needs no framework, only the log of a run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from deeplesion.errors import MissingDataError, UserError

WINDOW = 100  # updates that a median is of, as in MULAN's public logs
VALIDATION = "FROC/average"
# By how much ranges are wider than what the recorded runs had: a factor, and points.
MARGIN, VALIDATION_MARGIN = 1.25, 12
# As mmdet logs them; classification of the RPN, of the box head, and so on.
CURVES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask", "grad_norm")
QUANTITIES = (*CURVES, VALIDATION)
REFERENCES = Path(__file__).parent / "references"

# What usually takes a quantity out of its range. Several apply at once: look at the first that all
# findings share.
CAUSES = {
    ("loss_rpn_cls", "above"): "the RPN does not learn (frozen, or a learning rate too small for "
    "the batch), pretrained weights are not loaded, or the HU window is wrong",
    ("loss_rpn_cls", "below"): "other data or other pretrained weights than the reference's",
    (
        "loss_rpn_bbox",
        "above",
    ): "learning rate too high for the batch, or boxes that do not fit the "
    "images (shifted, of another image size)",
    ("loss_rpn_bbox", "below"): "the RPN does not learn, or boxes are of another kind",
    ("loss_cls", "above"): "proposals are found but not told from tissue: learning rate too high, "
    "HU window wrong, thickness NaN (no neighbouring slices), pretrained weights not loaded",
    ("loss_cls", "below"): "few proposals reach a lesion, so that all are background: the RPN does "
    "not learn, boxes are shifted, the HU window is wrong, pretrained weights are not loaded",
    ("loss_bbox", "above"): "learning rate too high for the batch, or boxes that do not fit the "
    "images",
    ("loss_bbox", "below"): "few proposals reach a lesion: the RPN does not learn, boxes are "
    "shifted, the HU window is wrong, pretrained weights are not loaded",
    (
        "loss_mask",
        "above",
    ): "masks do not lie in their boxes, pretrained weights are not loaded, or "
    "the mask head does not learn",
    (
        "loss_mask",
        "below",
    ): "masks are missing or empty (the loss of nothing against nothing is 0), "
    "no proposal reaches a lesion, or masks are of another kind (whole boxes, say)",
    ("grad_norm", "above"): "learning rate too high for the batch, or warm-up left out",
    ("grad_norm", "below"): "part of the network is frozen, or there is little to learn from (few "
    "lesions in the images)",
    (VALIDATION, "above"): "validation on other images than the reference's, or on those of the "
    "training split",
    (
        VALIDATION,
        "below",
    ): "fewer updates or another learning rate than the recipe's, or one of the "
    "causes of the losses",
}


@dataclass(frozen=True)
class Plan:
    """What a run is going to do.

    Attributes:
        total_batch: images of an update of the weights.
        updates_per_epoch, max_epochs.
        drops: epochs after which the learning rate falls by steps; empty for other schedules.
    """

    total_batch: int
    updates_per_epoch: int
    max_epochs: int
    drops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A value outside the range of sound runs."""

    update: int
    quantity: str
    value: float
    low: float
    high: float

    @property
    def side(self) -> str:
        # NaN is on no side of anything; it comes of what is too large.
        return "below" if self.value < self.low else "above"

    def __str__(self) -> str:
        return (
            f"update {self.update}: {self.quantity} {self.value:.4g} is {self.side} the "
            f"{self.low:.3g} to {self.high:.3g} of sound runs"
        )


class Reference:
    """The ranges of sound runs of a recipe, from references/NAME.json.

    The file: `source`, `recipe` (total_batch, updates_per_epoch) and `points`, each with its place
    and a [low, high] of some quantities. The place is an `update`, an `epoch`, or, of a schedule
    with drops, the number of epochs `after_drop` (the first one), or the `end`.
    """

    def __init__(self, content: Mapping) -> None:
        self.source, self.recipe = content["source"], content["recipe"]
        self.points = content["points"]

    @classmethod
    def read(cls, name: str) -> Reference:
        """Raises ValueError, with the names there are, for one that there is not."""
        path = REFERENCES / f"{name}.json"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in REFERENCES.glob("*.json")))
            raise UserError(f"RunCheckHook.reference={name!r} is none of {names}, None")
        return cls(json.loads(path.read_text()))

    def misfit(self, plan: Plan) -> str | None:
        """Why a run cannot be compared, if so."""
        for name, meant in self.recipe.items():
            value = getattr(plan, name)
            if abs(value - meant) > 0.1 * meant:
                return (
                    f"{name.replace('_', ' ')} is {value}, that of the reference is {meant}: its "
                    f"losses are no measure for this run"
                )
        return None

    def ranges(self, plan: Plan, quantity: str) -> list[tuple[int, float, float]]:
        """(update, low, high) at the points that say something of a quantity, in order."""
        found: list[tuple[int, float, float]] = []
        for point in self.points:
            update = self._update(point, plan)
            # A schedule that drops earlier has no use for the points before its drop.
            if quantity in point and update is not None and (not found or update > found[-1][0]):
                found.append((update, *point[quantity]))
        return found

    @staticmethod
    def _update(point: Mapping, plan: Plan) -> int | None:
        if "update" in point:
            return point["update"]
        if "epoch" in point:
            epoch = point["epoch"]
            # Until the first drop the ranges of such a point hold.
            return epoch * plan.updates_per_epoch if epoch <= min([*plan.drops, epoch]) else None
        if "after_drop" in point:
            if not plan.drops:
                return None
            return (plan.drops[0] + point["after_drop"]) * plan.updates_per_epoch
        return plan.max_epochs * plan.updates_per_epoch if plan.drops else None

    def range_at(self, plan: Plan, quantity: str, update: int) -> tuple[float, float] | None:
        """(low, high) at an update; None before the first point.

        Between points both are interpolated, in the logarithm of the update and of losses.
        """
        points = self.ranges(plan, quantity)
        before = [p for p in points if p[0] <= update]
        if not before:
            return None
        after = [p for p in points if p[0] > update] or before[-1:]
        (x0, *start), (x1, *stop) = before[-1], after[0]
        share = math.log(update / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
        if quantity == VALIDATION:
            return tuple(a + share * (b - a) for a, b in zip(start, stop))
        return tuple(a ** (1 - share) * b**share for a, b in zip(start, stop))


def check(
    reference: Reference, plan: Plan, update: int, values: Mapping[str, float]
) -> list[Finding]:
    """The values of an update that lie outside their ranges; a NaN always does."""
    findings = []
    for quantity in QUANTITIES:
        limits = reference.range_at(plan, quantity, update) if quantity in values else None
        if limits and not limits[0] <= values[quantity] <= limits[1]:
            findings.append(Finding(update, quantity, values[quantity], *limits))
    return findings


def medians(history: Mapping[str, Sequence[float]], accumulated: int = 1) -> dict[str, float]:
    """The median of each quantity's last 100 updates.

    Args:
        history: a value of each iteration, by quantity.
        accumulated: iterations of an update, whose mean counts.
    """
    found = {}
    for quantity, values in history.items():
        updates = min(len(values) // accumulated, WINDOW)
        end = len(values) // accumulated * accumulated  # what follows is part of an update to come
        last = values[end - updates * accumulated : end]
        parts = (last[i : i + accumulated] for i in range(0, len(last), accumulated))
        if updates:
            found[quantity] = float(median(sum(part) / len(part) for part in parts))
    return found


def logged(work_dir: str | Path) -> Iterator[list[dict]]:
    """The entries of `*/vis_data/scalars.json`, start by start of a run."""
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        entries = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the line that is being written
                entries.append(json.loads(line))
        yield entries


def read_log(work_dir: str | Path, updates_per_epoch: int) -> dict[int, dict[str, float]]:
    """What the log of a run holds, also of one that is still going on: update -> its values.

    Reads `*/vis_data/scalars.json`, where RunCheckHook writes medians and mmengine validations; of
    a run that was resumed the later start counts.
    """
    values: dict[int, dict[str, float]] = {}
    for entries in logged(work_dir):
        started = False
        for entry in entries:
            found = {name: entry[f"median/{name}"] for name in CURVES if f"median/{name}" in entry}
            update = entry["step"]
            if not found and VALIDATION in entry:
                found, update = {VALIDATION: entry[VALIDATION]}, update * updates_per_epoch
            if not found:
                continue
            if not started:  # what an earlier start did beyond the checkpoint did not happen
                values = {u: v for u, v in values.items() if u < update}
                started = True
            values.setdefault(update, {}).update(found)
    return dict(sorted(values.items()))


def record(
    logs: Sequence[Mapping[int, Mapping[str, float]]], plan: Plan, source: str
) -> dict[str, Any]:
    """The content of a reference from the logs of sound runs of one recipe.

    A range is what the runs had at an update, widened by MARGIN each way, that of validation by
    VALIDATION_MARGIN points. Points lie close at first, where losses change fast, then at the ends
    of epochs.
    """
    ends = {epoch * plan.updates_per_epoch for epoch in range(1, plan.max_epochs + 1)}
    points = []
    for update in sorted({*range(WINDOW, 200, 20), 200, 300, 500, *ends}):
        point: dict[str, Any] = dict(update=update)
        for quantity in QUANTITIES:
            found = [log[update][quantity] for log in logs if quantity in log.get(update, {})]
            if not found:
                continue
            if quantity == VALIDATION:
                low, high = min(found) - VALIDATION_MARGIN, max(found) + VALIDATION_MARGIN
                point[quantity] = [round(max(low, 0), 1), round(min(high, 100), 1)]
            elif update >= WINDOW:  # earlier ones are of fewer updates
                low, high = min(found) / MARGIN, max(found) * MARGIN
                point[quantity] = [float(f"{low:.3g}"), float(f"{high:.3g}")]
        if len(point) > 1:
            points.append(point)
    recipe = dict(total_batch=plan.total_batch, updates_per_epoch=plan.updates_per_epoch)
    return dict(source=source, recipe=recipe, points=points)


def read_plan(work_dir: str | Path) -> tuple[Plan, str | None]:
    """What the run of a work directory is going to do, and the name of its reference.

    Raises FileNotFoundError if the folder holds no record of a training.
    """
    for path in sorted(Path(work_dir).glob("run_*.json"), reverse=True):
        training = json.loads(path.read_text()).get("training")
        if training:
            plan = Plan(
                training["total_batch"],
                training["updates_per_epoch"],
                training["max_epochs"],
                tuple(training["drops"]),
            )
            return plan, training["reference"]
    raise MissingDataError(f"{work_dir} holds no run_*.json of a training that has begun")


def causes(findings: Iterable[Finding]) -> list[str]:
    """A line for each quantity and side, those with most findings first."""
    number: dict[tuple[str, str], int] = {}
    for finding in findings:
        key = finding.quantity, finding.side
        number[key] = number.get(key, 0) + 1
    ordered = sorted(number, key=number.get, reverse=True)
    return [f"{quantity} {side}: {CAUSES[quantity, side]}" for quantity, side in ordered]


def table(reference: Reference, plan: Plan, log: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Lines of a table: the values at 100 and 500 updates and at each epoch's end, `!` beside those
    out of their range, and the last values of all."""
    ends = [epoch * plan.updates_per_epoch for epoch in range(1, plan.max_epochs + 1)]
    wanted = sorted({100, 500, 1000, *ends})
    # The log has a line every few updates: the one that follows stands for a place in between.
    rows = {next((u for u in log if u >= place), None) for place in wanted} | {max(log)}
    short = [q.removeprefix("loss_") for q in QUANTITIES]
    lines = [f"{'update':>8} {'epoch':>6} " + " ".join(f"{name:>13}" for name in short)]
    for update in sorted(rows - {None}):
        wrong = {f.quantity for f in check(reference, plan, update, log[update])}
        cells = [
            f"{log[update][q]:>12.4g}{'!' if q in wrong else ' '}" if q in log[update] else " " * 13
            for q in QUANTITIES
        ]
        epoch = update / plan.updates_per_epoch
        lines.append(f"{update:>8} {epoch:>6.2f} {' '.join(cells)}")
    return lines


def plot(
    reference: Reference | None,
    plan: Plan,
    log: Mapping[int, Mapping[str, float]],
    path: str | Path,
) -> None:
    """Draws each quantity over the updates, the range of sound runs behind it, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, quantity in zip(figure.subplots(3, 3).flat, QUANTITIES):
        points = reference.ranges(plan, quantity) if reference else []
        if points:
            place, low, high = zip(*points)
            axis.fill_between(place, low, high, color="tab:green", alpha=0.25, label="sound runs")
        own = [(update, values[quantity]) for update, values in log.items() if quantity in values]
        if own:
            axis.plot(*zip(*own), color="tab:blue", marker=".", markersize=3, label="this run")
        axis.set_title(quantity)
        axis.set_xlabel("updates")
        if quantity != VALIDATION:
            axis.set_xscale("log")
            axis.set_yscale("log")
        if own or points:
            axis.legend(fontsize="small")
    for axis in list(figure.axes)[len(QUANTITIES) :]:
        axis.remove()
    figure.savefig(path, dpi=100)
