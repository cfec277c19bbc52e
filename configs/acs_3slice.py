# ACS x3 of "Reinventing 2D Convolutions for 3D Images" (JBHI 2021), Table VII.
# The operator is in the dense blocks alone, as every operator here: stem and transitions are plain
# 1 x K x K convolutions.
_base_ = "_base_/detector.py"
model = dict(backbone=dict(fusion=dict(type="ACSConv")))

# The ACS paper lowers the learning rate earlier than the others.
param_scheduler = [
    _base_.param_scheduler[0],
    dict(type="MultiStepLR", by_epoch=True, milestones=[10, 13], gamma=0.1, end=20),
]
