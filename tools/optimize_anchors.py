"""Anchor sizes and ratios that fit the training boxes, and how much better they fit than a config's
own. It reads annotations alone, no images, and writes nothing but what --out asks for.

python tools/optimize_anchors.py data/DeepLesion/annotations/train.json
python tools/optimize_anchors.py data/DeepLesion/DL_info.csv --sizes 8 --ratios 3
python tools/optimize_anchors.py TRAIN.json --config configs/demo/nofusion_3slice.py --out fit.json
"""

import argparse
import json
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmdet.registry import TASK_UTILS, TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from tqdm import tqdm

from deeplesion.command_line import command, config_help
from deeplesion.conventions import PIXEL_CENTRE, SPLITS
from deeplesion.data.anchors import (
    MAX_FOLDS,
    best_overlaps,
    held_out_overlaps,
    optimal_anchors,
    overlap_summary,
)
from deeplesion.data.annotation_check import is_ignored
from deeplesion.data.coco import lesion_of, read_annotations
from deeplesion.data.dl_info import read_dl_info
from deeplesion.errors import UserError
from deeplesion.evaluation.breakdowns import LESION_SIZES, size_group
from deeplesion.files import check_out_file, write_whole
from mmdet_ext.config.check import refused_by_parts
from mmdet_ext.config.experiment import dicts
from mmdet_ext.config.overrides import add_config_options
from mmdet_ext.engine.run import load_config

# Training draws every lesion anew in every epoch: so many boxes show how the sizes are spread.
BOXES = 20_000
MOST = 64  # sizes or ratios: far beyond any use, and near what takes for ever


class Boxes(NamedTuple):
    """Boxes as training sees them: (n, 2) widths and heights in px, and of each which lesion."""

    sizes: np.ndarray
    lesion: np.ndarray


@command()
def main() -> None:
    options = arguments()
    config = load_config(options.config, options.cfg_options)
    path, own = anchors_of(config)
    with refused_by_parts():
        own_generator = TASK_UTILS.build(dict(own))
        resize = TRANSFORMS.build(resize_of(config))
    images = images_of(options.annotations, options.split)
    boxes, copies = boxes_in_training(images, resize, options.seed)
    lesions = [(image["patient"], lesion) for image in images for lesion in image["lesions"]]
    patients = [lesions[i][0] for i in boxes.lesion]
    groups = np.array([size_group(lesions[i][1]) for i in boxes.lesion])
    print(
        f"{len(lesions):,} lesions of {len(set(patients)):,} patients, each drawn {copies} times by"
        f" the training's\n{resize}:\n{len(boxes.sizes):,} boxes are left in the image"
    )

    num_scales = options.sizes or len(own_generator.scales)
    num_ratios = options.ratios or len(own_generator.ratios)
    searched = (own_generator.base_sizes, num_scales, num_ratios)
    with tqdm(total=options.folds + 1, unit="search", leave=False, disable=None) as bar:

        def tell_fold(fold: int, generation: int, mean: float) -> None:
            bar.update(fold - bar.n)
            show(bar, f"fold {fold + 1}", generation, mean)

        # The folds first: too many of them are refused before anything is searched.
        held_out = held_out_overlaps(
            boxes.sizes, patients, *searched, options.folds, options.seed, tell_fold
        )
        bar.update(options.folds - bar.n)
        tell = partial(show, bar, "all patients")
        scales, ratios = optimal_anchors(boxes.sizes, *searched, options.seed, tell)
    new = replaced(own, scales, ratios)
    overlaps = {
        "the config's own": best_overlaps(boxes.sizes, sizes_of(own_generator)),
        "optimised": best_overlaps(boxes.sizes, sizes_of(TASK_UTILS.build(dict(new)))),
        "patients left out": held_out,
    }
    table = {name: overlap_summary(best, groups, LESION_SIZES) for name, best in overlaps.items()}
    print(as_text(table))
    print(f"\nmean: of the best IoU of each box. Patients left out: anchors of {options.folds} "
          "searches, each on the\nother patients.")  # fmt: skip
    print_lines(path, own, new)
    if options.out:
        found = dict(
            annotations=str(options.annotations), split=options.split, config=options.config,
            options=options.cfg_options or {}, path=path, scales=scales, ratios=ratios,
            seed=options.seed, folds=options.folds, overlaps=table,
        )  # fmt: skip
        write_whole(options.out, json.dumps(found, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "annotations", type=Path, metavar="ANNOTATIONS",
        help="annotations/train.json of tools/prepare_data.py, or DL_info.csv",
    )  # fmt: skip
    parser.add_argument(
        "--config", default="nofusion_3slice",
        help=config_help("config whose anchors are compared, and whose augmentation is used")
        + " (default %(default)s, with the anchors of all DeepLesion configs of the papers)",
    )  # fmt: skip
    add_config_options(parser, checkpoint=False)
    parser.add_argument(
        "--sizes", type=int, metavar="N",
        help="look for N sizes of anchors (default: as many as the config has)",
    )  # fmt: skip
    parser.add_argument(
        "--ratios", type=int, metavar="M",
        help="look for M ratios of height to width (default: as many as the config has)",
    )  # fmt: skip
    parser.add_argument(
        "--folds", type=int, default=5, metavar="K",
        help="divide the patients into K parts, and measure on each the anchors that fit the others"
        " (default 5)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0,
        help="seed of the augmentation, the search and the parts of patients (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--split", nargs="+", choices=list(SPLITS.values()), default=["train"],
        help="take the rows of DL_info.csv that are of these splits (default: train)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write what is found to a file, as JSON"
    )
    options = parser.parse_args()
    for name, low, high in (("sizes", 1, MOST), ("ratios", 1, MOST), ("folds", 2, MAX_FOLDS),
                            ("seed", 0, 2**32 - 1)):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} must be from {low} to {high}, got {value}")
    if options.out:
        check_out_file(options.out)
    if options.split != ["train"] and options.annotations.suffix != ".csv":
        raise UserError("--split is for DL_info.csv: an annotation file is of one split")
    return options


def anchors_of(config: Config) -> tuple[str, dict]:
    """The anchors of a detector and the option's path."""
    heads = [(path, node) for path, node in dicts(config.get("model"), "model")
             if node.get("anchor_generator")]  # fmt: skip
    if len(heads) != 1:
        raise UserError(
            f"{config.filename} has {len(heads)} anchor generators: expected a detector with one,"
            " such as model.rpn_head.anchor_generator"
        )
    (path, head) = heads[0]
    return f"{path}.anchor_generator", head["anchor_generator"]


def resize_of(config: Config) -> dict:
    """The step of the training pipeline that settles how large a box is."""
    steps = [node for _, node in dicts(config.get("train_dataloader"), "train_dataloader")
             if node.get("type") == "RandomAffineResize"]  # fmt: skip
    if len(steps) != 1:
        raise UserError(
            f"the training pipeline of {config.filename} has {len(steps)} steps RandomAffineResize:"
            " expected one, by which the boxes are scaled"
        )
    return dict(steps[0])


def images_of(path: Path, splits: list[str]) -> list[dict]:
    """Images with `height`, `width`, `patient` (maybe unknown: one of its own) and `lesions`, each
    with `bbox` x1, y1, x2, y2, `recist` and `diameters_mm` as in the file."""
    if path.suffix == ".csv":
        rows = read_dl_info(path)
        rows = rows[~rows.noisy & rows.split.isin(splits)]
        if rows.empty:
            raise UserError(f"{path} has no clean lesions of --split {' '.join(splits)}")
        rows = rows.assign(diameters_mm=rows.diameters_mm.map(list))  # as of a file of JSON
        columns = ["bbox", "recist", "diameters_mm"]
        return [
            dict(height=first.height, width=first.width, patient=first.patient,
                 lesions=lesions[columns].to_dict("records"))
            for _, lesions in rows.groupby("file_name", sort=False)
            for first in [lesions.iloc[0]]
        ]  # fmt: skip
    content = read_annotations(path, need_lesions=True, regions=True)
    images = {}
    for image in content["images"]:
        patient: Hashable = image.get("patient")
        patient = f"image {image['id']}" if patient is None else patient
        images[image["id"]] = image | dict(patient=patient, lesions=[])
    for annotation in content["annotations"]:
        if not is_ignored(annotation):
            image = images[annotation["image_id"]]
            image["lesions"].append(lesion_of(annotation, image))
    return list(images.values())


def boxes_in_training(images: list[dict], resize, seed: int) -> tuple[Boxes, int]:
    """The boxes as the training's own step leaves them, drawn several times if they are few."""
    lesions = sum(len(image["lesions"]) for image in images)
    copies = max(1, round(BOXES / lesions))
    if not resize.prob:
        copies = 1  # the flip alone changes no size
    sizes, which, first = [], [], 0
    for number, image in enumerate(tqdm(images, desc="boxes", leave=False, disable=None)):
        count = len(image["lesions"])
        if not count:
            continue
        boxes = torch.tensor(np.array([lesion["bbox"] for lesion in image["lesions"]]))
        unknown = np.full(8, np.nan)  # as the data set says it
        ends = [lesion["recist"] for lesion in image["lesions"]]
        ends = [unknown if each is None else np.ravel(each) for each in ends]
        # Nothing is seen of the pixels: one value for all takes no memory.
        blank = np.broadcast_to(np.uint8(0), (image["height"], image["width"]))
        for copy in range(copies):
            sample = dict(
                img=blank,
                gt_bboxes=HorizontalBoxes(boxes + PIXEL_CENTRE),
                gt_bboxes_labels=np.arange(first, first + count),
                gt_recist=np.reshape(ends, (-1, 4, 2)) + PIXEL_CENTRE,
                augmentation_key=(seed, copy, number),
            )
            moved = resize(sample)
            corners = moved["gt_bboxes"].tensor.numpy()
            sizes.append(corners[:, 2:] - corners[:, :2])
            which.append(moved["gt_bboxes_labels"])
        first += count
    return Boxes(np.concatenate(sizes).astype(float), np.concatenate(which)), copies


def replaced(own: dict, scales: list[float], ratios: list[float]) -> dict:
    """The generator with other scales and ratios, without those that it made of octaves."""
    octaves = dict.fromkeys(own.keys() & {"octave_base_scale", "scales_per_octave"})
    return {**own, **octaves, "scales": scales, "ratios": ratios}


def sizes_of(generator) -> np.ndarray:
    """(k, 2) widths and heights of a generator's anchors, of all its maps."""
    corners = torch.cat(list(generator.base_anchors)).double().numpy()
    return corners[:, 2:] - corners[:, :2]


def show(bar: tqdm, what: str, generation: int, mean: float) -> None:
    bar.set_description(what, refresh=False)
    bar.set_postfix_str(f"generation {generation}, mean IoU {mean:.4f}")


def as_text(table: dict[str, dict]) -> str:
    titles = "".join(f"  {name:^23}" for name in table)
    lines = [f"\n{'lesions':<10}{'boxes':>8}{titles}"]
    lines.append(" " * 18 + f"  {'mean':>7}{'< 0.5':>8}{'< 0.7':>8}" * len(table))
    for group, first in next(iter(table.values())).items():
        cells = "".join(
            f"  {part['mean']:>7.3f}{part['below_0.5']:>8.1%}{part['below_0.7']:>8.1%}"
            for part in (each[group] for each in table.values())
        )
        lines.append(f"{group:<10}{first['boxes']:>8,}{cells}")
    return "\n".join(lines)


def print_lines(path: str, own: dict, new: dict) -> None:
    """What to write into a config, and the same for a command line."""
    changed = {name: value for name, value in new.items() if own.get(name) != value}
    stated = ", ".join(f"{name}={value}" for name, value in changed.items())
    line = f"dict({stated})"
    for name in reversed(path.split(".")[1:]):
        line = f"dict({name}={line})"
    print(f"\nmodel = {line}")
    on_line = [f"{path}.{name}={str(value).replace(' ', '')}" for name, value in changed.items()]
    print(f"\n--cfg-options {' '.join(on_line)}")


if __name__ == "__main__":
    main()
