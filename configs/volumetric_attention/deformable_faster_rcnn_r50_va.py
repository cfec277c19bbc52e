# Deformable Faster R-CNN + VA, ResNet-50, 9 slices, of "Volumetric Attention" (MICCAI 2019), Tables
# 3 and 4: the paper's best.
_base_ = "deformable_faster_rcnn_r50.py"
model = dict(attention=dict(type="VolumetricAttention"))
stack = dict(num_slices=9)
