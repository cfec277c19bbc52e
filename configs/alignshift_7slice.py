# AlignShift x7 of "AlignShift" (MICCAI 2020), Tables 2 and 3.
_base_ = [
    "_base_/mask_rcnn_densenet121.py",
    "_base_/deeplesion.py",
    "_base_/schedule_20e.py",
    "_base_/default_runtime.py",
]
num_slices = 7
model = dict(
    backbone=dict(
        fusion=dict(
            _delete_=True, type="AlignShiftConv", n_fold=8, ref_thickness=2.0, zero_padding=True
        )
    ),
    neck=dict(num_slices=num_slices),
)

# Thin data is resampled to 2 mm, thick data keeps its own slices.
load_slices = dict(type="LoadCTSlices", num_slices=num_slices, policy="keep_thick")
train_dataloader = dict(dataset=dict(pipeline=[load_slices, *_base_.train_pipeline[1:]]))
val_dataloader = dict(dataset=dict(pipeline=[load_slices, *_base_.test_pipeline[1:]]))
test_dataloader = dict(dataset=dict(pipeline=[load_slices, *_base_.test_pipeline[1:]]))
