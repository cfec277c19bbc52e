# AlignShift x3 as released: border slices are left as they are, not padded with zeros.
_base_ = "../_base_/released_3slice.py"
model = dict(
    backbone=dict(
        fusion=dict(type="AlignShiftConv", n_fold=8, ref_thickness=2.0, zero_padding=False)
    )
)

# Thin data is resampled to 2 mm, thick data keeps its own slices.
load_slices = dict(_base_.load_slices, policy="keep_thick")
train_pipeline = [load_slices, *_base_.train_pipeline[1:]]
test_pipeline = [load_slices, *_base_.test_pipeline[1:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
