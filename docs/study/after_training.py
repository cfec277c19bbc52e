"""What docs/options.md compares after training, on the runs of its first study:
python docs/study/after_training.py docs/study/options/training

The mean of the four last checkpoints, the last one, test-time augmentation with each set of views,
and averaged weights against these and against a longer training. Results are kept beside the study,
in after_training; what is there is not tested again."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from mmdet.registry import MODELS

from deeplesion.data.coco import read_json
from deeplesion.evaluation.results import read_results
from deeplesion.evaluation.study import contrasts, study
from deeplesion.report.study_tables import number_of
from deeplesion.report.tables import AVERAGE, Number, Row, Table, to_markdown
from mmdet_ext.engine.run import load_config, test
from mmdet_ext.engine.study_plan import parsed
from mmdet_ext.models.tta import ViewsTTA

FLIPS = ("horizontal", "vertical", "both")
VIEWS = (*((view,) for view in FLIPS), ("depth",), FLIPS, (*FLIPS, "depth"))
MEASURES = ("0.5", "average")
DEFAULT, AVERAGED, LONGER = "default", "averaged weights", "20 epochs"
OF_MEAN, OF_LAST = "mean of four epochs", "last epoch"
RESULT = "results.json.gz"
TITLE = (
    "Sensitivity (%) at 0.5 and on average, and difference from the plain test of the same runs, or"
    " from what the row names, 95 % intervals over patients and seeds; p corrected for the {} of"
    " this table (Holm)"
)

out = Path(sys.argv[1])
kept = out.parent / "after_training"


@MODELS.register_module("ViewsTTA", force=True)
class KeptViews(ViewsTTA):
    """Looks at each view of an image once for all sets of views, and keeps the boxes alone."""

    kept: ClassVar[dict] = {}

    def look(self, data: dict, view: str | None) -> list:
        seen = (view, *(sample.img_path for sample in data["data_samples"]))
        if seen not in self.kept:
            samples = super().look(data, view)
            for sample in samples:
                sample.pred_instances.pop("masks", None)
            self.kept[seen] = samples
        return self.kept[seen]


def tested(run: dict, way: str, weights: Callable[[Path], Path], *views: str) -> Path:
    """The result file of the run's test with other weights or with further views. The run's folder,
    whose name holds a fingerprint of config, code and data, is in its path. If a run was trained
    once more with all of these the same, remove what is kept of it."""
    file = kept / run["folder"] / way.replace(" ", "_") / RESULT
    if not file.is_file():
        print(f"{file.parent} ...", flush=True)
        options = parsed(run["training"]["options"])
        config = load_config(run["training"]["config"], options, str(file.parent))
        test(config, str(weights(training_of(run))), str(file), views=views)
    return file


def training_of(run: dict) -> Path:
    return (out / run["folder"]).parent / "training"


def best(training: Path) -> Path:
    return training  # tools/test.py takes the best checkpoint of a folder


def mean_of_last(training: Path) -> Path:
    file = training / "mean_of_last.pth"
    command = [sys.executable, "tools/average_checkpoints.py", training, "--last", "4", "--out"]
    subprocess.run([*command, file], check=True)
    return file


def last_epoch(run: dict) -> str | None:
    """The file name of the last checkpoint; None if it is the best one too. From the record, which
    is kept where the checkpoints are not."""
    records = (read_json(file, "the record of a training")
               for file in sorted(training_of(run).glob("run_*.json")))  # fmt: skip
    ended = [record["ended"] for record in records if "ended" in record][-1]
    name = f"epoch_{ended['epochs']}.pth"
    return None if ended["best"].endswith(f"_{name}") else name


def of_last(run: dict) -> Path:
    name = last_epoch(run)
    return tested(run, OF_LAST, lambda folder: folder / name) if name else plain(run)


def plain(run: dict) -> Path:
    return out / run["folder"] / RESULT


methods = read_json(out / "study.json", "what tools/study.py writes")["methods"]
runs = {name: methods.get(name, {}).get("runs") for name in (DEFAULT, AVERAGED, LONGER)}
notes = [f"{name} has no runs yet and is left out." for name, of in runs.items() if not of]
files, pairs = {name: [plain(run) for run in of] for name, of in runs.items() if of}, []
if not files:
    sys.exit("\n".join(notes))
if DEFAULT in files:
    files[OF_MEAN] = [tested(run, OF_MEAN, mean_of_last) for run in runs[DEFAULT]]
    pairs.append((OF_MEAN, DEFAULT))
    number = sum(last_epoch(run) is not None for run in runs[DEFAULT])
    notes.append(f"{number} of {len(runs[DEFAULT])} runs of {DEFAULT} have another best epoch than")
    notes[-1] += f" the last; {'the others count as they are' if number else 'so there is no row'}."
    if number:
        files[OF_LAST] = [of_last(run) for run in runs[DEFAULT]]
        pairs.append((OF_LAST, DEFAULT))
for weights in (DEFAULT, AVERAGED):
    ways = {" ".join(views): views for views in VIEWS if weights in files}
    for run in runs[weights] if ways else ():
        KeptViews.kept.clear()
        for way, views in ways.items():
            files.setdefault(f"{weights}, {way}", []).append(tested(run, way, best, *views))
    pairs += [(f"{weights}, {way}", weights) for way in ways]
for other in (OF_MEAN, OF_LAST, LONGER):
    if AVERAGED in files and other in files:
        files[f"{AVERAGED} against {other}"] = files[AVERAGED]
        pairs.append((f"{AVERAGED} against {other}", other))

results = {name: [read_results(file, name) for file in of] for name, of in files.items()}
means = study(results, next(iter(results)))["methods"]
# The same trainings tested in two ways are taken run by run.
same = {
    name for name, other in pairs if name.startswith(f"{other}, ") or name in (OF_MEAN, OF_LAST)
}
family = {name: {name: 1, other: -1} for name, other in pairs}
differences = contrasts(results, family, by_seed=same) if family else {}
rows = []
for name, groups in means.items():
    for group, measures in groups.items():
        values = (*(number_of(measures[m]) for m in MEASURES), Number(measures["average"]["sd"]))
        of_pair = differences.get(name, {}).get(group, {})
        values += tuple(number_of(of_pair.get(m), sign=True) for m in MEASURES)
        rows.append(Row((name, group), values))
columns = ("0.5", AVERAGE, "sd", "difference at 0.5", "difference")
corrected = sum(groups["all"]["average"]["p"] is not None for groups in differences.values())
print(to_markdown(Table("after", TITLE.format(corrected), ("method", "slices"), columns, rows)))
print("", *notes, sep="\n")
