# Mask R-CNN on LiTS of "Volumetric Attention" (MICCAI 2019), Table 2a: the target image alone.
# Masks of 56 x 56 (docs/lits.md: what 28 x 28 cost) are three options more:
#   --cfg-options model.roi_head.mask_roi_extractor.roi_layer.output_size=28
#     model.roi_head.mask_head.roi_feat_size=28 model.train_cfg.rcnn.mask_size=56
_base_ = "../_base_/lits.py"
