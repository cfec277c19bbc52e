"""A training step on a slice of which all is a region to ignore: the detector learns from what it
has of lesions and from nothing else."""

import json

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope

from mmdet_ext.engine.run import load_config

from ..small_detector import ROOT, SMALL


def gradients(config, content, path):
    """Of the loss, by what the RPN says of each anchor, and by the box head's of each sample."""
    path.write_text(json.dumps(content))
    config.train_dataloader.dataset.update(ann_file=str(path))
    (step,) = [s for s in config.train_dataloader.dataset.pipeline if "Affine" in s.type]
    step.update(augment=False)
    data = DATASETS.build(config.train_dataloader.dataset)
    torch.manual_seed(0)
    model = MODELS.build(config.model).train()
    outputs = []

    def keep(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    for layer in (model.rpn_head.rpn_cls, model.roi_head.bbox_head.fc_cls):
        layer.register_forward_hook(keep)
    batch = model.data_preprocessor(pseudo_collate([data[0]]), True)
    losses = model.loss(batch["inputs"], batch["data_samples"])
    total, _ = model.parse_losses(losses)
    total.backward()
    return [output.grad for output in outputs]


@pytest.mark.parametrize("marked", [False, True])
def test_background_is_learnt_but_in_a_region(phantom, tmp_path, monkeypatch, marked):
    monkeypatch.setenv("DEEPLESION_ROOT", str(phantom))
    init_default_scope("mmdet")
    config = load_config(str(ROOT / "configs/demo/ignored_regions.py"), SMALL)
    content = json.loads((phantom / "annotations/train.json").read_text())
    image = content["images"][0]
    own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    content.update(images=[image], annotations=list(own))
    if marked:
        side = image["width"] - 1
        region = dict(id=999, image_id=image["id"], category_id=1, bbox=[0, 0, side, side])
        content["annotations"].append({**region, "iscrowd": 1})
    anchors, samples = gradients(config, content, tmp_path / "train.json")
    # Of the binary loss the derivative is negative where the target is a lesion. Anchors that
    # reach beyond the image are not learnt from, proposals are clipped to it.
    lesions, background = int((anchors < 0).sum()), int((anchors > 0).sum())
    assert lesions >= len(own)
    # Of the softmax that of the last class is negative where the target is background.
    background_samples = int((samples[:, -1] < 0).sum())
    assert len(samples) - background_samples >= len(own)
    assert (background == 0, background_samples == 0) == (marked, marked)
