"""The comparisons that docs/study/operators.md states, each family corrected by itself:
python docs/study/comparisons.py docs/study/operators/7    (or 3, reach, varied, pretrained)

The runs are those of study.json there, which tools/study.py writes, for reach also of those in 7
and 3; Markdown is printed. While runs of a family lack, p-values are corrected for all of it."""

import sys
from pathlib import Path

from deeplesion.data.coco import read_json
from deeplesion.evaluation.results import read_results
from deeplesion.evaluation.study import paired
from deeplesion.report.study_tables import number_of
from deeplesion.report.tables import AVERAGE, Row, Table, to_markdown

OPERATORS = ["none", "2.5D", "TSM", "AlignShift", "A3D", "ACS", "I3D", "P3D"]
OPERATORS += ["AlignA3D", "AlignACS"]


def runs_of(out: Path, names: dict[str, str] | None = None) -> dict[str, list]:
    """Method -> results of its runs; of those in `names` alone, under the name that it gives."""
    methods = read_json(out / "study.json", "what tools/study.py writes")["methods"]
    return {
        (names or {}).get(name, name): [
            read_results(out / run["folder"] / "results.json.gz", name) for run in method["runs"]
        ]
        for name, method in methods.items()
        if method["runs"] and (names is None or name in names)
    }


out = Path(sys.argv[1])
results, families = runs_of(out), {}
if out.name in ("7", "3"):
    for policy in ("keep_thick", "normalize"):
        none, *others = (f"{operator}, {policy}" for operator in OPERATORS)
        if (out.name, policy) == ("7", "normalize"):
            others.append("single slice")
        families[f"{policy}, difference from none"] = [(name, none) for name in others]
    families["difference of keep_thick from normalize"] = [
        (f"{operator}, keep_thick", f"{operator}, normalize") for operator in OPERATORS
    ]
elif out.name == "reach":
    both = ("none", "A3D")
    for slices, reach in (("3", "2 mm"), ("7", "6 mm")):
        if (out.parent / slices / "study.json").is_file():
            names = {f"{name}, normalize": f"{name}, {slices} slices, {reach}" for name in both}
            results |= runs_of(out.parent / slices, names)
    families["reach, difference of ±6 mm from ±2 mm"] = [
        (f"{name}, {n} slices, 6 mm", f"{name}, {n} slices, 2 mm") for name in both for n in (3, 7)
    ]
    families["slices, difference of 7 from 3"] = [
        (f"{name}, 7 slices, {reach}", f"{name}, 3 slices, {reach}")
        for name in both
        for reach in ("2 mm", "6 mm")
    ]
elif out.name == "varied":
    families["difference from none"] = [
        (f"{name}, 7 slices", "none, 7 slices") for name in ("A3D", "AlignShift", "ACS")
    ]
    families["difference of 7 slices from 3"] = [
        (f"{name}, 7 slices", f"{name}, 3 slices") for name in ("none", "A3D")
    ]
elif out.name == "pretrained":
    families["difference from none"] = [(name, "none") for name in results if name != "none"]
for family, planned in families.items():
    pairs = [pair for pair in planned if results.keys() >= {*pair}]
    if not pairs:
        continue
    differences = paired(results, pairs, planned=len(planned))
    rows = [
        Row((name, group), (number_of(m["0.5"], sign=True), number_of(m["average"], sign=True)))
        for name, groups in differences.items()
        for group, m in groups.items()
    ]
    title = f"{family}, in points of %; p corrected for the {len(planned)} of this family (Holm)"
    if len(pairs) < len(planned):
        title += f", of which {len(pairs)} are known"
    print(
        to_markdown(Table(family, title, ("method", "slices"), ("0.5", AVERAGE), rows)), end="\n\n"
    )
