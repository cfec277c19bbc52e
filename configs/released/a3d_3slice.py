# A3D x3 as published: total batch 4 (1 image on each of 4 GPUs), at learning rate 0.02 all the
# same. configs/a3d_3slice.py trains with a total batch of 8 and counts detections from score 0.001
# on, as all experiments there, so that operators are compared alike; here from 0.00005. What else
# it does otherwise: _base_/released.py.
_base_ = "../_base_/released.py"
model = dict(
    backbone=dict(fusion=dict(type="A3DConv")),
    test_cfg=dict(rcnn=dict(score_thr=5e-5)),
)

train_dataloader = dict(batch_size=4)  # in total
auto_scale_lr = dict(base_batch_size=4)
