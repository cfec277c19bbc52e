# TSM x7 of "AlignShift" (MICCAI 2020), Tables 2 and 3.
_base_ = "_base_/detector_7slice.py"
model = dict(backbone=dict(fusion=dict(type="TSMConv", n_fold=8)))
