# What the released AlignShift, TSM, A3D and 2.5D detectors share beyond the papers: the geometry of
# mmdet 1.x and how their slices were resampled and augmented. For checkpoints of
# tools/convert_checkpoint.py; docs/converting.md says what remains different.
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

stack = dict(interpolation="released")
resize = dict(box_from="corners", interpolation="cubic")
