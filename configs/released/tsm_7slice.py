# TSM x7 as released: the lower score threshold.
_base_ = "tsm_3slice.py"
stack = dict(num_slices=7)
