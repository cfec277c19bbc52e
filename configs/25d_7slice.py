# 2.5D x7 of "AlignShift" (MICCAI 2020), Tables 2 and 3: slices are the channels of the 2D network.
_base_ = "25d_3slice.py"
stack = dict(num_slices=7)
