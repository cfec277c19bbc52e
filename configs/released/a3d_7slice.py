# A3D x7 as published: a3d_3slice.py of this folder, which says what
# configs/a3d_7slice.py does otherwise, on 7 slices.
_base_ = "a3d_3slice.py"
stack = dict(num_slices=7)
