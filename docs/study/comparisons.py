"""The comparisons that docs/study/operators.md states, each family corrected by itself:
python docs/study/comparisons.py docs/study/operators/7    (or 3, reach, varied, pretrained)

The runs are those of study.json there, which tools/study.py writes, for reach also of those in 7
and 3; Markdown is printed. While runs of a family lack, p-values are corrected for all of it.
Averages are taken seed by seed: runs of one seed start with the same weights and see the same
images, and what they have in common does not average out."""

import sys
from pathlib import Path

from deeplesion.data.coco import read_json
from deeplesion.evaluation.results import Result, read_results
from deeplesion.evaluation.study import contrasts
from deeplesion.report.study_tables import number_of
from deeplesion.report.tables import AVERAGE, Row, Table, to_markdown

PARTS = ("7", "3", "reach", "varied", "pretrained")
POLICIES = ("keep_thick", "normalize")
UNTOLD = ("none", "2.5D", "TSM", "A3D", "ACS", "I3D", "P3D")  # the thickness
TOLD = {"AlignShift": "TSM", "AlignA3D": "A3D", "AlignACS": "ACS"}  # one operator at 2 mm
OPERATORS = (*UNTOLD, *TOLD)
PRETRAINED = 3  # the operators that lead beside none


def less(one: str, other: str) -> dict[str, float]:
    """The contrast that is a difference, first less second."""
    return {one: 1, other: -1}


def average(*of: dict[str, float]) -> dict[str, float]:
    """The contrast that is the average of others, which have no method in common."""
    return {method: weight / len(of) for weights in of for method, weight in weights.items()}


def runs_of(out: Path, names: dict[str, str] | None = None) -> dict[str, dict[int, Result]]:
    """Method -> seed -> result; of those in `names` alone, under the name that it gives."""
    methods = read_json(out / "study.json", "what tools/study.py writes")["methods"]
    return {
        (names or {}).get(name, name): {
            run["seed"]: read_results(out / run["folder"] / "results.json.gz", name)
            for run in method["runs"]
        }
        for name, method in methods.items()
        if method["runs"] and (names is None or name in names)
    }


def estimated(family: dict[str, dict[str, float]], planned: int, by_seed: bool) -> dict:
    """What `contrasts` finds of those contrasts of a family whose methods all have runs.

    Those taken by seed are of the seeds that all their methods have, and say so if some have more.
    """
    known, runs = {}, {}  # of a method with these seeds, which contrasts may take differently
    for name, weights in family.items():
        if not results.keys() >= {*weights}:
            continue
        seeds = {method: sorted(results[method]) for method in weights}
        if by_seed:
            common = sorted(set.intersection(*map(set, seeds.values())))
            if any(of != common for of in seeds.values()):
                name += f", seeds {', '.join(map(str, common))} alone"
            seeds = dict.fromkeys(seeds, common)
        if all(seeds.values()):
            known[name] = {f"{method}, seeds {seeds[method]}": w for method, w in weights.items()}
            for method, of in seeds.items():
                runs[f"{method}, seeds {of}"] = [results[method][seed] for seed in of]
    if not known:
        return {}
    return contrasts(runs, known, planned=planned, by_seed=known if by_seed else ())


if len(sys.argv) != 2 or (out := Path(sys.argv[1]).resolve()).name not in PARTS:
    folders = ", ".join(f"docs/study/operators/{part}" for part in PARTS)
    sys.exit(f"comparisons.py takes one folder, of {folders}; got {' '.join(sys.argv[1:])}")
results, families, averages = runs_of(out), {}, {}
if out.name in ("7", "3"):
    kept, at_2mm = ({name: f"{name}, {p}" for name in OPERATORS} for p in POLICIES)
    for policy, of in zip(POLICIES, (kept, at_2mm)):
        family = {name: less(name, of["none"]) for name in of.values() if name != of["none"]}
        if (out.name, policy) == ("7", "normalize"):
            family["single slice"] = less("single slice", of["none"])
        families[f"{policy}, difference from none"] = family
    of_policy = {name: less(kept[name], at_2mm[name]) for name in OPERATORS}
    families["difference of keep_thick from normalize"] = of_policy
    averages["difference of keep_thick from normalize, average over operators"] = {
        "those not told the thickness": average(*(of_policy[name] for name in UNTOLD))
    }
    averages["difference from none, average over both policies"] = {
        name: average(*(less(of[name], of["none"]) for of in (kept, at_2mm))) for name in UNTOLD[1:]
    }
    of_told = {f"{name} less {twin}": less(kept[name], kept[twin]) for name, twin in TOLD.items()}
    averages["what knowing the thickness gains at keep_thick"] = {
        **of_told,
        "average": average(*of_told.values()),
    }
elif out.name == "reach":
    both = ("none", "A3D")
    for slices, reach in (("3", "2 mm"), ("7", "6 mm")):
        if (out.parent / slices / "study.json").is_file():
            names = {f"{name}, normalize": f"{name}, {slices} slices, {reach}" for name in both}
            results |= runs_of(out.parent / slices, names)
    families["reach, difference of ±6 mm from ±2 mm"] = {
        f"{name}, {n} slices": less(f"{name}, {n} slices, 6 mm", f"{name}, {n} slices, 2 mm")
        for name in both
        for n in (3, 7)
    }
    families["slices, difference of 7 from 3"] = {
        f"{name}, ±{reach}": less(f"{name}, 7 slices, {reach}", f"{name}, 3 slices, {reach}")
        for name in both
        for reach in ("2 mm", "6 mm")
    }
elif out.name == "varied":
    families["difference from none at 7 slices"] = {
        name: less(f"{name}, 7 slices", "none, 7 slices") for name in ("A3D", "AlignShift", "ACS")
    }
    families["difference of 7 slices from 3"] = {
        name: less(f"{name}, 7 slices", f"{name}, 3 slices") for name in ("none", "A3D")
    }
elif out.name == "pretrained":
    families["difference from none"] = {
        name: less(name, "none") for name in results if name != "none"
    }
for title, family in (families | averages).items():
    planned = PRETRAINED if out.name == "pretrained" else len(family)
    known = estimated(family, planned, by_seed=title in averages)
    if not known:
        continue
    rows = [
        Row((name, group), (number_of(m["0.5"], sign=True), number_of(m["average"], sign=True)))
        for name, groups in known.items()
        for group, m in groups.items()
    ]
    title += f", in points of %; p corrected for the {planned} of this family (Holm)"
    if len(known) < planned:
        title += f", of which {len(known)} are known"
    labels, columns = ("contrast", "slices"), ("0.5", AVERAGE)
    print(to_markdown(Table("family", title, labels, columns, rows)), end="\n\n")
