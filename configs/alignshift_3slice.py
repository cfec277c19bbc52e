# AlignShift x3 of "AlignShift" (MICCAI 2020), Tables 2 and 3.
_base_ = "_base_/detector.py"
model = dict(
    backbone=dict(
        fusion=dict(type="AlignShiftConv", n_fold=8, ref_thickness=2.0, zero_padding=True)
    )
)

# Thin data is resampled to 2 mm, thick data keeps its own slices.
stack = dict(policy="keep_thick")
