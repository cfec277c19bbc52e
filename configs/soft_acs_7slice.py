# Soft-ACS x7: a variant in "Reinventing 2D Convolutions for 3D Images" (JBHI 2021), Eq. 5.
_base_ = "soft_acs_3slice.py"
stack = dict(num_slices=7)
