# Segmentation of lung nodules by ACS, from random weights.
# With ImageNet's, of torchvision's file: --cfg-options model.pretrained=resnet18-f37072fd.pth
_base_ = "../_base_/lidc_segmentation.py"
model = dict(fusion=dict(type="ACSConv"))
