# TSM x3 as published: total batch 8 (2 images on each of 4 GPUs) at learning rate 0.02.
# configs/tsm_3slice.py counts detections from score 0.001 on, as all experiments there, so that
# operators are compared alike; here from 0.00005. What else it does otherwise: _base_/released.py.
_base_ = "../_base_/released.py"
model = dict(
    backbone=dict(fusion=dict(type="TSMConv", n_fold=8)), test_cfg=dict(rcnn=dict(score_thr=5e-5))
)

train_dataloader = dict(batch_size=8)  # in total
auto_scale_lr = dict(base_batch_size=8)
