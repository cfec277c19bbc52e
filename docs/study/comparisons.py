"""The comparisons that docs/study/operators.md states, each family corrected by itself:
python docs/study/comparisons.py docs/study/operators/7

The runs are those of study.json there, which tools/study.py writes; Markdown is printed. While runs
of a family lack, p-values are corrected for all of its comparisons."""

import sys
from pathlib import Path

from deeplesion.data.coco import read_json
from deeplesion.evaluation.results import read_results
from deeplesion.evaluation.study import paired
from deeplesion.report.study_tables import number_of
from deeplesion.report.tables import AVERAGE, Row, Table, to_markdown

OPERATORS = ["none", "2.5D", "TSM", "AlignShift", "A3D", "ACS", "I3D", "P3D"]
OPERATORS += ["AlignA3D", "AlignACS"]

out = Path(sys.argv[1])
methods = read_json(out / "study.json", "what tools/study.py writes")["methods"]
results = {
    name: [read_results(out / run["folder"] / "results.json.gz", name) for run in method["runs"]]
    for name, method in methods.items()
    if method["runs"]
}
families = {}
for policy in ("keep_thick", "normalize"):
    none, *others = (f"{operator}, {policy}" for operator in OPERATORS)
    if (out.name, policy) == ("7", "normalize"):
        others.append("single slice")
    families[f"{policy}, difference from none"] = [(name, none) for name in others]
families["difference of keep_thick from normalize"] = [
    (f"{operator}, keep_thick", f"{operator}, normalize") for operator in OPERATORS
]
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
