# Faster R-CNN + VA with ResNet-152, 9 slices: a combination that the paper has no row for.
_base_ = "faster_rcnn_r152.py"
model = dict(attention=dict(type="VolumetricAttention"))
stack = dict(num_slices=9)
