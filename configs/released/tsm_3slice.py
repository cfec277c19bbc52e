# TSM x3 as released: the lower score threshold.
_base_ = "../_base_/released.py"
model = dict(
    backbone=dict(fusion=dict(type="TSMConv", n_fold=8)), test_cfg=dict(rcnn=dict(score_thr=5e-5))
)
