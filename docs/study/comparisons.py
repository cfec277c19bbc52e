"""The comparisons that docs/study/operators.md states, each family corrected by itself:
python docs/study/comparisons.py docs/study/operators/7

The runs are those of study.json there, which tools/study.py writes; Markdown is printed."""

import sys
from pathlib import Path

from deeplesion.data.coco import read_json
from deeplesion.evaluation.results import read_results
from deeplesion.evaluation.study import paired, study
from deeplesion.report.study_tables import number_of
from deeplesion.report.tables import AVERAGE, Row, Table, to_markdown

out = Path(sys.argv[1])
methods = read_json(out / "study.json", "what tools/study.py writes")["methods"]
results = {
    name: [read_results(out / run["folder"] / "results.json.gz", name) for run in method["runs"]]
    for name, method in methods.items()
    if method["runs"]
}
families = {}
for policy, further in (("keep_thick", ()), ("normalize", ("single slice",))):
    ends = (f", {policy}", *further)
    family = {name: runs for name, runs in results.items() if name.endswith(ends)}
    if len(family) > 1 and (none := f"none, {policy}") in family:
        families[f"{policy}, difference from none"] = study(family, none)["differences"]
pairs = [(name, name.replace(", keep_thick", ", normalize")) for name in results]
pairs = [(kept, other) for kept, other in pairs if other != kept and other in results]
if pairs:
    families["difference of keep_thick from normalize"] = paired(results, pairs)
for family, differences in families.items():
    rows = [
        Row((name, group), (number_of(m["0.5"], sign=True), number_of(m["average"], sign=True)))
        for name, groups in differences.items()
        for group, m in groups.items()
    ]
    tested = sum(groups["all"]["average"]["p"] is not None for groups in differences.values())
    title = f"{family}, in points of %; p corrected for the {tested} of this family (Holm)"
    print(
        to_markdown(Table(family, title, ("method", "slices"), ("0.5", AVERAGE), rows)), end="\n\n"
    )
