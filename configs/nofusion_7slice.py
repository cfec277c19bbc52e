# No fusion x7 of "Asymmetric 3D Context Fusion" (MICCAI 2021), Table 2: slices meet in the neck
# only.
_base_ = "nofusion_3slice.py"
stack = dict(num_slices=7)
