# What the experiments of "Volumetric Attention" (MICCAI 2019), section 3.3, share. As the paper
# says: Faster R-CNN with FPN from ImageNet, 512 px, images of 3 slices, trained on the training and
# the validation split together. So there is nothing to choose a model by: the last epoch is tested.
# The schedule, of which the paper says nothing, is that of the code it used.
_base_ = [
    "faster_rcnn_resnet50_fpn.py",
    "deeplesion.py",
    "schedule_12e.py",
    "default_runtime.py",
]

# Slices 2 mm apart, as in 3DCE; one image of 3, and with attention a bag of 3 images.
stack = dict(num_slices=3, policy="normalize", target_mm=2.0)
resize = dict(prob=0)  # of the augmentations the flips alone

train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        # To choose by validation: annotations/train.json alone here, and val_dataloader, val_cfg
        # and val_evaluator of _base_/deeplesion.py and schedule_20e.py.
        ann_file=["annotations/train.json", "annotations/val.json"],
        pipeline=[
            dict(type="LoadCTSlices"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomAffineResize"),
            dict(type="PackCTInputs"),
        ],
    ),
)
val_dataloader = None
val_evaluator = None
# The losses of sound runs are known for the recipe of the other papers only.
default_hooks = dict(checkpoint=dict(save_best=None), run_check=dict(reference=None))
