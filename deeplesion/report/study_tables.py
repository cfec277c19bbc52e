"""The tables of a study: one of all that matters, and the operating points, differences and seeds
behind it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deeplesion.evaluation.study import GAP, MEASURES
from deeplesion.report.tables import AVERAGE, Number, Row, Table

COSTS = ("GFLOPs", "M params", "GB", "train min", "test s")
# Of few seeds, smaller ones are too small (docs/study.md, "What the numbers mean").
LEAST_P = 0.01
MAIN = "Average sensitivity (%) at 0.5, 1, 2, 4 false positives per image, mean over training seeds"
NOTE = (
    "sd: over seeds. GFLOPs (the papers' convention) and parameters: the whole detector on one"
    " image. GB: peak memory of training, on a GPU the GPU's, else of the process. train, test:"
    " mean time of a run."
)


def study_tables(statistics: dict, methods: Mapping[str, dict], patients: str) -> list[Table]:
    """The tables of one test set.

    Args:
        statistics: of `deeplesion.evaluation.study.study`.
        methods: name -> `cost` and `runs`, as `write_study` has them.
        patients: what the bootstrap drew.
    """
    tables = [main_table(statistics, methods, patients)]
    tables.append(points_table(statistics, patients))
    if statistics["differences"]:
        tables.append(differences_table(statistics, patients))
    return [*tables, seeds_table(statistics, methods)]


def main_table(statistics: dict, methods: Mapping[str, dict], patients: str) -> Table:
    """A row a method; what its columns are is in NOTE."""
    reference, differences = statistics["reference"], statistics["differences"]
    labels = ("method", "seeds")
    measures = (AVERAGE, "sd", "thin", "thick", GAP, "difference", *COSTS)
    rows = []
    for name, groups in statistics["methods"].items():
        average = {group: values["average"] for group, values in groups.items()}
        difference = differences.get(name, {}).get("all", {}).get("average")
        numbers = [
            number_of(average["all"]),
            Number(average["all"]["sd"]),
            *(number_of(average.get(group)) for group in ("thin", "thick")),
            number_of(average.get(GAP), sign=True),
            number_of(difference, sign=True),
            *costs_of(methods[name]),
        ]
        notes = [average["all"]["note"], methods[name]["cost"].get("note", "")]
        notes += ["the reference"] if name == reference and differences else []
        labelled = (name, len(average["all"]["seeds"]))
        rows.append(Row(labelled, tuple(numbers), note="; ".join(filter(None, notes))))
    title = MAIN
    means = [groups["all"]["average"] for groups in statistics["methods"].values()]
    if any(mean["low"] is not None for mean in means):
        title += f", with 95 % intervals over {patients} and seeds"
    if differences:
        title += f"; difference from {reference}"
    # A method of one seed has no p, and is none of those that Holm's correction counts.
    if number := sum(g["all"]["average"]["p"] is not None for g in differences.values()):
        title += f", p corrected for {number} comparison{'s' * (number != 1)} (Holm)"
    return Table("methods", title, labels, measures, rows)


def costs_of(method: dict) -> list[Number]:
    """The numbers of COSTS."""
    cost, runs = method["cost"], method["runs"]
    memory = [
        run["training"].get("gpu_memory_mb") or run["training"].get("memory_mb") for run in runs
    ]
    memory = [mb for mb in memory if mb]

    def seconds(part: str) -> float | None:
        known = [run[part]["seconds"] for run in runs if "seconds" in run[part]]
        return float(np.mean(known)) if known else None

    training, test = seconds("training"), seconds("test")
    return [
        Number(cost["paper_flops"] / 1e9 if "paper_flops" in cost else None),
        Number(cost["parameters"] / 1e6 if "parameters" in cost else None),
        Number(max(memory) / 1024 if memory else None),
        Number(training / 60 if training is not None else None, digits=1),
        Number(test, digits=1),
    ]


def points_table(statistics: dict, patients: str) -> Table:
    """Every operating point, of all, thin and thick slices and their gap."""
    rows = [
        Row((name, group), tuple(number_of(values[m], sign=group == GAP) for m in MEASURES))
        for name, groups in statistics["methods"].items()
        for group, values in groups.items()
    ]
    title = (
        "Sensitivity (%) at false positives per image, mean over training seeds; 95 % intervals"
        f" over {patients} and seeds"
    )
    return Table("points", title, ("method", "slices"), (*MEASURES[:-1], AVERAGE), rows)


def differences_table(statistics: dict, patients: str) -> Table:
    """Paired differences from the reference."""
    rows = [
        Row((name, group), tuple(number_of(values[m], sign=True) for m in MEASURES))
        for name, groups in statistics["differences"].items()
        for group, values in groups.items()
    ]
    title = (
        f"Difference from {statistics['reference']} in points of %, on the same images; 95 %"
        f" intervals over {patients} and seeds, for one comparison; two-sided p, corrected for the"
        " number of methods that have one, each column and kind of slices by itself (Holm)"
    )
    return Table("differences", title, ("method", "slices"), (*MEASURES[:-1], AVERAGE), rows)


def seeds_table(statistics: dict, methods: Mapping[str, dict]) -> Table:
    """The averages of every run."""
    groups = list(dict.fromkeys(g for each in statistics["methods"].values() for g in each))
    rows = [
        Row(
            (name, str(run["seed"])),
            tuple(
                Number(values[group]["average"]["seeds"][i], sign=group == GAP)
                if group in values
                else Number(None)
                for group in groups
            ),
        )
        for name, values in statistics["methods"].items()
        for i, run in enumerate(methods[name]["runs"])
    ]
    title = "Average sensitivity (%) at 0.5, 1, 2, 4 false positives per image of every run"
    return Table("seeds", title, ("method", "seed"), tuple(groups), rows)


def number_of(row: dict | None, sign: bool = False) -> Number:
    """A row of `deeplesion.evaluation.study.study` with its interval and, of a difference, its
    corrected p."""
    if row is None:
        return Number(None)
    p = row.get("p_holm")
    return Number(row["value"], row["low"], row["high"], p, sign, least_p=LEAST_P)
