# Faster R-CNN with ResNet-50 of "Volumetric Attention" (MICCAI 2019), Table 4: the target image
# alone.
_base_ = "../_base_/volumetric_attention.py"
