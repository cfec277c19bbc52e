"""Draw what a detector with volumetric attention attends to on test slices: python
tools/show_attention.py configs/volumetric_attention/faster_rcnn_r50_va.py WORK_DIR --out FOLDER"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from tqdm import tqdm

from deeplesion.command_line import command, config_help
from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.data.slices import plan_stack
from deeplesion.errors import UserError
from deeplesion.files import check_out_folder, write_whole
from deeplesion.report.attention import draw_attention
from mmdet_ext.config.overrides import add_config_options
from mmdet_ext.engine.predict import LesionDetector
from mmdet_ext.engine.run import load_config


@command()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "config",
        help=config_help(
            "config that the checkpoint was trained with",
            "volumetric_attention/faster_rcnn_r50_va",
        ),
    )
    parser.add_argument("checkpoint", help="a .pth file, or a work directory for its best one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pictures to")
    parser.add_argument(
        "--lesions",
        type=int,
        default=20,
        metavar="N",
        help="draw N lesions, spread over the test split (default 20)",
    )
    parser.add_argument(
        "--device", help="compute on cpu, cuda or cuda:N (default: a GPU if there is one)"
    )
    add_config_options(parser, checkpoint=False)
    options = parser.parse_args()
    if options.lesions < 1:
        raise UserError(f"--lesions {options.lesions}: give at least 1")
    check_out_folder(options.out)

    config = load_config(options.config, options.cfg_options)
    detector = LesionDetector(config, options.checkpoint, options.device)
    if getattr(detector.model, "attention_location", None) is None:
        raise UserError(f"{options.config}: its detector has no volumetric attention to show")
    dataset = DATASETS.build(config.test_dataloader.dataset)
    lesions = [
        (index, number)
        for index in range(len(dataset))
        for number in range(len(dataset.get_data_info(index)["lesions"]))
    ]
    chosen = np.linspace(0, len(lesions) - 1, min(options.lesions, len(lesions))).round()
    for index, number in tqdm([lesions[int(i)] for i in chosen], desc="drawing", unit="lesion"):
        picture = draw(detector, dataset, index, number)
        name = f"{dataset.get_data_info(index)['file_name'].replace('/', '_')[:-4]}_{number}.png"
        write_whole(options.out / name, cv2.imencode(".png", picture)[1].tobytes())
    print(f"{len(chosen)} pictures: {options.out}")


@torch.no_grad()
def draw(detector: LesionDetector, dataset, index: int, number: int) -> np.ndarray:
    """The picture of one lesion of a sample."""
    sample = dataset[index]
    meta = sample["data_samples"].metainfo
    data = detector.model.data_preprocessor(pseudo_collate([sample]))
    # Files count pixel centres, the network pixel edges.
    scale = np.tile(meta["scale_factor"], 2)
    edges = (np.array(meta["lesions"][number]["bbox"], np.float32) + PIXEL_CENTRE) * scale
    boxes = torch.tensor(edges[None], dtype=torch.float32, device=detector.device)
    attention = detector.model.attention_weights(data["inputs"], [boxes])
    weights = {
        level: {part: w[0].tolist() for part, w in parts.items()}
        for level, parts in attention.items()
    }
    middles = slice(1, None, 3)  # of the images of three slices
    return draw_attention(
        sample["inputs"][0, middles].numpy(),
        weights,
        distances_mm(meta, dataset.stack)[middles],
        edges - PIXEL_CENTRE,
        f"{meta['file_name']}  {meta['file_thickness_mm']:g} mm slices",
    )


def distances_mm(meta: dict, stack: dict) -> list[float]:
    """Of a stack's slices from the key slice; NaN where the file does not say it."""
    thickness = meta["file_thickness_mm"]
    if meta["slice_range"] is None:
        return [float("nan")] * stack["num_slices"]
    key_slice = int(Path(meta["file_name"]).stem)
    positions, _ = plan_stack(key_slice, thickness, meta["slice_range"], **stack)
    return [((1 - w) * near + w * far - key_slice) * thickness for near, far, w in positions]


if __name__ == "__main__":
    main()
