# A3D x7 as released: the lower score threshold.
_base_ = "a3d_3slice.py"
stack = dict(num_slices=7)
