# The detector of the AlignShift and A3D papers: truncated DenseNet-121 3D backbone, 3D-to-2D neck,
# Mask R-CNN heads on one stride-4 map. The experiment sets the fusion operator.
_base_ = "two_stage.py"
model = dict(
    type="KeySliceMaskRCNN",
    data_preprocessor=dict(type="CTDataPreprocessor", low=-1024, high=2050, shift=50),
    backbone=dict(
        type="TruncatedDenseNet3D",
        fusion=dict(type="SliceConv"),
        stem="middle",
        with_cp=True,  # less memory, more time; changes no result
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://download.pytorch.org/models/densenet121-a639ec97.pth",
        ),
    ),
    neck=dict(type="KeySliceFPN", in_channels=(256, 512, 1024), out_channels=512),
    rpn_head=dict(
        in_channels=512,
        feat_channels=512,
        anchor_generator=dict(
            type="AnchorGenerator",
            strides=[4],
            scales=[4, 6, 8, 12, 24, 48],  # times stride 4: 16, 24, 32, 48, 96, 192 px
            ratios=[0.5, 1.0, 2.0],
        ),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=512, featmap_strides=[4]),
        bbox_head=dict(in_channels=512, fc_out_channels=2048),
        mask_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=2),
            out_channels=512,
            featmap_strides=[4],
        ),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=4,
            in_channels=512,
            conv_out_channels=256,
            num_classes=1,
            loss_mask=dict(type="SoftDiceMaskLoss", loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=32)),
        rpn_proposal=dict(nms_pre=12000),
        rcnn=dict(sampler=dict(num=64), mask_size=28),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=6000, max_per_img=300),
        rcnn=dict(score_thr=0.001, max_per_img=50, mask_thr_binary=0.5),
    ),
)
