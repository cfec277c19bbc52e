# For trying operators: the detector of configs/nofusion_3slice.py, narrower and on smaller images,
# trained from scratch on a phantom in a few minutes of two CPU cores. Same classes, other numbers.
_base_ = ["../nofusion_3slice.py", "../_base_/from_scratch.py"]
channels = 64
resize = dict(size=192, prob=0.3)

model = dict(
    # Of 256 levels over the papers' 3074 HU a faint lesion would have three or four: learnt too
    # slowly here.
    data_preprocessor=dict(low=-250, high=350),
    backbone=dict(
        growth=12, bn_size=2, block_config=(4, 6, 8), stem_channels=24, with_cp=False, init_cfg=None
    ),
    neck=dict(in_channels=(72, 108, 150), out_channels=channels, norm_cfg=dict(type="BN")),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4, 6, 8, 12], ratios=[1.0]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=64, num_convs=2),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=100), rcnn=dict(sampler=dict(num=32))
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)

auto_scale_lr = dict(base_batch_size=4)
train_dataloader = dict(batch_size=4, num_workers=1)
val_dataloader = dict(num_workers=1)
test_dataloader = dict(num_workers=1)

epochs = 10
optim_wrapper = _base_.adam
param_scheduler = [_base_.warm_up, dict(_base_.cosine, T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs, val_interval=5)
default_hooks = dict(logger=dict(interval=20), run_check=dict(reference="demo"))
