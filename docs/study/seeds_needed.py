"""How wide the interval of a difference of two methods is with so many seeds a side, and how many
find a difference with a power of 80 %, as docs/study.md says: python docs/study/seeds_needed.py. By
the formula and by simulation of deeplesion.evaluation.study.estimate, from the sd over seeds and
the half-width that patients alone give. What patients and seeds have in common counts as none,
which is on the safe side."""

from collections.abc import Iterable

import numpy as np
from scipy.special import stdtr, stdtrit

POWER, LEVEL, DRAWS, MOST = 0.8, 0.05, 40_000, 100
DIFFERENCES, SDS, SEEDS = (5, 4, 3, 2, 1), (0.5, 1.0, 1.7, 2.0), (2, 3, 4, 5, 6, 8, 10, 16)
OF_PATIENTS = {1.2: "the phantom's 500 patients", 0.8: "DeepLesion's 663, a guess"}
PATIENTS = 500  # they hardly count in the degrees of freedom


def half_width(sd: float, seeds: int, of_patients: float) -> float:
    """That of the 95 % interval if both methods have the deviation `sd`."""
    patients = (of_patients / stdtrit(PATIENTS - 1, 1 - LEVEL / 2)) ** 2
    of_seeds = sd**2 / seeds  # of one method
    variance = patients + 2 * of_seeds
    freedom = variance**2 / (patients**2 / (PATIENTS - 1) + 2 * of_seeds**2 / (seeds - 1))
    return float(stdtrit(freedom, 1 - LEVEL / 2) * np.sqrt(variance))


def power(difference: float, sd: float, seeds: int, of_patients: float) -> float:
    """The share of comparisons whose p is below 0.05, `sd` being that of either method."""
    rng = np.random.default_rng(0)
    patients = (of_patients / stdtrit(PATIENTS - 1, 1 - LEVEL / 2)) ** 2
    found = difference + rng.normal(0, np.sqrt(patients + 2 * sd**2 / seeds), DRAWS)
    of_seeds = sd**2 * rng.chisquare(seeds - 1, (2, DRAWS)) / (seeds - 1) / seeds
    variance = patients + of_seeds.sum(axis=0)
    parts = patients**2 / (PATIENTS - 1) + (of_seeds**2).sum(axis=0) / (seeds - 1)
    p = 2 * stdtr(variance**2 / parts, -np.abs(found) / np.sqrt(variance))
    return float(np.mean(p < LEVEL))


def seeds_needed(difference: float, sd: float, of_patients: float) -> int | None:
    """The least number a side from 2 on; None if it takes more than `MOST`."""
    for seeds in range(2, MOST + 1):
        if power(difference, sd, seeds, of_patients) >= POWER:
            return seeds
    return None


def main() -> None:
    for of_patients, whose in OF_PATIENTS.items():
        print(
            f"\n±{of_patients} of patients ({whose})\n\nhalf-width of the interval, seeds a side:\n"
        )
        rows = {f"s = {s:g}": [f"{half_width(s, n, of_patients):.1f}" for n in SEEDS] for s in SDS}
        table("", map(str, SEEDS), rows)
        print("\nseeds a side for a power of 80 %:\n")
        rows = {}
        for difference in DIFFERENCES:
            needed = (seeds_needed(difference, sd, of_patients) for sd in SDS)
            rows[str(difference)] = [str(n) if n else "-" for n in needed]
        table("difference", (f"s = {sd:g}" for sd in SDS), rows)


def table(corner: str, columns: Iterable[str], rows: dict[str, list[str]]) -> None:
    lines = [(corner, *columns), *((name, *cells) for name, cells in rows.items())]
    lines.insert(1, ("---",) * len(lines[0]))
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
