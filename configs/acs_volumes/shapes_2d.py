# 2D pre-training of the proof of concept. The paper's code divides the learning rate after epochs
# 25 and 37.5; the second is taken to be 38.
_base_ = "../_base_/shapes.py"
model = dict(network=dict(num_classes=3), init="kaiming")
train_dataloader = dict(batch_size=64, dataset=dict(axes=2, count=10_000))
val_dataloader = dict(batch_size=64, dataset=dict(axes=2, count=2_000))
test_dataloader = val_dataloader
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=0.01, momentum=0.9, weight_decay=1e-4)
)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[25, 38], gamma=0.1)]
auto_scale_lr = dict(base_batch_size=64)
