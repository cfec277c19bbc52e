# `make demo`: the fusion and the slices of configs/alignshift_3slice.py in the detector of the demo.
_base_ = "nofusion_3slice.py"
model = dict(
    backbone=dict(
        fusion=dict(type="AlignShiftConv", n_fold=8, ref_thickness=2.0, zero_padding=True)
    )
)
stack = dict(policy="keep_thick")
