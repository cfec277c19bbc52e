# AlignA3D x7: A3D with the align factor of AlignShift, in no paper.
_base_ = "aligna3d_3slice.py"
stack = dict(num_slices=7)
