# VA Mask R-CNN on LiTS of "Volumetric Attention" (MICCAI 2019), Table 2: a bag of 9 images, 27
# slices, attention before the RPN. The other rows of its ablations are one option each:
#   Table 2f, bags of 3, 7, 11: --cfg-options stack.num_slices=9 (21, 33)
#   Table 2e, attention on RoI features: --cfg-options model.attention_location=rcnn
#   Table 2d, channel attention alone: --cfg-options model.attention.spatial=False
#   Table 2c, other sizes: --cfg-options resize.size=512 (800, 1333)
_base_ = "lits_mask_rcnn_r50.py"
model = dict(attention=dict(type="VolumetricAttention"))
stack = dict(num_slices=27)
