# Faster R-CNN with ResNet-50 and FPN on images of three slices: the detector of "Volumetric
# Attention" (MICCAI 2019), section 3.3, with the options of MMDetection's "1x" recipe of 2018.
# An experiment adds the attention.
_base_ = "two_stage.py"
fpn_channels = 256
model = dict(
    type="SliceGroupFasterRCNN",
    # The paper does not say how HU become pixels: the window of 3DCE, with which it compares. The
    # backbone keeps ImageNet's BatchNorm statistics (norm_eval), so the input must have ImageNet's
    # mean and deviation, averaged over colours: a slice is the same in whichever channel it lies.
    data_preprocessor=dict(
        type="CTDataPreprocessor", low=-1024, high=3071, shift=114.5, divisor=57.6
    ),
    backbone=dict(
        type="TorchvisionResNet",
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        style="pytorch",
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://download.pytorch.org/models/resnet50-0676ba61.pth",
        ),
    ),
    neck=dict(
        type="FPN", in_channels=[256, 512, 1024, 2048], out_channels=fpn_channels, num_outs=5
    ),
    rpn_head=dict(
        in_channels=fpn_channels,
        feat_channels=fpn_channels,
        anchor_generator=dict(
            type="AnchorGenerator",
            strides=[4, 8, 16, 32, 64],
            # Times the strides 16 to 256 px. With the usual scale of 8, anchors begin at 32 px: at
            # 512 px, 29 % of DeepLesion's boxes then have no anchor of IoU 0.5. The paper does not
            # say; --cfg-options model.rpn_head.anchor_generator.scales=[8] takes the usual ones.
            scales=[4],
            ratios=[0.5, 1.0, 2.0],
        ),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=fpn_channels, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(in_channels=fpn_channels, fc_out_channels=1024),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=256)),
        rpn_proposal=dict(nms_pre=2000),
        rcnn=dict(sampler=dict(num=512)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000), rcnn=dict(score_thr=0.05, max_per_img=100)
    ),
)
