# Classification of lung nodules by plain 3D, from random kernels.
# With ImageNet's inflated, torchvision's file: --cfg-options model.pretrained=resnet18-f37072fd.pth
_base_ = "../_base_/lidc_classification.py"
model = dict(fusion=dict(type="I3DConv"), init="kaiming")
