# A3D x3 of "Asymmetric 3D Context Fusion" (MICCAI 2021), Tables 2 and 3.
_base_ = "_base_/detector.py"
model = dict(backbone=dict(fusion=dict(type="A3DConv")))
