# VA Mask R-CNN, ResNet-50 (Fig. 2 of "Volumetric Attention", MICCAI 2019), on DeepLesion's masks of
# tools/prepare_data.py. The paper has it on LiTS alone, DeepLesion having no masks of its own.
_base_ = "faster_rcnn_r50_va.py"
model = dict(
    type="SliceGroupMaskRCNN",
    roi_head=dict(
        mask_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=2),
            out_channels=256,
            featmap_strides=[4, 8, 16, 32],
        ),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=4,
            in_channels=256,
            conv_out_channels=256,
            num_classes=1,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(rcnn=dict(mask_size=28)),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadCTSlices"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomAffineResize"),
            dict(type="PackCTInputs"),
        ]
    )
)
