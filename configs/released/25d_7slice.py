# 2.5D x7 as released: the higher score threshold.
_base_ = "25d_3slice.py"
stack = dict(num_slices=7)
