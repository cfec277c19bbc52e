# DeepLesion (or a phantom of its format) prepared by tools/prepare_data.py.
data_root = "{{$DEEPLESION_ROOT:data/DeepLesion}}"

# Which slices around a key slice the network sees, and what becomes of them in-plane: stated here
# once for the detector and for training, validation and test.
stack = dict(num_slices=3, policy="normalize", target_mm=2.0, interpolation="exact")
resize = dict(size=512)

train_pipeline = [
    dict(type="LoadCTSlices"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomAffineResize"),
    dict(type="PackCTInputs"),
]
test_pipeline = [
    dict(type="LoadCTSlices"),
    dict(type="RandomAffineResize", augment=False),
    dict(type="PackCTInputs"),
]

train_dataloader = dict(
    batch_size=8,  # in all: of N processes each takes 8 / N
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="EpochSampler", shuffle=True),
    dataset=dict(
        type="DeepLesionDataset",
        data_root=data_root,
        ann_file="annotations/train.json",
        data_prefix=dict(img="Images_png"),
        cache="slice_cache",  # read instead of the PNGs if prepare_data.py --cache made it
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="DeepLesionDataset",
        data_root=data_root,
        ann_file="annotations/val.json",
        data_prefix=dict(img="Images_png"),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="DeepLesionDataset",
        data_root=data_root,
        ann_file="annotations/test.json",
        data_prefix=dict(img="Images_png"),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)

val_evaluator = dict(type="FROCMetric")
test_evaluator = dict(type="FROCMetric")
