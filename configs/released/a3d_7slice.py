# A3D x7 as released: the lower score threshold.
_base_ = "../_base_/released_7slice.py"
model = dict(
    backbone=dict(fusion=dict(type="A3DConv", num_slices=_base_.num_slices)),
    test_cfg=dict(rcnn=dict(score_thr=5e-5)),
)
