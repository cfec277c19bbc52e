"""A detector that is built in a second, its weights drawn at random, and CT volumes for it."""

import functools
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from ct_volumes.volume import CTVolume, Source
from deeplesion.data.slices import SliceFolder
from deeplesion.phantom.body import Body
from mmdet_ext.checkpoint import save_checkpoint_file
from mmdet_ext.config.network import TRAINED_AS, network_of
from mmdet_ext.engine.run import load_config

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs/demo/alignshift_3slice.py"
SMALL = {
    "model.backbone.block_config": (1, 1, 1),
    "model.neck.in_channels": (36, 30, 27),
    "model.test_cfg.rcnn.max_per_img": 8,
    "resize.size": 96,
}
# Of weights in the heads, for scores, boxes and masks that differ, and of slice attention's last
# ones, which start at zero.
SPREAD = {"fc_cls": 0.005, "fc_reg": 0.0005, "conv_logits": 0.005, "project.weight": 0.1}


def config_of(**options):
    return load_config(str(options.pop("path", DEMO)), {**SMALL, **options})


def without_masks():
    """Options by which the detector is a Faster R-CNN."""
    return {"model.roi_head.mask_head": None, "model.roi_head.mask_roi_extractor": None}


def write_checkpoint(config, path, seed=0):
    """Random weights, in a file as a training leaves it."""
    init_default_scope("mmdet")
    torch.manual_seed(seed)
    model = MODELS.build(config.model)
    model.init_weights()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = next((s for part, s in SPREAD.items() if part in name), None)
            if spread is not None and weight.ndim > 1:
                weight.normal_(0, spread)
    meta = {TRAINED_AS: [network_of(config)]}
    save_checkpoint_file(dict(meta=meta, state_dict=model.state_dict()), Path(path))
    return path


@functools.cache
def _body():
    return Body(np.random.default_rng(0), 128, 3.0)


def body_of(slices, first_mm=200.0):
    """(S, 128, 128) int16: noisy slices of the phantom's body every mm, pixels of 3 mm."""
    rng = np.random.default_rng(0)
    planes = [_body().plane(first_mm + number)[0] for number in range(slices)]
    return np.rint(planes + rng.normal(0, 15, (slices, 128, 128))).astype(np.int16)


def volume_of(hu, interval_mm=1.0, spacing_mm=(0.8, 0.8)):
    """(S, H, W) slices `interval_mm` apart: a number, or (S - 1,) of them."""
    hu = np.asarray(hu, np.int16)
    steps = np.broadcast_to(np.asarray(interval_mm, float), (len(hu) - 1,))
    below = np.append(0, np.cumsum(steps))
    origins = np.stack([0 * below, 0 * below, 500 - below], axis=1)
    source = Source(Path("scan"), "nifti", hu.shape, affine=np.eye(4))
    return CTVolume(hu, origins, (1, 0, 0), (0, 1, 0), spacing_mm, source)


def phantom_series(root, image):
    """The volume around a key slice of the phantom, and the number of the key slice in it."""
    folder = SliceFolder(root / "Images_png")
    first, last = image["slice_range"]
    series, name = image["file_name"].split("/")
    hu = [folder.read(f"{series}/{index:03d}.png") for index in range(first, last + 1)]
    spacing = image["spacing_mm"]
    return volume_of(hu, image["thickness_mm"], (spacing, spacing)), int(name[:-4]) - first
