# Faster R-CNN with ResNet-152 of "Volumetric Attention" (MICCAI 2019), Table 4.
_base_ = "faster_rcnn_r50.py"
model = dict(
    backbone=dict(
        depth=152,
        init_cfg=dict(checkpoint="https://download.pytorch.org/models/resnet152-394f9c45.pth"),
    )
)
