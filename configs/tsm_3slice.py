# TSM x3 of "AlignShift" (MICCAI 2020), Tables 2 and 3.
_base_ = "_base_/detector.py"
model = dict(backbone=dict(fusion=dict(type="TSMConv", n_fold=8)))
