"""The backbone of a trained 2D detector as a file of 2D weights, which any operator starts from as
from ImageNet's: python docs/study/backbone_of.py WORK_DIR FILE

Of WORK_DIR the best checkpoint is taken. FILE is for model.backbone.init_cfg.checkpoint."""

import sys
from pathlib import Path

import torch

from deeplesion.files import write_whole
from mmdet_ext.checkpoint import load_checkpoint_file
from mmdet_ext.engine.run import find_checkpoint

weights = load_checkpoint_file(find_checkpoint(sys.argv[1]))["state_dict"]
part = {k.removeprefix("backbone."): w for k, w in weights.items() if k.startswith("backbone.")}
write_whole(Path(sys.argv[2]), lambda file: torch.save(part, file))
print(f"{sys.argv[2]}: {len(part)} tensors")
