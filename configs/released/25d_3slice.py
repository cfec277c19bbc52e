# 2.5D x3 as released: the higher score threshold.
_base_ = "../_base_/released_3slice.py"
model = dict(
    backbone=dict(slices_as_channels=True, in_channels=_base_.num_slices, stem="tile"),
    neck=dict(num_slices=1),
    test_cfg=dict(rcnn=dict(score_thr=5e-3)),
)
