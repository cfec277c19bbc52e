# Deformable Faster R-CNN + VCA, channel attention alone, of "Volumetric Attention" (MICCAI 2019),
# Table 4.
_base_ = "deformable_faster_rcnn_r50_va.py"
model = dict(attention=dict(spatial=False))
