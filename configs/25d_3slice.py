# 2.5D x3 of "AlignShift" (MICCAI 2020), Tables 2 and 3: slices are the channels of the 2D network.
_base_ = "_base_/detector.py"
model = dict(
    backbone=dict(slices_as_channels=True, stem="tile"),
)
