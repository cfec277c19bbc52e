"""How many seeds a side find a difference of two methods with a power of 80 %, as docs/reproduce.md
says: python docs/study/seeds_needed.py. By simulation of deeplesion.evaluation.study.estimate, from
the sd over seeds and the half-width that patients alone give."""

import numpy as np
from scipy.special import stdtr, stdtrit

POWER, LEVEL, DRAWS, MOST = 0.8, 0.05, 40_000, 100
DIFFERENCES, SDS = (5, 4, 3, 2, 1), (0.5, 1.0, 1.7, 2.0)
OF_PATIENTS = {"1.2": "the phantom's 500 patients", "0.8": "DeepLesion's 663, a guess"}
PATIENTS = 500  # they hardly count in the degrees of freedom


def power(difference: float, sd: float, seeds: int, half_width: float) -> float:
    """The share of comparisons whose p is below 0.05, `sd` being that of either method."""
    rng = np.random.default_rng(0)
    of_patients = (half_width / stdtrit(PATIENTS - 1, 1 - LEVEL / 2)) ** 2
    found = difference + rng.normal(0, np.sqrt(of_patients + 2 * sd**2 / seeds), DRAWS)
    of_seeds = sd**2 * rng.chisquare(seeds - 1, (2, DRAWS)) / (seeds - 1) / seeds
    variance = of_patients + of_seeds.sum(axis=0)
    parts = of_patients**2 / (PATIENTS - 1) + (of_seeds**2).sum(axis=0) / (seeds - 1)
    p = 2 * stdtr(variance**2 / parts, -np.abs(found) / np.sqrt(variance))
    return float(np.mean(p < LEVEL))


def seeds_needed(difference: float, sd: float, half_width: float) -> int | None:
    """The least number a side from 2 on; None if it takes more than `MOST`."""
    for seeds in range(2, MOST + 1):
        if power(difference, sd, seeds, half_width) >= POWER:
            return seeds
    return None


def main() -> None:
    for half_width, of in OF_PATIENTS.items():
        print(f"\n±{half_width} of patients ({of}):\n")
        print("| difference |" + "".join(f" s = {sd:g} |" for sd in SDS))
        print("|---|" + "---|" * len(SDS))
        for difference in DIFFERENCES:
            numbers = (seeds_needed(difference, sd, float(half_width)) for sd in SDS)
            cells = "".join(f" {n or f'above {MOST}'} |" for n in numbers)
            print(f"| {difference} |{cells}")


if __name__ == "__main__":
    main()
