# What the published AlignShift, TSM, A3D and 2.5D runs share beyond the papers: to train as they
# did, and for checkpoints of tools/convert_checkpoint.py. docs/converting.md says what remains
# different. The experiments in configs/ do otherwise: today's geometry, without anchors and masks
# on whole pixels and windows half a cell off; slices resampled by the weights of each position, as
# the released ones are wrong from the second neighbour on; boxes around the moved diameters, as
# DeepLesion defines them; linear interpolation, which does not overshoot; and masks that are nearer
# to the lesions.
_base_ = "detector.py"
custom_imports = dict(imports=[*_base_.custom_imports.imports, "mmdet_ext.released.geometry"])

old_roi_layer = dict(aligned=False)  # samples half a feature cell right of and below today's
model = dict(
    type="ReleasedKeySliceMaskRCNN",
    rpn_head=dict(
        anchor_generator=dict(type="WholePixelAnchorGenerator"),
        bbox_coder=dict(type="WholePixelBoxCoder"),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=old_roi_layer),
        bbox_head=dict(bbox_coder=dict(type="WholePixelBoxCoder")),
        mask_roi_extractor=dict(roi_layer=old_roi_layer),
        mask_head=dict(type="WholePixelMaskHead"),
    ),
    # Anchors lie on whole pixels; one that ends with the image's last pixel is inside.
    train_cfg=dict(rpn=dict(allowed_border=0.5)),
)

# Masks of `tools/prepare_data.py ROOT --masks released`. Validation and test, which are scored by
# boxes, read the usual files.
train_dataloader = dict(dataset=dict(ann_file="annotations_released/train.json"))
stack = dict(interpolation="released")
resize = dict(box_from="corners", interpolation="cubic")
