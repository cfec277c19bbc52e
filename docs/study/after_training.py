"""What docs/options.md compares after training, on the runs of its first study:
python docs/study/after_training.py docs/study/options/training

The mean of the four last checkpoints, and test-time augmentation with each set of views. Results
are kept beside the study, in after_training; what is there is not tested again."""

import subprocess
import sys
from pathlib import Path

from deeplesion.data.coco import read_json
from deeplesion.evaluation.results import read_results
from deeplesion.evaluation.study import paired, study
from deeplesion.report.study_tables import number_of
from deeplesion.report.tables import AVERAGE, Number, Row, Table, to_markdown

FLIPS = ("horizontal", "vertical", "both")
VIEWS = (*((view,) for view in FLIPS), ("depth",), FLIPS, (*FLIPS, "depth"))
MEASURES = ("0.5", "average")
OF_MEAN = "mean of four epochs"
TITLE = (
    "Sensitivity (%) at 0.5 and on average, and difference from the plain test of the same runs,"
    " 95 % intervals over patients and seeds; p corrected for the {} of this table (Holm)"
)

out = Path(sys.argv[1])
kept = out.parent / "after_training"


def tested(run: dict, name: str, checkpoint: Path, *views: str) -> Path:
    """The result file of the run's test with other weights or with further views."""
    file = kept / f"{name.replace(' ', '_')}-seed{run['seed']}" / "results.json.gz"
    if not file.is_file():
        command = [sys.executable, "tools/test.py", run["training"]["config"], checkpoint]
        command += ["--work-dir", file.parent, "--out", file]
        command += ["--tta", *views] if views else []
        subprocess.run([*command, "--cfg-options", *run["training"]["options"]], check=True)
    return file


def mean_of_last(training: Path) -> Path:
    file = training / "mean_of_last.pth"
    command = [sys.executable, "tools/average_checkpoints.py", training, "--last", "4", "--out"]
    subprocess.run([*command, file], check=True)
    return file


methods = read_json(out / "study.json", "what tools/study.py writes")["methods"]
results, pairs = {}, []
for weights in ("default", "averaged weights"):
    runs = methods[weights]["runs"]
    results[weights] = [read_results(out / r["folder"] / "results.json.gz", weights) for r in runs]
    ways = [(f"{weights}, {' '.join(views)}", views) for views in VIEWS]
    if weights == "default":
        ways.insert(0, (OF_MEAN, ()))
    for name, views in ways:
        files = []
        for run in runs:
            training = (out / run["folder"]).parent / "training"
            checkpoint = training if views else mean_of_last(training)
            files.append(tested(run, name, checkpoint, *views))
        results[name] = [read_results(file, name) for file in files]
        pairs.append((name, weights))

means = study(results, "default")["methods"]
differences = paired(results, pairs)
rows = []
for name, groups in means.items():
    for group, measures in groups.items():
        values = (*(number_of(measures[m]) for m in MEASURES), Number(measures["average"]["sd"]))
        of_pair = differences.get(name, {}).get(group, {})
        values += tuple(number_of(of_pair.get(m), sign=True) for m in MEASURES)
        rows.append(Row((name, group), values))
columns = ("0.5", AVERAGE, "sd", "difference at 0.5", "difference")
print(to_markdown(Table("after", TITLE.format(len(pairs)), ("method", "slices"), columns, rows)))
