# Faster R-CNN with ResNet-101 of "Volumetric Attention" (MICCAI 2019), Table 4.
_base_ = "faster_rcnn_r50.py"
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint="https://download.pytorch.org/models/resnet101-63fe2227.pth"),
    )
)
