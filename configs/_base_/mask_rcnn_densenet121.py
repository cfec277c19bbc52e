# The detector of the AlignShift and A3D papers: truncated DenseNet-121 3D backbone, 3D-to-2D neck,
# Mask R-CNN heads on one stride-4 map. The experiment sets the fusion operator.
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
        type="RPNHead",
        in_channels=512,
        feat_channels=512,
        anchor_generator=dict(
            type="AnchorGenerator",
            strides=[4],
            scales=[4, 6, 8, 12, 24, 48],  # times stride 4: 16, 24, 32, 48, 96, 192 px
            ratios=[0.5, 1.0, 2.0],
        ),
        bbox_coder=dict(
            type="DeltaXYWHBBoxCoder",
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0],
        ),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=1.0 / 9.0, loss_weight=1.0),
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2),
            out_channels=512,
            featmap_strides=[4],
        ),
        bbox_head=dict(
            type="Shared2FCBBoxHead",
            in_channels=512,
            fc_out_channels=2048,
            roi_feat_size=7,
            num_classes=1,
            reg_class_agnostic=False,
            bbox_coder=dict(
                type="DeltaXYWHBBoxCoder",
                target_means=[0.0, 0.0, 0.0, 0.0],
                target_stds=[0.1, 0.1, 0.2, 0.2],
            ),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
        ),
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
        rpn=dict(
            assigner=dict(
                type="MaxIoUAssigner",
                pos_iou_thr=0.7,
                neg_iou_thr=0.3,
                min_pos_iou=0.3,
                match_low_quality=True,
                ignore_iof_thr=-1,
            ),
            sampler=dict(
                type="RandomSampler",
                num=32,
                pos_fraction=0.5,
                neg_pos_ub=-1,
                add_gt_as_proposals=False,
            ),
            allowed_border=0,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=dict(
            nms_pre=12000,
            max_per_img=2000,
            nms=dict(type="nms", iou_threshold=0.7),
            min_bbox_size=0,
        ),
        rcnn=dict(
            assigner=dict(
                type="MaxIoUAssigner",
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.5,
                match_low_quality=False,
                ignore_iof_thr=-1,
            ),
            sampler=dict(
                type="RandomSampler",
                num=64,
                pos_fraction=0.25,
                neg_pos_ub=-1,
                add_gt_as_proposals=True,
            ),
            mask_size=28,
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=dict(
            nms_pre=6000, max_per_img=300, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0
        ),
        rcnn=dict(
            score_thr=0.001,
            nms=dict(type="nms", iou_threshold=0.5),
            max_per_img=50,
            mask_thr_binary=0.5,
        ),
    ),
)
