# 2.5D x7 as published: 25d_3slice.py of this folder, which says what
# configs/25d_7slice.py does otherwise, on 7 slices.
_base_ = "25d_3slice.py"
stack = dict(num_slices=7)
