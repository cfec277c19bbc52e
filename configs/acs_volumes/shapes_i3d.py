# Plain 3D. The paper's begins with random kernels; `model.pretrained` inflates those of 2D.
_base_ = "../_base_/shapes.py"
model = dict(fusion=dict(type="I3DConv"), init="kaiming")
