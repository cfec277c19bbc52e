# The same with volumetric attention before the RPN: a bag of 3 images, 9 slices.
_base_ = "lits.py"
model = dict(attention=dict(type="VolumetricAttention"))
stack = dict(num_slices=9)
