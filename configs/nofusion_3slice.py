# No fusion x3 of "Asymmetric 3D Context Fusion" (MICCAI 2021), Table 2: slices meet in the neck
# only.
_base_ = "_base_/detector.py"
model = dict(backbone=dict(fusion=dict(type="SliceConv")))
