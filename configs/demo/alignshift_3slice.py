# `make demo`: the detector of configs/alignshift_3slice.py, narrower and on smaller images, trained
# from scratch on a phantom in a few minutes of two CPU cores. Same classes, other numbers.
_base_ = '../alignshift_3slice.py'
channels = 64
image_size = 192

model = dict(
    backbone=dict(
        growth=12, bn_size=2, block_config=(4, 6, 8), stem_channels=24, with_cp=False,
        init_cfg=None),
    neck=dict(in_channels=(72, 108, 150), out_channels=channels),
    rpn_head=dict(
        in_channels=channels, feat_channels=channels,
        anchor_generator=dict(scales=[4, 6, 8, 12])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=32, num_convs=2)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)))

load_slices = _base_.load_slices
train_pipeline = [
    load_slices,
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomAffineResize', size=image_size),
    dict(type='PackCTInputs'),
]
test_pipeline = [
    load_slices,
    dict(type='RandomAffineResize', size=image_size, prob=0, flip_prob=0),
    dict(type='PackCTInputs'),
]
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-2),
    clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=12, end=12, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=12, val_interval=3)
default_hooks = dict(logger=dict(interval=10))
