"""The proof of concept beside Table IV of the ACS paper, and which of the paper's orders hold."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

# Table IV (JBHI 2021): feature mAUC without training, Dice and mIoU after training, in percent.
# r.: from random weights, p.: from those of the 2D pre-training.
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "2.5D r.": (69.0, 82.2, 72.5),
    "2.5D p.": (85.1, 82.7, 73.3),
    "3D r.": (72.1, 94.6, 90.8),
    "ACS r.": (68.7, 94.7, 90.7),
    "ACS p.": (88.1, 95.4, 92.0),
}
# In a score of a row, the first is above the second. The order of the random networks' mAUC, which
# the table has too, is no claim of the text: it is within what seeds do.
ORDERS: tuple[tuple[str, str, str], ...] = (
    ("mauc", "ACS p.", "ACS r."),
    ("mauc", "2.5D p.", "2.5D r."),
    ("mauc", "ACS p.", "2.5D p."),
    ("paper_dice", "3D r.", "2.5D r."),
    ("paper_dice", "ACS r.", "2.5D r."),
    ("paper_dice", "2.5D p.", "2.5D r."),
    ("paper_dice", "ACS p.", "ACS r."),
    ("paper_dice", "ACS p.", "3D r."),
)
COLUMNS = ("mauc", "paper_dice", "paper_iou", "code_dice", "code_iou", "dice", "iou")
NAMES = {"mauc": "mAUC", "paper_dice": "Dice"}
HEAD = (
    "                          as the paper says     as its code counts    per volume, five shapes"
    "   Table IV\n"
    "model    mAUC             Dice       mIoU       Dice       mIoU       Dice       mIoU      "
    "   mAUC  Dice  mIoU"
)
NOTE = """As the paper says: the five shapes, over batches of 20 test volumes, in the epoch that is
best on the test set. As its code counts: of five classes, the background instead of the cone.
Per volume: shapes that it does not have left out, last epoch, nothing chosen by the test set."""

# By seed, the scores of a row in percent, as far as they are there.
Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def format_table(results: Results) -> str:
    """The table: means over the seeds, and their standard deviation if there are several.

    Args:
        results: {seed: {row of PUBLISHED: {score of COLUMNS: percent}}}.
    """
    lines = [HEAD]
    for row, published in PUBLISHED.items():
        cells = []
        for column in COLUMNS:
            values = [rows[row][column] for rows in results.values() if column in rows.get(row, {})]
            cells.append(f"{_mean(values):<{16 if column == 'mauc' else 10}}")
        lines.append(f"{row:<8} {' '.join(cells)}   {'  '.join(f'{p:.1f}' for p in published)}")
    return "\n".join([*lines, "", NOTE])


def format_orders(results: Results) -> str:
    """A line for each of the paper's orders: in how many seeds it holds, and the differences."""
    lines = ["Orders of the paper (scores as the paper says):"]
    for column, first, second in ORDERS:
        differences = [
            rows[first][column] - rows[second][column]
            for rows in results.values()
            if column in rows.get(first, {}) and column in rows.get(second, {})
        ]
        said = "not run"
        if differences:
            held = sum(difference > 0 for difference in differences)
            said = f"holds in {held} of {len(differences)} seeds, {_mean(differences, '+')} points"
        lines.append(f"  {NAMES[column]}: {first} above {second}: {said}")
    return "\n".join(lines)


def _mean(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
