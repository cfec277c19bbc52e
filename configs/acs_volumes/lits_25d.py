# Liver and lesions by 2.5D: 1 x K x K kernels with pooling and upsampling along all three axes.
_base_ = "../_base_/lits_volumes.py"
model = dict(fusion=dict(type="SliceConv"))
