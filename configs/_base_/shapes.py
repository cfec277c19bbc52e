# The synthetic shapes of the ACS paper (JBHI 2021, section IV-A): what its 2D pre-training and its
# networks for volumes share. Runs made of it: tools/proof_of_concept.py.
_base_ = "default_runtime.py"
custom_imports = dict(
    imports=[
        "mmdet_ext.datasets.sampler",
        "mmdet_ext.datasets.shapes",
        "mmdet_ext.engine.distributed",
        "mmdet_ext.engine.hooks",
        "mmdet_ext.engine.loop",
        "mmdet_ext.evaluation.shapes_metric",
        "mmdet_ext.models.losses",
        "mmdet_ext.models.segmentors",
    ],
    allow_failed_imports=False,
)

# Volumes; shapes_2d.py says what images have.
model = dict(
    type="VolumeSegmentor",
    network=dict(type="ShapesUNet", num_classes=6),
    loss=dict(type="SoftDiceLoss", smooth=0.01),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="EpochSampler", shuffle=True),
    dataset=dict(type="ShapesDataset", axes=3, count=100, split="train", seed=0),
)
# The paper chooses the epoch on its test set, so there is no other one. Scores of the last epoch
# are those that nothing was chosen by.
val_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="ShapesDataset", axes=3, count=200, split="test", seed=0),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="ShapesMetric", batch=20)
test_evaluator = val_evaluator

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
param_scheduler = None
train_cfg = dict(type="ResumableTrainLoop", max_epochs=50, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=4)
default_hooks = dict(
    checkpoint=dict(save_best="Shapes/paper_dice"),
    run_check=dict(reference=None),
)
