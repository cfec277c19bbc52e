# TSM x7 as published: tsm_3slice.py of this folder, which says what
# configs/tsm_7slice.py does otherwise, on 7 slices.
_base_ = "tsm_3slice.py"
stack = dict(num_slices=7)
