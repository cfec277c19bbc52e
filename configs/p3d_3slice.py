# P3D x3 of "Asymmetric 3D Context Fusion" (MICCAI 2021), Table 2.
_base_ = "_base_/detector.py"
model = dict(backbone=dict(fusion=dict(type="P3DConv")))
