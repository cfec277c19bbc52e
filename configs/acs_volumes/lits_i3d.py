# Liver and lesions by plain 3D, from random kernels; `model.pretrained` inflates those of 2D.
_base_ = "../_base_/lits_volumes.py"
model = dict(fusion=dict(type="I3DConv"), init="kaiming")
