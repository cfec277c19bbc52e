# The lung nodules of the ACS paper (JBHI 2021, section IV-B): what its segmentation and its
# classification share. Data of tools/prepare_data.py DICOM_ROOT --lidc --out LIDC_ROOT. Cropping
# and augmentation need MONAI, the extra [volumes].
_base_ = "default_runtime.py"
custom_imports = dict(
    imports=[
        "mmdet_ext.datasets.lidc",
        "mmdet_ext.datasets.sampler",
        "mmdet_ext.datasets.volume_transforms",
        "mmdet_ext.engine.distributed",
        "mmdet_ext.engine.hooks",
        "mmdet_ext.engine.loop",
        "mmdet_ext.evaluation.nodule_metrics",
        "mmdet_ext.models.classifiers",
        "mmdet_ext.models.lidc_networks",
        "mmdet_ext.models.losses",
        "mmdet_ext.models.segmentors",
    ],
    allow_failed_imports=False,
)
data_root = "{{$LIDC_ROOT:data/LIDC_prepared}}"

# v / 255 - 1, v in [0, 255]; the networks repeat it three times.
window = dict(type="WindowHU", low=-1024, high=400, to=[-1, 0])
train_pipeline = [
    dict(type="CropVolume", size=48, shift=5),
    dict(type="RandomQuarterTurns"),
    window,
    dict(type="PackVolume"),
]
test_pipeline = [dict(type="CropVolume", size=48), window, dict(type="PackVolume")]

train_dataloader = dict(
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="EpochSampler", shuffle=True),
    dataset=dict(type="LIDCDataset", data_root=data_root, split="train", pipeline=train_pipeline),
)
# The paper chooses the epoch on its test set, so there is no other one. Scores of the last epoch
# are those that nothing was chosen by.
val_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="LIDCDataset", data_root=data_root, split="test", pipeline=test_pipeline),
)
test_dataloader = val_dataloader

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[50, 75], gamma=0.1)]
train_cfg = dict(type="ResumableTrainLoop", max_epochs=100, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(run_check=dict(reference=None))
