# Lung nodules, benign against malignant: ResNet-18, cross entropy of two classes (the paper words
# it as binary). Other backbones: model.network.backbone=vgg16, densenet121.
_base_ = "lidc.py"
model = dict(
    type="VolumeClassifier",
    network=dict(type="NoduleClassifier", backbone="resnet18", num_classes=2),
)
train_dataloader = dict(batch_size=24, dataset=dict(task="classification"))
val_dataloader = dict(dataset=dict(task="classification"))
test_dataloader = val_dataloader
val_evaluator = dict(type="NoduleAUCMetric")
test_evaluator = val_evaluator
auto_scale_lr = dict(enable=False, base_batch_size=24)
default_hooks = dict(checkpoint=dict(save_best="Nodules/auc"))
