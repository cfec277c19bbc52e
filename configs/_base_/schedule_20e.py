# 20 epochs of SGD at a total batch of 8; the milestones are those of the released configs.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, milestones=[9, 16], gamma=0.1, end=20),
]
train_cfg = dict(type="ResumableTrainLoop", max_epochs=20, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
# The total batch that the learning rate is meant for; another one is refused unless it is said.
auto_scale_lr = dict(enable=False, base_batch_size=8)
