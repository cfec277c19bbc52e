# Liver and lesions of LiTS by the ACS paper's DeepLab for volumes (JBHI 2021, section IV-C), of
# LITS_FILES, a folder of volume-N.nii and segmentation-N.nii. Needs the extras [ct] and [volumes].
# docs/lits.md says what the paper leaves open.
_base_ = "default_runtime.py"
custom_imports = dict(
    imports=[
        "mmdet_ext.datasets.lits_volumes",
        "mmdet_ext.datasets.sampler",
        "mmdet_ext.datasets.volume_transforms",
        "mmdet_ext.engine.distributed",
        "mmdet_ext.engine.hooks",
        "mmdet_ext.engine.loop",
        "mmdet_ext.evaluation.volume_dice_metric",
        "mmdet_ext.models.deeplab",
        "mmdet_ext.models.losses",
        "mmdet_ext.models.sliding_windows",
    ],
    allow_failed_imports=False,
)
data_root = "{{$LITS_FILES:data/LiTS}}"
cache = "{{$LITS_ARRAYS:data/LiTS_arrays}}"  # cases as arrays, written as they are first used

# From torchvision's DeepLabV3, all but the last layer; `model.transfer=encoder`: its ResNet alone.
# --cfg-options \
#     model.pretrained=https://download.pytorch.org/models/deeplabv3_resnet101_coco-586e9e4e.pth
model = dict(
    type="SlidingWindowSegmentor",
    network=dict(type="DeepLabV3", num_classes=3, depth=101),
    loss=dict(type="SoftDiceLoss", smooth=1.0),
    test_cfg=dict(window=[64, 512, 512], step=[24, 512, 512]),
)

window = dict(type="WindowHU", low=-200, high=250)
train_pipeline = [
    dict(type="RandomScaledCrop", size=[64, 224, 224]),
    dict(type="RandomFlipsAndTurns"),
    window,
    dict(type="PackVolume"),
]
test_pipeline = [window, dict(type="PackVolume")]

train_dataloader = dict(
    batch_size=8,  # in all, two at least of each process
    drop_last=True,  # which might be a single crop, too few for DeepLab's BatchNorm
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="EpochSampler", shuffle=True),
    dataset=dict(
        type="LiTSVolumes",
        data_root=data_root,
        split="train",
        pipeline=train_pipeline,
        cache=cache,
    ),
)
# The paper does not say what Table VI was scored on. Here: the last epoch on our validation cases,
# by which nothing is chosen.
val_dataloader = None
val_evaluator = None
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="LiTSVolumes",
        data_root=data_root,
        split="val",
        pipeline=test_pipeline,
        cache=cache,
        test_mode=True,
    ),
)
test_evaluator = dict(type="VolumeDiceMetric")

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[3000, 4500], gamma=0.1)]
train_cfg = dict(type="ResumableTrainLoop", max_epochs=6000)
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    checkpoint=dict(interval=50, save_best=None),
    run_check=dict(reference=None),
)
# An epoch is 105 crops. Whole volumes differ in size, so nothing is tuned for one.
env_cfg = dict(cudnn_benchmark=False)
