# What the LiTS experiments of "Volumetric Attention" (MICCAI 2019), section 3.2, share: Mask R-CNN
# for liver and lesions on images of 1024 px, slices resampled to 1.5 mm, of data prepared by
# tools/prepare_data.py FOLDER --lits --out LITS_ROOT. docs/lits.md says what the paper leaves open.
_base_ = [
    "faster_rcnn_resnet50_fpn.py",
    "deeplesion.py",
    "schedule_12e.py",
    "default_runtime.py",
]
custom_imports = dict(
    imports=[
        *_base_.custom_imports.imports,
        "mmdet_ext.datasets.lits",
        "mmdet_ext.evaluation.dice_metric",
    ]
)
data_root = "{{$LITS_ROOT:data/LiTS_prepared}}"

# One image of 3 slices, and with attention a bag of N images: 3 N slices.
stack = dict(_delete_=True, num_slices=3, policy="normalize", target_mm=1.5)
resize = dict(size=1024, prob=0)  # of the augmentations the flips alone

model = dict(
    type="SliceGroupMaskRCNN",
    # HU to [0, 1] as in the paper, and that to the mean and deviation of ImageNet, which the
    # backbone's BatchNorm expects. The paper's numbers alone: shift=0, divisor=255.
    data_preprocessor=dict(low=-200, high=300),
    # To start from DeepLesion, of which the paper copies these parts alone: --cfg-options \
    #     model.pretrained.checkpoint=work_dirs/volumetric_attention/faster_rcnn_r50/epoch_12.pth
    pretrained=dict(checkpoint=None, parts=["backbone", "neck", "rpn_head"]),
    # At 1024 px lesions have twice the size that they have on DeepLesion's 512 px, and a liver has
    # up to 700 px: the usual 32 to 512 px, where DeepLesion has 16 to 256.
    rpn_head=dict(anchor_generator=dict(scales=[8])),
    roi_head=dict(
        bbox_head=dict(num_classes=2),
        mask_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=2),
            out_channels=_base_.fpn_channels,
            featmap_strides=[4, 8, 16, 32],
        ),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=4,
            in_channels=_base_.fpn_channels,
            conv_out_channels=256,
            num_classes=2,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(rcnn=dict(mask_size=28)),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)

# Loaded and augmented as DeepLesion's slices are.
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        type="LiTSDataset",
        data_root=data_root,
        cache=None,
        background_step=4,  # of the slices without liver, more than half, every fourth
    ),
)
# The paper chooses no model by validation, as far as it says: the last epoch is scored on the
# validation cases, there being no labels of the challenge's test set.
test_dataloader = dict(
    dataset=dict(type="LiTSDataset", data_root=data_root, ann_file="annotations/val.json")
)
val_dataloader = None
val_evaluator = None
test_evaluator = dict(_delete_=True, type="DiceMetric", lesion_scores=[0.5, 0.1, 0.3, 0.7, 0.9])
# The losses of sound runs are known for the recipe of the other papers only.
default_hooks = dict(checkpoint=dict(save_best=None), run_check=dict(reference=None))
