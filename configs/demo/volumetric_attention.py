# Volumetric attention on the phantom: the detector of configs/volumetric_attention, with a narrow
# ResNet-18 from random weights, whose BatchNorm learns its own statistics, on 9 slices of 128 px.
_base_ = ["../volumetric_attention/faster_rcnn_r50_va.py", "../_base_/from_scratch.py"]
channels = 64
resize = dict(size=128)

model = dict(
    data_preprocessor=dict(low=-250, high=350),
    backbone=dict(depth=18, base_channels=24, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=channels, norm_cfg=dict(type="BN")),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(ratios=[1.0]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(score_thr=0.001)),
)

auto_scale_lr = dict(base_batch_size=4)
train_dataloader = dict(
    batch_size=4, num_workers=1, dataset=dict(ann_file="annotations/train.json")
)
test_dataloader = dict(num_workers=1)

epochs = 10
optim_wrapper = _base_.adam
param_scheduler = [_base_.warm_up, dict(_base_.cosine, T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(logger=dict(interval=20))
