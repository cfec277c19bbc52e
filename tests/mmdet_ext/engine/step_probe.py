"""A hook for tests/mmdet_ext/engine/test_distributed.py, imported by the processes that it
starts: keeps what a training step was made of, then has process 1 raise."""

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


def prepare_step(model, seed):
    """BatchNorm as in testing, and what the heads' sampling draws from."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def copied(named):
    return {name: value.detach().clone() for name, value in named}


@HOOKS.register_module()
class StepProbe(Hook):
    def __init__(self, folder):
        self.folder = folder

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        rank, model = get_rank(), runner.model.module
        if runner.iter == 1 and rank == 1:
            raise RuntimeError("process 1 has had enough")
        prepare_step(model, seed=rank)
        self.kept = dict(batch=data_batch, before=copied(model.state_dict().items()))
        runner.optim_wrapper.optimizer.register_step_pre_hook(self.keep_gradients)
        self.model = model

    def keep_gradients(self, *_):
        named = self.model.named_parameters()
        self.kept["gradients"] = {name: p.grad.clone() for name, p in named}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.kept["after"] = copied(self.model.state_dict().items())
        torch.save(self.kept, f"{self.folder}/{get_rank()}.pth")
