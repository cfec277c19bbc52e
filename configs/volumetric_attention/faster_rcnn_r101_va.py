# Faster R-CNN + VA with ResNet-101, 9 slices: a combination that the paper has no row for.
_base_ = "faster_rcnn_r101.py"
model = dict(attention=dict(type="VolumetricAttention"))
stack = dict(num_slices=9)
