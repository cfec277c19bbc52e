"""Training that takes seconds, for tests of what surrounds it."""

import itertools

from mmdet_ext.engine.run import load_config, train

EPOCHS, ITERATIONS = 3, 9  # three batches an epoch
BY_ITERATION = {
    "default_hooks.checkpoint.by_epoch": False,
    "default_hooks.checkpoint.interval": 2,
}
names = (f"test_resume_{i}" for i in itertools.count())


def configuration(repository, phantom, work_dir, **options):
    """The demo's detector, smaller; 3 images at a time, gradients over 2 of these parts, of which
    epochs hold 3."""
    overrides = {
        "train_cfg.max_epochs": EPOCHS,
        "train_cfg.val_interval": 2,
        "train_dataloader.batch_size": 6,
        "auto_scale_lr.base_batch_size": 6,
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "val_dataloader.num_workers": 0,
        "val_dataloader.persistent_workers": False,
        "optim_wrapper.accumulative_counts": 2,
        "custom_hooks": [dict(type="AveragedWeightsHook", epochs=2)],
        "default_hooks.checkpoint.max_keep_ckpts": -1,
        "default_hooks.logger.interval": 1,
        "model.backbone.block_config": (1, 1, 1),
        "model.neck.in_channels": (36, 30, 27),
        "resize.size": 96,
        "visualizer.vis_backends": [],
        **options,
    }
    config = load_config(str(repository / "configs/demo/alignshift_3slice.py"), overrides)
    config.work_dir, config.launcher = str(work_dir), "none"
    config.experiment_name = next(names)  # two runs of one name would share mmengine's message hub
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        config[loader].dataset.data_root = str(phantom)
    return config


def run(repository, phantom, work_dir, resume=None, **options):
    train(configuration(repository, phantom, work_dir, **options), resume)
    return work_dir


def log(work_dir):
    """What the latest run in a folder wrote."""
    return max(work_dir.glob("*/*.log"), key=lambda f: f.stat().st_mtime_ns).read_text()
