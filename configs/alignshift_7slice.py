# AlignShift x7 of "AlignShift" (MICCAI 2020), Tables 2 and 3.
_base_ = "alignshift_3slice.py"
stack = dict(num_slices=7)
