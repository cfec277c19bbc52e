# Deformable Faster R-CNN, ResNet-50, of "Volumetric Attention" (MICCAI 2019), Table 4. The paper
# does not say where: deformable convolutions of the first kind (ICCV 2017) in stages c3 to c5.
_base_ = "faster_rcnn_r50.py"
model = dict(
    backbone=dict(
        dcn=dict(type="DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)
