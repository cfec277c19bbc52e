# AlignShift x3 as published: total batch 8 (2 images on each of 4 GPUs) at learning rate 0.02.
# configs/alignshift_3slice.py pads border slices with zeros, as the paper's Algorithm 1 says; here
# they are left as they are. What else it does otherwise: _base_/released.py.
_base_ = "../_base_/released.py"
model = dict(
    backbone=dict(
        fusion=dict(type="AlignShiftConv", n_fold=8, ref_thickness=2.0, zero_padding=False)
    )
)

# Thin data is resampled to 2 mm, thick data keeps its own slices.
stack = dict(policy="keep_thick")

train_dataloader = dict(batch_size=8)  # in total
auto_scale_lr = dict(base_batch_size=8)
