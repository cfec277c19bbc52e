# The same on 7 slices.
_base_ = "dino_3slice.py"
stack = dict(num_slices=7)
