# AlignShift x7 as published: alignshift_3slice.py of this folder, which says what
# configs/alignshift_7slice.py does otherwise, on 7 slices.
_base_ = "alignshift_3slice.py"
stack = dict(num_slices=7)
