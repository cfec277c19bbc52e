# The same on 7 slices.
_base_ = "a3d_3slice.py"
stack = dict(num_slices=7)
