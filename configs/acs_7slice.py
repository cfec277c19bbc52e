# ACS x7 of "Reinventing 2D Convolutions for 3D Images" (JBHI 2021), Table VII.
_base_ = "acs_3slice.py"
stack = dict(num_slices=7)
