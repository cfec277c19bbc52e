# Lung nodules: FCN on ResNet-18, Dice loss. Other backbones: model.network.backbone=vgg16,
# densenet121.
_base_ = "lidc.py"
model = dict(
    type="VolumeSegmentor",
    network=dict(type="NoduleFCN", backbone="resnet18", num_classes=2),
    loss=dict(type="SoftDiceLoss", smooth=1.0),
)
train_dataloader = dict(batch_size=8, dataset=dict(task="segmentation"))
val_dataloader = dict(dataset=dict(task="segmentation"))
test_dataloader = val_dataloader
val_evaluator = dict(type="NoduleDiceMetric")
test_evaluator = val_evaluator
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(checkpoint=dict(save_best="Nodules/dice_global"))
