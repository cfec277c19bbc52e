# Faster R-CNN + VA, ResNet-50, 9 slices, of "Volumetric Attention" (MICCAI 2019), Tables 3 and 4.
# Attention on RoI features instead (Table 2e): --cfg-options model.attention_location=rcnn
_base_ = "faster_rcnn_r50.py"
model = dict(attention=dict(type="VolumetricAttention"))
stack = dict(num_slices=9)
