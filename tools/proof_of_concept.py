"""Run the ACS paper's proof of concept (Table IV): pre-train on images of shapes, then compare the
features and the segmentation of volumes: python tools/proof_of_concept.py --preset small"""

import argparse
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmdet.registry import DATASETS, MODELS
from tqdm import tqdm

from deeplesion.command_line import command, told_to_repeat
from deeplesion.data.coco import read_json
from deeplesion.errors import DataError
from deeplesion.files import write_whole
from deeplesion.lock import only_writer
from mmdet_ext.engine.run import find_checkpoint, load_config, train
from mmdet_ext.engine.run_check import logged
from mmdet_ext.evaluation.feature_auc import FeatureAUC
from mmdet_ext.evaluation.shapes_table import PUBLISHED, format_orders, format_table

# The config of each row of the table; those with "p." begin with the pretrained weights.
CONFIGS = {"2.5D": "shapes_25d", "3D": "shapes_i3d", "ACS": "shapes_acs"}
OTHER_PLAN = (
    "{path} holds results of other sizes ({there}), this is {here}: give another --out, or remove "
    "that folder"
)


@dataclass(frozen=True)
class Preset:
    """Sizes of the experiment: pixels along each axis, images and volumes, epochs, and after how
    many of these the test set is scored."""

    size: int
    images: int
    test_images: int
    epochs_2d: int
    volumes: int
    test_volumes: int
    epochs: int
    test_every: int


PRESETS = {
    "small": Preset(24, 1024, 256, 8, 32, 20, 16, 2),
    "paper": Preset(48, 10_000, 2_000, 50, 100, 200, 50, 1),
}


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--preset", choices=PRESETS, default="small",
        help="size of the experiment: small takes minutes, paper a day on a CPU (default small)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="run N seeds, 0 to N - 1 (default 1)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=PUBLISHED,
        default=list(PUBLISHED),
        metavar="ROW",
        help=f"run these rows of the table, of {', '.join(map(repr, PUBLISHED))} (default: all)",
    )
    parser.add_argument(
        "--only-mauc",
        action="store_true",
        help="run the column mAUC alone, which needs no training on volumes",
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default work_dirs/proof_of_concept/PRESET)"
    )
    options = parser.parse_args()
    out = options.out or Path("work_dirs/proof_of_concept") / options.preset
    out.mkdir(parents=True, exist_ok=True)
    with told_to_repeat(), only_writer(out / "experiment.lock", "--out"):
        run(PRESETS[options.preset], options.seeds, options.models, options.only_mauc, out)


def run(preset: Preset, seeds: int, models: list[str], only_mauc: bool, out: Path) -> None:
    """All of the experiment that is not there yet; `results.json` is written after each part."""
    path = out / "results.json"
    content = dict(preset=asdict(preset))
    if path.is_file():
        content = read_json(path, "a result of tools/proof_of_concept.py")
    there = content.get("preset") if isinstance(content, dict) else None
    if there != asdict(preset):
        raise DataError(OTHER_PLAN.format(path=path, there=there, here=asdict(preset)))
    results = content.setdefault("results", {})
    write_whole(path, json.dumps(content, indent=1) + "\n")

    def keep(seed: int, row: str, scores: dict[str, float]) -> None:
        results.setdefault(str(seed), {}).setdefault(row, {}).update(scores)
        write_whole(path, json.dumps(content, indent=1) + "\n")
        said = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
        print(f"seed {seed}, {row}: {said}\n", flush=True)

    for seed in range(seeds):
        done = results.get(str(seed), {})
        folder = out / f"seed_{seed}"
        pretrained = None
        if any(row.endswith("p.") for row in models):
            if "2D" not in done:
                keep(seed, "2D", trained("shapes_2d", folder / "2d", options_2d(preset, seed)))
            pretrained = find_checkpoint(str(folder / "2d"))
        for row in models:
            if "mauc" not in done.get(row, {}):
                name, options = experiment(row, preset, seed, pretrained)
                keep(seed, row, dict(mauc=feature_mauc(name, options, seed)))
        for row in models:
            if not only_mauc and "dice" not in done.get(row, {}):
                name, options = experiment(row, preset, seed, pretrained)
                keep(seed, row, trained(name, folder / row.replace(" ", "_").strip("."), options))
    print(f"\n{format_table(results)}\n\n{format_orders(results)}\n\nresults: {path}")


def sizes(size: int, seed: int, samples: int, test_samples: int) -> dict:
    counts = dict(train=samples, val=test_samples, test=test_samples)
    return {
        "randomness.seed": seed,
        **{f"{split}_dataloader.dataset.seed": seed for split in counts},
        **{f"{split}_dataloader.dataset.size": size for split in counts},
        **{f"{split}_dataloader.dataset.count": count for split, count in counts.items()},
        **{f"{split}_dataloader.num_workers": 0 for split in counts},
    }


def options_2d(preset: Preset, seed: int) -> dict:
    """The learning rate falls after the same parts of the epochs as in the config."""
    return {
        **sizes(preset.size, seed, preset.images, preset.test_images),
        "train_cfg.max_epochs": preset.epochs_2d,
        "param_scheduler.0.milestones": [math.ceil(preset.epochs_2d * s) for s in (0.5, 0.75)],
    }


def experiment(row: str, preset: Preset, seed: int, pretrained: str | None) -> tuple[str, dict]:
    """The config of a row, and its options."""
    kind, weights = row.split()
    return CONFIGS[kind], {
        **sizes(preset.size, seed, preset.volumes, preset.test_volumes),
        "train_cfg.max_epochs": preset.epochs,
        "train_cfg.val_interval": preset.test_every,
        "model.pretrained": pretrained if weights == "p." else None,
    }


def trained(name: str, folder: Path, options: dict) -> dict[str, float]:
    """Trains, or goes on with it; the scores of the best epochs and of the last one."""
    config = load_config(f"acs_volumes/{name}", options, str(folder))
    config.launcher = "none"
    # Runs of one name in one process would share their history.
    config.experiment_name = "_".join(folder.resolve().parts[1:])
    train(config, resume="auto")
    entries = itertools.chain.from_iterable(logged(folder))
    epochs = {entry["step"]: entry for entry in entries if "Shapes/dice" in entry}
    scores = {name: epochs[max(epochs)][f"Shapes/{name}"] for name in ("dice", "iou")}
    for way in ("paper", "code"):
        best = max(epochs.values(), key=lambda line: line[f"Shapes/{way}_dice"])
        scores |= {f"{way}_{name}": best[f"Shapes/{way}_{name}"] for name in ("dice", "iou")}
    return scores


@torch.no_grad()
def feature_mauc(name: str, options: dict, seed: int) -> float:
    """mAUC of the last features in percent, before training on volumes: of the test volumes, the
    first upsampling by the nearest."""
    config = load_config(f"acs_volumes/{name}", {**options, "model.network.inner_mode": "nearest"})
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MODELS.build(config.model)
    model.init_weights()
    network = model.network.to(device).eval()
    volumes = DATASETS.build(config.test_dataloader.dataset)
    background = len(volumes.metainfo["classes"]) - 1
    auc = FeatureAUC(network.model.head.in_channels, device)
    for index in tqdm(range(len(volumes)), desc=f"features, {name}", leave=False):
        sample = volumes[index]
        features = network(sample["inputs"][None].to(device), features=True)[0]
        auc.add(features, sample["data_samples"].labels.to(device) != background)
    return 100 * auc.mean()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    main()
