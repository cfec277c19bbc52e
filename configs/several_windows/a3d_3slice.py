# A3D of which each slice comes in three HU windows, as channels: the recipe's wide one, soft tissue
# (width 400 HU, level 40) and lung (width 1500 HU, level -600).
_base_ = "../a3d_3slice.py"
model = dict(data_preprocessor=dict(windows=[(-1024, 2050), (-160, 240), (-1350, 150)]))
