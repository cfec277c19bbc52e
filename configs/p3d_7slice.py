# P3D x7 of "Asymmetric 3D Context Fusion" (MICCAI 2021), Table 2.
_base_ = "p3d_3slice.py"
stack = dict(num_slices=7)
