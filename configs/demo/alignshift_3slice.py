# `make demo`: AlignShift on the phantom.
_base_ = "nofusion_3slice.py"
model = dict(backbone=dict(fusion=dict(type="AlignShiftConv", n_fold=8, ref_thickness=2.0)))
stack = dict(policy="keep_thick")
