# A3D x7 of "Asymmetric 3D Context Fusion" (MICCAI 2021), Tables 2 and 3.
_base_ = "a3d_3slice.py"
stack = dict(num_slices=7)
