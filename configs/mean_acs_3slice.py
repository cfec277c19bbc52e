# Mean-ACS x3: a variant in "Reinventing 2D Convolutions for 3D Images" (JBHI 2021), Eq. 4.
# The operator is in the dense blocks alone, as every operator here: stem and transitions are plain
# 1 x K x K convolutions.
_base_ = "_base_/detector.py"
model = dict(backbone=dict(fusion=dict(type="MeanACSConv")))

# The ACS paper lowers the learning rate earlier than the others.
param_scheduler = [
    _base_.param_scheduler[0],
    dict(type="MultiStepLR", by_epoch=True, milestones=[10, 13], gamma=0.1, end=20),
]
