# DINO (ICLR 2023) on the squeezed maps at strides 8, 16 and 32 instead of Mask R-CNN on one of
# stride 4: MMDetection's options of it for COCO, but for what is said here. Boxes only, no masks.
_base_ = "../_base_/detector.py"
custom_imports = dict(imports=[*_base_.custom_imports.imports, "mmdet_ext.models.dino"])
levels, channels = 3, 256

model = dict(
    _delete_=True,
    type="KeySliceDINO",
    data_preprocessor=_base_.model.data_preprocessor,
    backbone={**_base_.model.backbone, "fusion": dict(type="A3DConv")},
    neck=dict(
        type="KeySliceLevels",
        in_channels=(256, 512, 1024),
        first_level=1,
        num_outs=levels,
        out_channels=channels,
        norm_cfg=dict(type="GN", num_groups=32),
    ),
    num_queries=300,  # an image has few lesions: 900 in COCO
    num_feature_levels=levels,
    with_box_refine=True,
    as_two_stage=True,
    encoder=dict(
        num_layers=6,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=channels, num_levels=levels, dropout=0.0),
            ffn_cfg=dict(embed_dims=channels, feedforward_channels=2048, ffn_drop=0.0),
        ),
    ),
    decoder=dict(
        num_layers=6,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=channels, num_heads=8, dropout=0.0),
            cross_attn_cfg=dict(embed_dims=channels, num_levels=levels, dropout=0.0),
            ffn_cfg=dict(embed_dims=channels, feedforward_channels=2048, ffn_drop=0.0),
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=channels // 2, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        type="DINOHead",
        num_classes=1,
        embed_dims=channels,
        sync_cls_avg_factor=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=100),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=50),
)

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadCTSlices"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomAffineResize"),
            dict(type="PackCTInputs"),
        ]
    )
)

# MMDetection's: AdamW 1e-4 at a total batch of 16, a tenth of it for the backbone, one drop near
# the end. Here the batch is 8, and the backbone learns at the full rate: its operators are new.
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, milestones=[16], gamma=0.1, end=20),
]
# The losses of sound runs are known for the recipe of the other papers only.
default_hooks = dict(run_check=dict(reference=None))
