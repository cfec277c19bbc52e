# AlignShift x3 as released: border slices are left as they are, not padded with zeros.
_base_ = "../_base_/released.py"
model = dict(
    backbone=dict(
        fusion=dict(type="AlignShiftConv", n_fold=8, ref_thickness=2.0, zero_padding=False)
    )
)

# Thin data is resampled to 2 mm, thick data keeps its own slices.
stack = dict(policy="keep_thick")
