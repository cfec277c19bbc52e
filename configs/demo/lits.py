# Mask R-CNN for liver and lesions on a phantom LiTS: the detector of
# configs/volumetric_attention/lits_mask_rcnn_r50.py, with a narrow ResNet-18 from random weights,
# whose BatchNorm learns its own statistics, on slices of 128 px.
_base_ = ["../volumetric_attention/lits_mask_rcnn_r50.py", "../_base_/from_scratch.py"]
channels = 64
resize = dict(size=128)

model = dict(
    backbone=dict(depth=18, base_channels=24, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=channels, norm_cfg=dict(type="BN")),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        # A lesion is of the size that DeepLesion's have in configs/demo, a liver 50 px.
        anchor_generator=dict(scales=[2], ratios=[1.0]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=64, num_convs=2),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)

auto_scale_lr = dict(base_batch_size=4)
train_dataloader = dict(
    batch_size=4, num_workers=1, dataset=dict(background_step=32, liver_step=12)
)
test_dataloader = dict(num_workers=1)

epochs = 3
optim_wrapper = _base_.adam
param_scheduler = [_base_.warm_up, dict(_base_.cosine, T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(logger=dict(interval=20))
