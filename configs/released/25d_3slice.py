# 2.5D x3 as published: total batch 64 (16 images on each of 4 GPUs), at learning rate 0.02 all the
# same, BatchNorm not synchronised. configs/25d_3slice.py trains with a total batch of 8,
# synchronised, and counts detections from score 0.001 on, as all experiments there, so that
# operators are compared alike; here from 0.005. What else it does otherwise: _base_/released.py.
_base_ = "../_base_/released.py"
model = dict(
    backbone=dict(slices_as_channels=True, stem="tile"),
    test_cfg=dict(rcnn=dict(score_thr=5e-3)),
)

# BatchNorm was not synchronised: each GPU normalises by its own 16 images.
model_wrapper_cfg = dict(sync_bn=False)

train_dataloader = dict(batch_size=64)  # in total
auto_scale_lr = dict(base_batch_size=64)
