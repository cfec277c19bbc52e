# ACS, from random weights. Pretrained, from a run of shapes_2d:
# --cfg-options model.pretrained=work_dirs/acs_volumes/shapes_2d/best_Shapes_paper_dice_epoch_50.pth
_base_ = "../_base_/shapes.py"
model = dict(fusion=dict(type="ACSConv"))
