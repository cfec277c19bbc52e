# 2.5D x3 as released: the higher score threshold.
_base_ = "../_base_/released.py"
model = dict(
    backbone=dict(slices_as_channels=True, stem="tile"),
    test_cfg=dict(rcnn=dict(score_thr=5e-3)),
)
