# released_3slice.py on 7 slices.
_base_ = "released_3slice.py"
num_slices = 7
model = dict(neck=dict(num_slices=num_slices))

load_slices = dict(_base_.load_slices, num_slices=num_slices)
train_pipeline = [load_slices, *_base_.train_pipeline[1:]]
test_pipeline = [load_slices, *_base_.test_pipeline[1:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
